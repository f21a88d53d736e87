"""What happens when a card's memory runs out in the middle of a run: does it go on, with the same losses?

    python benchmarks/out_of_memory.py --data FILE --model shape:mistral-7b --preset 7b --cap-gib 24 --then-gib 10.5,6

Trains the preset once undisturbed, then once for each of ``--then-gib``: after ``--after`` steps torch's allocator is
allowed no more than that many GiB, so that its own out-of-memory error comes from wherever the memory is needed. Prints
what the log says, how the run ended, and the largest difference of a loss to the undisturbed run's. Without a GPU
nothing runs out, and the runs are alike.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

GIB = 2**30
CHANGES = ("gradient_checkpointing", "per_device_train_batch_size", "gradient_accumulation_steps")  # of the preset


def limit_to(gib: float) -> None:
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib / total))


def limit_after(run_dir: Path, steps: int, gib: float, done: threading.Event) -> None:
    """Wait until the run has logged ``steps`` steps, then lower the limit."""
    from kto_core.runs import events

    state, offset = None, 0
    while not done.wait(0.02):
        new, offset = events.read(run_dir / "events.jsonl", offset)
        state = events.fold(new, state)
        if state.step >= steps:
            limit_to(gib)
            return


def one(args, model: str, then_gib: float | None) -> dict:
    """One run; its state, error, losses and what the log says of memory."""
    from flags import STEPS_ALONE

    from kto_core.config import resolving
    from kto_core.runs import events
    from kto_core.training import train

    run_dir = Path(tempfile.mkdtemp(prefix="kto-oom-"))
    overrides = {"model": model, "data": args.data, "max_steps": args.steps, "save_steps": 10**6, "engine": args.engine}
    overrides |= {"output_dir": str(run_dir), "num_train_epochs": 100, **STEPS_ALONE}
    overrides |= {k: v for k in CHANGES if (v := getattr(args, k)) is not None}
    resolved = resolving.resolve(args.preset, overrides).config
    done = threading.Event()
    if then_gib:
        threading.Thread(target=limit_after, args=(run_dir, args.after, then_gib, done), daemon=True).start()
    try:
        train.train(resolved, run_dir)
    except Exception as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
    done.set()
    limit_to(1e9)
    state = events.fold(events.read(run_dir / "events.jsonl")[0])
    said = [x["text"] for x in state.logs if "memory" in x["text"].lower()]
    losses = [m["loss"] for m in state.metrics if "loss" in m]
    return {"then_gib": then_gib, "state": state.state, "error": state.error, "said": said, "losses": losses}


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="demo", help="demo, a folder, or shape:NAME (random weights; see shapes.py)")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--gradient-checkpointing", choices=("auto", "true", "false"), help="default the preset's")
    parser.add_argument("--batch-size", type=int, dest=CHANGES[1], help="rows of a micro-batch; default the preset's")
    parser.add_argument("--accumulation", type=int, dest=CHANGES[2], help="micro-batches; default the preset's")
    parser.add_argument("--cap-gib", type=float, default=24.0)
    parser.add_argument("--then-gib", default="10.5,6", help="limits of torch's allocator, one run each")
    parser.add_argument("--after", type=int, default=2, help="steps before the limit falls")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = arguments(argv)
    from step_engines import model_folder

    from kto_core.hardware import gpus

    os.environ[gpus.LIMIT] = str(args.cap_gib)
    model = model_folder(args.model, nf4=True)
    limits = [None, *(float(x) for x in args.then_gib.split(",") if x)]
    runs = [one(args, model, then) for then in limits]
    for run in runs:
        pairs = list(zip(runs[0]["losses"], run["losses"], strict=False))
        run["largest_difference"] = max((abs(a - b) for a, b in pairs), default=None)
    if args.json:
        print(json.dumps({"runs": runs}))
        return 0
    for run in runs:
        print(f"limit {run['then_gib'] or args.cap_gib} GiB: {run['state']} after {len(run['losses'])} losses, "
              f"largest difference {run['largest_difference']}")  # fmt: skip
        for text in [*run["said"], *([run["error"]] if run["error"] else [])]:
            print(f"    {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
