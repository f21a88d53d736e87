"""Every preset on a card of 24 GiB: does it train, at what speed, and was its memory foretold?

``python benchmarks/presets.py --data FILE [--presets 3b,7b,13b] [--lengths own,512,1024] [--json OUT]`` trains each
preset at its own batch and LoRA for ``--steps`` optimizer steps, on a model of the real shape with random
weights (`shapes.py`, a 4-bit checkpoint as the presets' own models are; ``--bf16``: put into 4 bits on loading), loaded
through the product's own path, in a process of its own whose share of the card is capped at ``--cap-gib``
(KTO_STUDIO_GPU_GIB). It prints the predicted peak beside ``torch.cuda.max_memory_reserved`` plus the CUDA context.

``python benchmarks/presets.py --data FILE --presets 7b --num-gpus 2`` starts each preset as the product does, in a
worker of its own, on one GPU and then on that many (each has the preset's batch, so a step has more rows), and prints
the ratio of the rows a second that the runs' events tell.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

MODELS = {"3b": "qwen2.5-3b", "7b": "mistral-7b", "13b": "qwen2.5-14b", "20b": "gpt-oss-20b", "demo": "demo"}
GIB = 2**30


def one(args) -> dict:
    """Train one preset here; what happened, as a dict. Called in a fresh process."""
    if args.engine == "unsloth":
        from kto_core.models.unsloth_load import import_first

        import_first()
    import shapes
    import torch
    from flags import STEPS_ALONE

    from kto_core.config import resolving
    from kto_core.hardware import gpus as hardware
    from kto_core.models import load
    from kto_core.planning import memory, training_data
    from kto_core.runs import events, folders
    from kto_core.training import start as starting
    from kto_core.training import train

    os.environ[hardware.LIMIT] = str(args.cap_gib)  # also for the child in which Unsloth trains
    shape = args.shape or MODELS[args.preset]
    name = str(make_apart(args, shape)) if shape in shapes.SHAPES else shape
    run_dir = Path(args.run_dir)
    overrides = {
        "model": name,
        "data": args.data,
        "max_steps": args.steps,
        "output_dir": str(run_dir),
        "logging_steps": 1,
        "save_steps": 10**6,
        "engine": args.engine,
        "num_train_epochs": 100,
        **STEPS_ALONE,
    }
    if args.max_length:
        overrides["max_length"] = args.max_length
    if args.num_gpus:
        overrides |= {"num_gpus": args.num_gpus, "worker": "process"}
        overrides |= {"shard": args.shard} if args.num_gpus > 1 else {}
    resolved = resolving.resolve(args.preset, overrides)
    c = resolved.config
    tokenizer = load.load_tokenizer(name)
    planned = training_data.plan_data(c, tokenizer)
    lengths = planned.lengths
    plan = memory.plan(c, lengths, packed=planned.packed(c))
    out = {
        "preset": args.preset,
        "model": Path(name).name,
        "engine": args.engine,
        "num_gpus": c.num_gpus,
        "max_length": c.max_length,
        "batch": f"{c.per_device_train_batch_size}×{c.gradient_accumulation_steps}",
        "rows_of_a_step": c.effective_batch_size,
        "r": c.r,
        "mean_tokens": round(sum(lengths) / len(lengths)),
        "predicted_gib": round(plan.predicted_gib, 2),
        "verdict": plan.verdict,
    }
    here = not args.num_gpus and torch.cuda.is_available()  # else the GPU belongs to the worker
    if here:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    try:
        if args.num_gpus:
            starting.start(folders.create(resolved), block=True)
        else:
            train.train(c, run_dir)
    except Exception as e:
        out["error"] = f"{type(e).__name__}: {e}"[:300]
    state = events.fold(events.read(run_dir / "events.jsonl")[0])
    out |= {"state": state.state, "steps": state.step, "seconds": round(time.perf_counter() - started, 1)}
    if state.error:
        out["error"] = state.error[:300]
    out["log"] = [
        x["text"] for x in state.logs if any(w in x["text"].lower() for w in ("engine", "trainer", "memory"))
    ][:6]
    out |= speeds(state.metrics)
    out["loss"] = [m["loss"] for m in state.metrics if "loss" in m][:3]
    if here:
        out["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
        out["allocated_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        free, total = torch.cuda.mem_get_info()
        out["context_gib"] = round((total - free) / GIB - torch.cuda.memory_reserved() / GIB, 2)
    else:
        out |= taken(state.metrics)
    return out


def make_apart(args, shape: str) -> Path:
    """The model's folder. With workers it is made by another process, which leaves the GPU to them."""
    import shapes

    folder = shapes.place(args.models, shape, not args.bf16)
    if not args.num_gpus:
        return shapes.make(shape, folder, args.tokenizer, nf4=not args.bf16)
    command = [sys.executable, shapes.__file__, shape, str(folder)]
    command += ["--tokenizer", args.tokenizer] if args.tokenizer else []
    subprocess.run(command + ["--nf4"] * (not args.bf16), check=True, stdout=sys.stderr)
    return folder


def speeds(metrics: list[dict]) -> dict:
    """Median rows and tokens a second of the steps after the first, which warms up."""
    timed, found = [m for m in metrics if m.get("examples_per_second")], {}
    for key in ("examples_per_second", "tokens_per_second"):
        values = sorted(m[key] for m in timed[1:] if m.get(key))
        found[key] = round(values[len(values) // 2], 2) if values else None
    return found


def taken(metrics: list[dict]) -> dict:
    """The most GPU memory that a run's events tell; nothing where they tell of none."""
    seen = [m["gpu_memory"] for m in metrics if m.get("gpu_memory")]
    return {"reserved_gib": max(seen)} if seen else {}


def scaling(results: list[dict]) -> str:
    """What more GPUs brought, in one line: the last result against the first of the same preset and length."""
    one, many = results[0], results[-1]
    head = f"{many['preset']}, {many.get('num_gpus', '?')} GPUs against {one.get('num_gpus', '?')}: "
    a, b = one.get("examples_per_second"), many.get("examples_per_second")
    if not a or not b:
        return head + "not measured"
    return head + f"{b:.2f} against {a:.2f} rows/s, {b / a:.2f} times"


def where(run_dir: Path) -> dict:
    """How far a run came that was not waited for: its state, step and last remark."""
    from kto_core.runs import events

    if not (run_dir / "events.jsonl").exists():
        return {"state": "before the run: making or looking at the model and the data"}
    state = events.fold(events.read(run_dir / "events.jsonl")[0])
    found = {"state": state.state, "steps": state.step, "log": [x["text"] for x in state.logs][-3:]}
    return found | speeds(state.metrics) | taken(state.metrics)


def longest(data: str, count: int, folder: str) -> str:
    """A file of the ``count`` longest rows of ``data``, half of them of each label."""
    from kto_core.data import dataset

    rows = dataset.load(data).rows
    by_length = sorted(range(len(rows)), key=dataset.lengths(rows).__getitem__, reverse=True)
    of_label = ([i for i in by_length if rows.labels[i] == label] for label in (True, False))
    chosen = sorted(i for numbers in of_label for i in numbers[: count // 2])
    return str(dataset.save(rows.take(chosen), Path(folder) / "longest.jsonl", "trl"))


def end(run_dir: Path, patience: float = 30.0) -> None:
    """End a worker that is not waited for: it has a session of its own and would keep the GPU."""
    from kto_core.runs import locks
    from kto_core.runs.stopping import STOP_NOW

    if not run_dir.is_dir():
        return
    until = time.monotonic() + patience
    while locks.is_alive(run_dir) and time.monotonic() < until:
        (run_dir / "stop").write_text(STOP_NOW)
        time.sleep(0.5)


def arguments(argv=None) -> argparse.Namespace:
    import shapes

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--longest", type=int, help="only so many of its rows, the longest: few steps meet the peak")
    parser.add_argument("--presets", default="3b,7b,13b,20b")
    parser.add_argument("--lengths", default="own", help="values of max_length, comma-separated; own: the preset's")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cap-gib", type=float, default=24.0)
    parser.add_argument("--models", default=str(shapes.ROOT))
    parser.add_argument("--tokenizer", help="folder of a tokenizer; default the demo model's")
    parser.add_argument("--shape", help="another shape than the preset's, or a model's folder")
    parser.add_argument("--timeout", type=int, default=400, help="seconds for one preset")
    parser.add_argument("--json", help="write all results here")
    parser.add_argument("--num-gpus", type=int, help="on one GPU and on N, as the product trains; the ratio")
    parser.add_argument("--shard", default="auto", choices=("auto", "true", "false"), help="with several GPUs")
    parser.add_argument("--bf16", action="store_true", help="models in bf16, put into 4 bits on loading")
    parser.add_argument("--keep-models", action="store_true", help="do not delete a shape after its preset")
    parser.add_argument("--one", dest="preset", help=argparse.SUPPRESS)
    parser.add_argument("--max-length", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--run-dir", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def apart(args, preset: str, length: int | None, gpus: int | None) -> dict:
    """`one`, in a process of its own."""
    run_dir = tempfile.mkdtemp(prefix="kto-bench-")
    flags = {
        "--one": preset,
        "--data": args.data,
        "--engine": args.engine,
        "--steps": args.steps,
        "--cap-gib": args.cap_gib,
        "--models": args.models,
        "--tokenizer": args.tokenizer,
        "--shape": args.shape,
        "--max-length": length,
        "--num-gpus": gpus,
        "--shard": args.shard,
        "--run-dir": run_dir,
    }
    command = [sys.executable, __file__, *(["--bf16"] if args.bf16 else [])]
    for flag, value in flags.items():
        command += [flag, str(value)] if value else []
    with tempfile.TemporaryDirectory(prefix="kto-bench-runs-") as runs:
        env = os.environ | {"KTO_STUDIO_RUNS": runs}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout, env=env)
            line = next((x for x in reversed(done.stdout.splitlines()) if x.startswith("RESULT ")), None)
            tail = (done.stderr or done.stdout)[-1500:]
            result = json.loads(line[7:]) if line else {"preset": preset, "num_gpus": gpus or 1, "error": tail}
        except subprocess.TimeoutExpired:
            result = {"preset": preset, "max_length": length, "num_gpus": gpus or 1}
            result |= {"error": f"not done in {args.timeout} s"} | where(Path(run_dir))
            end(Path(run_dir))
    shutil.rmtree(run_dir, ignore_errors=True)
    return result


def main(argv=None) -> int:
    args = arguments(argv)
    if args.preset:
        print("RESULT " + json.dumps(one(args)), flush=True)
        return 0
    with tempfile.TemporaryDirectory(prefix="kto-bench-data-") as folder:
        if args.longest:
            args.data = longest(args.data, args.longest, folder)
        return measure(args)


def measure(args) -> int:
    """Every preset at every length."""
    import shapes

    results = []
    counts = list(dict.fromkeys([1, args.num_gpus])) if args.num_gpus else [None]
    for preset in args.presets.split(","):
        for length in [None if x == "own" else int(x) for x in args.lengths.split(",")]:
            compared = []
            for gpus in counts:
                compared.append(apart(args, preset, length, gpus))
                print(json.dumps(compared[-1], ensure_ascii=False), flush=True)
            results += compared
            if len(compared) > 1:
                print(scaling(compared), flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(results, indent=1, ensure_ascii=False))
        shape = args.shape or MODELS[preset]
        if shape in shapes.SHAPES and not args.keep_models:
            shutil.rmtree(shapes.place(args.models, shape, not args.bf16), ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
