"""Does memory come back? Train, chat and export in one process, again and again; what is held after each step.

    python benchmarks/memory_back.py --data FILE [--model demo|FOLDER|shape:NAME] [--preset 3b] [--rounds 3] [--json]

Prints, after every step of every round, the process's resident memory and, on a GPU, what torch has allocated and what
the card says is taken. The last lines compare the end with the end of the first round, after which libraries and the
CUDA context are there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

MIB = 2**20


def held() -> dict[str, float]:
    """MiB: ``rss`` of the process; ``allocated`` and ``reserved`` by torch and ``used`` of the card, on a GPU."""
    import psutil
    import torch

    found = {"rss": psutil.Process().memory_info().rss}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found |= {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
        found["used"] = total - free
    return {k: round(v / MIB, 1) for k, v in found.items()}


def one_round(args, model: str):
    """Yields the name of each step once it is done."""
    from flags import STEPS_ALONE

    from kto_core.chat import chat
    from kto_core.config import resolving
    from kto_core.export.export import merge
    from kto_core.runs import folders
    from kto_core.training import start as starting

    overrides = {"model": model, "data": args.data, "max_steps": args.steps, "save_steps": 10**6}
    overrides |= STEPS_ALONE
    run = folders.create(resolving.resolve(args.preset, overrides))
    starting.start(run, block=True)
    state = run.state()
    if state.state != "finished":
        raise SystemExit(f"training ended as {state.state}: {state.error}")
    yield "train"
    loaded = chat.load(run)
    text = "".join(loaded.stream([{"role": "user", "content": "Hello, who are you?"}], max_new_tokens=32))
    loaded.unload()
    yield f"chat ({len(text)} characters)"
    merge(run)
    folders.delete(run)
    yield "merge"


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = arguments(argv)
    import os

    os.environ["KTO_STUDIO_RUNS"] = tempfile.mkdtemp(prefix="kto-memory-")
    from step_engines import model_folder

    model, found = model_folder(args.model), []
    for number in range(1, args.rounds + 1):
        for step in one_round(args, model):
            found.append({"round": number, "step": step, **held()})
            print(json.dumps(found[-1]), file=sys.stderr if args.json else sys.stdout, flush=True)
    ends = [f for f in found if f["step"] == "merge"]
    change = {k: round(ends[-1][k] - ends[0][k], 1) for k in ends[0] if k not in ("round", "step")}
    print(json.dumps({"steps": found, "change": change}) if args.json else f"MiB more than after round 1: {change}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
