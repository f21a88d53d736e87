"""Every preset on a card of 24 GiB: does it train, at what speed, and was its memory foretold?

``python benchmarks/presets.py --data FILE [--presets 3b,7b,13b] [--lengths 512,1024,2048] [--json OUT]`` trains each
preset at its own batch, length and LoRA for ``--steps`` optimizer steps, on a model of the real shape with random
weights (`shapes.py`), loaded in NF4 through the product's own path, in a process of its own whose share of the card is
capped at ``--cap-gib`` (KTO_STUDIO_GPU_GIB). It prints the predicted peak beside
``torch.cuda.max_memory_reserved`` plus the CUDA context.
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
        from kto_core.unsloth_model import import_first

        import_first()
    import shapes
    import torch

    from kto_core import config, events, hardware, model, train, train_data

    os.environ[hardware.LIMIT] = str(args.cap_gib)  # also for the child in which Unsloth trains
    shape = args.shape or MODELS[args.preset]
    name = shape if shape == "demo" else str(shapes.make(shape, Path(args.models) / shape, args.tokenizer))
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
    }
    if args.max_length:
        overrides["max_length"] = args.max_length
    resolved = config.resolve(args.preset, overrides)
    c = resolved.config
    tokenizer = model.load_tokenizer(name)
    planned = train_data.plan_data(c, tokenizer)
    lengths = planned.lengths
    plan = hardware.plan(c, lengths, packed=planned.packed(c))
    out = {
        "preset": args.preset,
        "model": shape,
        "engine": args.engine,
        "max_length": c.max_length,
        "batch": f"{c.per_device_train_batch_size}×{c.gradient_accumulation_steps}",
        "r": c.r,
        "mean_tokens": round(sum(lengths) / len(lengths)),
        "predicted_gib": round(plan.predicted_gib, 2),
        "verdict": plan.verdict,
    }
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    try:
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
    speeds = [m for m in state.metrics if m.get("examples_per_second")]
    for key in ("examples_per_second", "tokens_per_second"):
        values = sorted(m[key] for m in speeds[1:] if m.get(key))  # the first step warms up
        out[key] = round(values[len(values) // 2], 2) if values else None
    out["loss"] = [m["loss"] for m in state.metrics if "loss" in m][:3]
    if torch.cuda.is_available():
        out["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
        out["allocated_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        free, total = torch.cuda.mem_get_info()
        out["context_gib"] = round((total - free) / GIB - torch.cuda.memory_reserved() / GIB, 2)
    return out


def where(run_dir: Path) -> dict:
    """How far a run came that was not waited for: its state, step and last remark."""
    from kto_core import events

    if not (run_dir / "events.jsonl").exists():
        return {"state": "before the run: making or looking at the model and the data"}
    state = events.fold(events.read(run_dir / "events.jsonl")[0])
    return {"state": state.state, "steps": state.step, "log": [x["text"] for x in state.logs][-3:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--presets", default="3b,7b,13b,20b")
    parser.add_argument("--lengths", default="", help="also at these max_length values, comma-separated")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cap-gib", type=float, default=24.0)
    parser.add_argument("--models", default=str(Path(tempfile.gettempdir()) / "kto-shapes"))
    parser.add_argument("--tokenizer", help="folder of a tokenizer; default the demo model's")
    parser.add_argument("--shape", help="another shape than the preset's")
    parser.add_argument("--timeout", type=int, default=400, help="seconds for one preset")
    parser.add_argument("--json", help="write all results here")
    parser.add_argument("--keep-models", action="store_true", help="do not delete a shape after its preset")
    parser.add_argument("--one", dest="preset", help=argparse.SUPPRESS)
    parser.add_argument("--max-length", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--run-dir", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.preset:
        print("RESULT " + json.dumps(one(args)), flush=True)
        return 0
    results = []
    for preset in args.presets.split(","):
        for length in [None, *(int(x) for x in args.lengths.split(",") if x)]:
            command = [
                sys.executable,
                __file__,
                "--one",
                preset,
                "--data",
                args.data,
                "--engine",
                args.engine,
                "--steps",
                str(args.steps),
                "--cap-gib",
                str(args.cap_gib),
                "--models",
                args.models,
            ]
            run_dir = tempfile.mkdtemp(prefix="kto-bench-")
            flags = {"--tokenizer": args.tokenizer, "--shape": args.shape, "--max-length": length, "--run-dir": run_dir}
            for flag, value in flags.items():
                command += [flag, str(value)] if value else []
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
                line = next((x for x in reversed(done.stdout.splitlines()) if x.startswith("RESULT ")), None)
                tail = (done.stderr or done.stdout)[-1500:]
                result = json.loads(line[7:]) if line else {"preset": preset, "error": tail}
            except subprocess.TimeoutExpired:
                result = {"preset": preset, "max_length": length, "error": f"not done in {args.timeout} s"}
                result |= where(Path(run_dir))
            shutil.rmtree(run_dir, ignore_errors=True)
            print(json.dumps(result, ensure_ascii=False), flush=True)
            results.append(result)
            if args.json:
                Path(args.json).write_text(json.dumps(results, indent=1, ensure_ascii=False))
        if not args.keep_models:
            shutil.rmtree(Path(args.models) / (args.shape or MODELS[preset]), ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
