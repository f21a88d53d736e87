"""Does the demo teach its habit? ``python benchmarks/demo_proof.py [--seeds 3407,1,2] [--threads N] [--set beta=0.1]``.

Runs `kto_core.demo.run_demo` once a seed, each in a process of its own whose cache has the demo model but no reference
log-probs, and prints a table. CPU seconds are the process's own, user and system: on a machine that is shared they say
more than the clock does. What it writes with ``--json`` has every number, the date, the machine and the versions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MARK = "RESULT "
PACKAGES = ("torch", "transformers", "trl", "peft")


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="3407,1,2", help="comma-separated (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--json", metavar="OUT", help="also write everything to this file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a setting other than the preset's; repeatable",
    )
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        args.seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error("--seeds takes whole numbers, separated by commas")
    return args


def worker(seed: int, overrides: dict) -> dict:
    """One demo in this process."""
    from kto_core import demo

    trained: list[float] = []

    def progress(share, text: str) -> None:
        if share is not None and share >= demo.TRAINED and not trained:
            trained.append(time.process_time())
        print(f"{share or 0:.0%} {text}", file=sys.stderr, flush=True)

    before = time.process_time()
    result = demo.run_demo(seed, progress=progress, overrides=overrides)
    return result | {
        "training_cpu_seconds": round(trained[0] - before, 1),
        "cpu_seconds": round(time.process_time() - before, 1),
    }


def measure(seed: int, threads: int, given: list[str]) -> dict:
    """One demo in a fresh process with an empty reference cache."""
    from kto_core.models.demo_model import demo_model_dir
    from kto_core.paths import cache_dir

    made = cache_dir() / demo_model_dir().relative_to(cache_dir()).parts[0]
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        cache.mkdir()
        (cache / made.name).symlink_to(made, target_is_directory=True)
        env = os.environ | {
            "KTO_STUDIO_CACHE": str(cache),
            "KTO_STUDIO_RUNS": str(Path(folder) / "runs"),
            "OMP_NUM_THREADS": str(threads),
        }
        done = subprocess.run(
            [sys.executable, __file__, "--worker", str(seed), *(f"--set={g}" for g in given)],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not found:
        raise SystemExit(f"Seed {seed} failed; what it said is above.")
    return json.loads(found[-1].removeprefix(MARK))


def machine() -> dict:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def table(results: list[dict]) -> str:
    lines = [
        "| seed | words an answer | short answers | right answers | margin | AUC | KL | steps "
        "| training s (CPU s) | demo s (CPU s) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        before, after = r["habit"]["before"], r["habit"]["after"]
        lines.append(
            f"| {r['seed']} | {before['words']:.1f} → {after['words']:.1f} "
            f"| {before['short_share']:.0%} → {after['short_share']:.0%} "
            f"| {before['right_share']:.0%} → {after['right_share']:.0%} "
            f"| {r['margin']:+.2f} | {r['auc']:.3f} | {r['kl']:.2f} | {r['steps']} "
            f"| {r['training_seconds']:.0f} ({r['training_cpu_seconds']:.0f}) "
            f"| {r['seconds']:.0f} ({r['cpu_seconds']:.0f}) |"
        )
    return "\n".join(lines)


def main(argv=None) -> int:
    args = arguments(argv)
    if args.worker is not None:
        print(MARK + json.dumps(worker(args.worker, dict(g.split("=", 1) for g in args.set))), flush=True)
        return 0
    facts, results = machine(), []
    for seed in args.seeds:
        results.append(measure(seed, args.threads, args.set))
        print(table(results[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        if args.json:  # after each seed, so that an interrupted proof keeps what it has
            part = Path(args.json + ".part")
            part.write_text(json.dumps({**facts, "threads": args.threads, "results": results}, indent=1))
            os.replace(part, args.json)
    words = {k: statistics.mean(r["habit"][k]["words"] for r in results) for k in ("before", "after")}
    print(f"{facts['date']}, {facts['cpu']}, {facts['cores']} cores, {args.threads} threads; ", end="")
    print(", ".join(f"{name} {number}" for name, number in facts["versions"].items()) + "\n")
    print(table(results))
    print(f"\nMean words: {words['before']:.1f} → {words['after']:.1f} ({words['after'] / words['before'] - 1:+.0%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
