"""Which learning rate does KTO with LoRA want? A sweep that can be stopped at any moment and goes on where it was.

``python benchmarks/learning.py sweep --inputs INPUTS --work WORK [--workers N] [--seconds S]`` trains what
``INPUTS/settings.json`` lists (made by `learning_inputs.py`), each training a line of ``WORK/results.jsonl``. Several
workers share the GPU and one list, ordered by worth: one seed of every setting's curve over the rates, then the other
seeds, then one change at a time at four rates around the best. `learning_report.py` makes tables and pictures of it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from learning_plan import Job, stages

FAILURES = 2  # of a job, after which it is left out


# ---- the folder ------------------------------------------------------------------------------------------------------


class Lines:
    """A file that grows by a record a line, read as far as it goes. A line that was cut off is no record."""

    def __init__(self, file: Path):
        self.file, self.at, self.records = file, 0, []

    def read(self) -> list[dict]:
        with contextlib.suppress(FileNotFoundError), open(self.file, "rb") as f:
            f.seek(self.at)
            whole = f.read()
            whole = whole[: whole.rfind(b"\n") + 1]
            self.at += len(whole)
            for line in whole.splitlines():
                with contextlib.suppress(ValueError):
                    self.records.append(json.loads(line))
        return self.records

    def by_id(self) -> dict[str, dict]:
        """The first record of each id."""
        found: dict[str, dict] = {}
        for record in self.read():
            found.setdefault(record["id"], record)
        return found


def read(file: Path) -> dict[str, dict]:
    """id -> result."""
    return Lines(file).by_id()


def append(file: Path, record: dict) -> None:
    """Add a whole line, after whatever a killed process left of its own."""
    with open(file, "a+b") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        torn = b""
        if f.seek(0, os.SEEK_END):
            f.seek(-1, os.SEEK_END)
            torn = b"" if f.read(1) == b"\n" else b"\n"
        f.write(torn + json.dumps(record).encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())


@contextlib.contextmanager
def claimed(work: Path, job: Job):
    """Whether this process has the job for itself; the claim falls with the process."""
    folder = work / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / job.id.replace("/", "_"), "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


# ---- a worker --------------------------------------------------------------------------------------------------------


class Worker:
    """Takes jobs until none is left or the time is over."""

    def __init__(self, inputs: Path, work: Path, number: int, until: float):
        self.inputs, self.work, self.number, self.until = inputs, work, number, until
        self.listed = json.loads((inputs / "settings.json").read_text())
        self.results, self.errors = Lines(work / "results.jsonl"), Lines(work / "errors.jsonl")
        self.models: dict = {}  # (model, r, alpha) -> Model
        self.data: dict = {}  # setting -> Data and HeldOut, which is the base model's and so the same for every r
        self.tokenizers: dict = {}
        self.step_seconds: dict[tuple, float] = {}
        self.setting = ""

    def jobs(self) -> list[list[Job]]:
        """What is left, stage by stage, the setting at hand first; each worker begins with another one."""
        done, failed = self.results.by_id(), Counter(r["id"] for r in self.errors.read())
        names = list(self.listed["settings"])
        turned = {s: (i - self.number) % len(names) for i, s in enumerate(names)}
        left = []
        for _, jobs in stages(self.listed["settings"], done, self.listed.get("plan")):
            jobs = [j for j in jobs if j.id not in done and failed[j.id] < FAILURES]
            if jobs:
                left.append(sorted(jobs, key=lambda j: (j.setting != self.setting, turned[j.setting])))
        return left

    def enough_time(self, job: Job) -> bool:
        facts, left = self.listed["settings"][job.setting], self.until - time.monotonic()
        rows = min(job.rows or facts["rows"], facts["rows"])
        steps = job.max_steps if job.max_steps > 0 else job.epochs * rows / job.batch
        known = self.step_seconds.get((job.setting, job.batch))
        return left > 0 and (known is None or left > 1.2 * steps * known + 3)

    def work_off(self) -> None:
        while time.monotonic() < self.until:
            stages_left = self.jobs()
            if not stages_left:
                return
            if not any(self.take(job) for jobs in stages_left for job in jobs if self.enough_time(job)):
                time.sleep(0.5)  # the others have what is left, and may make room for more

    def take(self, job: Job) -> bool:
        """Whether the job was run, here and now."""
        with claimed(self.work, job) as mine:
            if not mine or job.id in self.results.by_id():
                return False
            if time.monotonic() > self.until:
                return False
            self.setting, started = job.setting, time.perf_counter()
            try:
                record, gains = self.train(job)
            except Exception as e:
                self.clear()
                append(self.errors.file, {"id": job.id, "error": repr(e), "trace": traceback.format_exc()})
                return True
            facts = self.listed["settings"][job.setting]
            whole = {"id": job.id, **asdict(job), "model": facts["model"], "data": facts["data"], **record}
            append(self.work / "rows.jsonl", {"id": job.id, "gain": gains})
            append(self.results.file, whole)
            self.step_seconds[job.setting, job.batch] = (time.perf_counter() - started) / record["steps"]
            return True

    def train(self, job: Job) -> tuple[dict, list]:
        from learning_held import HeldOut
        from learning_model import Data, Model
        from learning_run import run
        from transformers import AutoTokenizer

        model = self.listed["settings"][job.setting]["model"]
        facts, key = self.listed["models"][model], (model, job.r, job.alpha)
        folder, defaults = self.inputs / facts["folder"], self.listed["defaults"]
        if key not in self.models:
            self.models[key] = Model(folder, facts["dtype"], job.r, job.alpha, defaults, self.work / "cache")
        if job.setting not in self.data:
            data = Data.load(self.inputs / f"{job.setting}.npz")
            self.data[job.setting] = data, HeldOut(self.models[key], data)
        if folder not in self.tokenizers:
            self.tokenizers[folder] = AutoTokenizer.from_pretrained(folder)
        return run(self.models[key], *self.data[job.setting], job, defaults, self.tokenizers[folder])

    def clear(self) -> None:
        """After an error nothing that was loaded is trusted."""
        import gc

        import torch

        self.models.clear()
        self.data.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def worker(args) -> int:
    import learning_model  # noqa: F401  (it knows where kto_core is)
    import torch

    import kto_core  # noqa: F401  (before the GPU's memory is touched: it chooses the allocator)

    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(0.92 / args.workers)
    Worker(args.inputs, args.work, args.worker, time.monotonic() + args.seconds).work_off()
    return 0


# ---- all workers -----------------------------------------------------------------------------------------------------


def sweep(args) -> int:
    """Start the workers, say how far they are, end them in time. 1: nothing was done and something is left."""
    args.work.mkdir(parents=True, exist_ok=True)
    started, until = time.monotonic(), time.monotonic() + args.seconds
    threads = str(max(1, (os.cpu_count() or 1) // args.workers))
    env = os.environ | {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    before, workers = len(read(args.work / "results.jsonl")), []
    for n in range(args.workers):
        with open(args.work / f"worker-{n}.log", "ab") as log:
            command = [sys.executable, str(Path(__file__).resolve()), "worker", "--worker", str(n)]
            command += ["--inputs", str(args.inputs), "--work", str(args.work), "--workers", str(args.workers)]
            command += ["--seconds", str(until - time.monotonic())]
            workers.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
    told = started
    try:
        while any(w.poll() is None for w in workers) and time.monotonic() < until + args.grace:
            time.sleep(0.2)
            if time.monotonic() - told > 30:
                told = time.monotonic()
                print(progress(args, started, before), flush=True)
    finally:
        for w in workers:
            if w.poll() is None:
                w.kill()
                w.wait()
    print(progress(args, started, before), flush=True)
    for n, w in enumerate(workers):
        if w.returncode not in (0, -signal.SIGKILL):
            print(f"worker {n} ended with {w.returncode}: {(args.work / f'worker-{n}.log').read_text()[-500:]}")
    done = read(args.work / "results.jsonl")
    return 0 if len(done) > before or not any(len(j) for _, j in left(args.inputs, done)) else 1


def left(inputs: Path, done: dict) -> list[tuple[str, list[Job]]]:
    listed = json.loads((inputs / "settings.json").read_text())
    all_stages = stages(listed["settings"], done, listed.get("plan"))
    return [(name, [j for j in jobs if j.id not in done]) for name, jobs in all_stages]


def progress(args, started: float, before: int) -> str:
    """One line: how many are done, how fast, and what is being done."""
    done = read(args.work / "results.jsonl")
    seconds, new = time.monotonic() - started, len(done) - before
    at = next((f"{name}: {len(jobs)} left" for name, jobs in left(args.inputs, done) if jobs), "all done")
    failed = len(read(args.work / "errors.jsonl"))
    recent = list(done.values())[-20:]
    step = sum(r["step_seconds"] for r in recent) / max(1, len(recent))
    return (
        f"{seconds:.0f} s: {len(done)} trainings ({new} new, {60 * new / max(seconds, 1):.1f} a minute, "
        f"{1000 * step:.0f} ms a step), {failed} failed; {at}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("sweep", "worker", "list"):
        p = verbs.add_parser(verb)
        p.add_argument("--inputs", type=Path, required=True, help="folder of learning_inputs.py")
        p.add_argument("--work", type=Path, required=True, help="folder of results and of the reference's scores")
        p.add_argument("--workers", type=int, default=1, help="processes that share the GPU (default: %(default)s)")
        p.add_argument("--seconds", type=float, default=1e9, help="begin no training after so long")
        p.add_argument("--grace", type=float, default=5, help="seconds after which a late training is ended")
        p.add_argument("--worker", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.inputs, args.work = args.inputs.resolve(), args.work.resolve()
    if args.verb == "list":
        for name, jobs in left(args.inputs, read(args.work / "results.jsonl")):
            print(f"{name}: {len(jobs)} left")
        return 0
    return worker(args) if args.verb == "worker" else sweep(args)


if __name__ == "__main__":
    sys.exit(main())
