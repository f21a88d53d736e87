"""Many runs and a long one: ``python benchmarks/scale.py [--runs N] [--steps N] [--seconds S] [--checkout FOLDER]``.

Makes the runs (finished ones, 20 logged steps and an adapter each), then measures, each in a process of its own: `runs
list`, for the first time and again; the seconds from opening the page to the newest run's head in it, and the processor
time that the app takes while one page stays open, with one run and with all of them; and the state of a run of many
steps, with the memory that it takes. Prints JSON. ``--checkout`` measures another version. Needs Debian's chromium.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

STATE = """
import json, re, sys, time
try:
    from kto_core.runs.run import Run
except ImportError:  # an earlier version
    from kto_core.run import Run
def used():  # the most so far, in MiB
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
one, before = Run(sys.argv[1]), used()
took = []
for _ in range(2):
    began, worked = time.perf_counter(), time.process_time()
    state = one.state()
    took.append([round(time.perf_counter() - began, 4), round(time.process_time() - worked, 4)])
print(json.dumps({"step": state.step, "seconds": took[0][0], "cpu_seconds": took[0][1], "again_seconds": took[1][0],
                  "mib": round(used() - before, 1)}))
"""


def rows(steps: int, seed: int = 1) -> str:
    """Events of a run that has finished so many steps: TRL's names, numbers of the usual lengths."""
    draw, t = random.Random(seed), 1.7e9
    begun = {"state": "training", "total_steps": steps, "message": f"Training: {steps:,} steps."}
    lines = [{"t": t, "kind": "status", **begun}]
    names = ("loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/margins",
             "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "kl")  # fmt: skip
    for step in range(1, steps + 1):
        t = round(t + 0.31, 3)
        values = {name: draw.random() for name in names}
        values |= {"epoch": round(step / 1000, 4), "num_tokens": 1000 * step, "tokens_per_second": 812.11, "eta": 99.5}
        lines.append({"t": t, "kind": "metric", "step": step, **values})
    lines.append({"t": t, "kind": "status", "state": "finished", "message": f"Finished: {steps:,} steps."})
    return "".join(json.dumps(line) + "\n" for line in lines)


def make(folder: Path, count: int, steps: int = 20) -> list[Path]:
    """So many finished runs with an adapter each in a runs folder; the last one is the newest."""
    from kto_core.config import resolving

    folder.mkdir(parents=True)
    settings, events = folder / "settings.yaml", rows(steps)
    resolving.save_config(resolving.resolve("demo", {"data": "rows.jsonl"}), settings)
    text, made = settings.read_text(encoding="utf-8"), []
    settings.unlink()
    for i in range(count):
        run = folder / f"20260101-{i:06d}-demo-{i:04x}"
        (run / "adapter").mkdir(parents=True)
        (run / "adapter" / "manifest.json").write_text('{"files": {}}')
        (run / "events.jsonl").write_text(events)
        (run / "config.yaml").write_text(text)
        os.utime(run / "config.yaml", (1.7e9 + i, 1.7e9 + i))
        made.append(run)
    return made


def timed(command: list[str], checkout: Path, runs: Path) -> tuple[str, dict]:
    """A process's output; its seconds, and those of the processor."""
    import resource

    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=checkout, env=os.environ | {"KTO_STUDIO_RUNS": str(runs)}, check=True,
                          stdout=subprocess.PIPE, text=True)  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, {"seconds": round(time.perf_counter() - began, 2), "cpu_seconds": round(cpu, 2)}


def listed(checkout: Path, runs: Path) -> dict:
    """`runs list --json`, for the first time and again."""
    command = [sys.executable, "-m", "kto_core", "runs", "list", "--json"]
    (_, first), (said, again) = (timed(command, checkout, runs) for _ in range(2))
    return {"first": first, "again": again, "runs": len(json.loads(said)["runs"])}


def page(checkout: Path, home: Path, newest: str, seconds: float) -> dict:
    """The app with one open page: seconds until the newest run is shown, and the app's share of one core after it."""
    import psutil

    from tests.support import browser

    env = {"KTO_STUDIO_RUNS": str(home / "runs"), "KTO_STUDIO_DATA": str(home / "data"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(checkout / "app.py"), "--port", str(browser.free_port())]
    with browser.started(command, home, env) as (url, _), browser.chromium() as chromium:
        app = next(p for p in psutil.Process().children() if str(checkout / "app.py") in p.cmdline())
        began = time.perf_counter()
        with browser.page_of(chromium, url) as shown:
            browser.tab(shown, "Train")
            head = f"document.querySelector('#train-head')?.textContent.includes('{newest}')"
            shown.wait_for_function(head, timeout=300_000)
            there = time.perf_counter() - began
            time.sleep(15)  # what was read once is over
            before, start = sum(app.cpu_times()[:2]), time.perf_counter()
            time.sleep(seconds)
            share = (sum(app.cpu_times()[:2]) - before) / (time.perf_counter() - start)
            memory = app.memory_info().rss / 2**20
    return {"shown_after_seconds": round(there, 2), "core_share": round(share, 3), "mib": round(memory)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5000, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200_000, metavar="N", help="of the long run (default: 200,000)")
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="an open page (default: %(default)s)")
    parser.add_argument("--checkout", type=Path, default=ROOT, metavar="FOLDER", help="the version to measure")
    parser.add_argument("--no-page", action="store_true", help="without app and browser")
    args = parser.parse_args(argv)
    checkout = args.checkout.resolve()
    found = {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: version(name) for name in ("gradio", "torch", "pyyaml")},
        "runs": args.runs,
    }
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for name, count in (("one", 1), ("many", args.runs)):
            made = make(home / name / "runs", count)
            found[name] = {"list": listed(checkout, home / name / "runs")}
            if not args.no_page:
                with contextlib.suppress(FileNotFoundError):
                    (home / name / "runs" / ".runs.json").unlink()  # as if nobody had looked yet
                found[name]["first page"] = page(checkout, home / name, made[-1].name, args.seconds)
                listed(checkout, home / name / "runs")  # reads to the end what the page had no time for
                found[name]["page again"] = page(checkout, home / name, made[-1].name, args.seconds)
        (long,) = make(home / "long" / "runs", 1, args.steps)
        size = (long / "events.jsonl").stat().st_size
        said, _ = timed([sys.executable, "-c", STATE, str(long)], checkout, home / "long" / "runs")
        found["long"] = {"megabytes": round(size / 1e6, 1), "state": json.loads(said)}
        if not args.no_page:
            found["long"]["page"] = page(checkout, home / "long", long.name, args.seconds)
        shutil.rmtree(home / "many")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
