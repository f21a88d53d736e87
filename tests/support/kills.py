"""Trainings that are killed at a named moment. Run as a script it is a server that forks one training a request.

The moment is seen by an audit hook in the child (files it opens, renames, deletes), so the product has no test code.
"""

import atexit
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# name -> (audit event, pattern of a path among its arguments, which occurrence, seconds later)
MOMENTS = {
    "reading the data": ("open", r"rows\.jsonl$", 1, 0),
    "planning is written": ("os.rename", r"dataset\.json\.part$", 1, 0),
    "loading the model": ("open", r"generation_config\.json$", 1, 0),
    "in a step": ("metric", "", 2, 0.004),
    "a metric was written": ("metric", "", 3, 0),
    "a checkpoint's adapter": ("open", r"saving\.part/checkpoint-\d+/adapter_config\.json$", 1, 0),
    "a checkpoint's state": ("open", r"saving\.part/checkpoint-\d+/trainer_state\.json$", 1, 0),
    "a checkpoint's manifest": ("os.rename", r"saving\.part/checkpoint-\d+/manifest\.json\.part$", 1, 0),
    "a checkpoint is sealed": ("os.rename", r"saving\.part/checkpoint-\d+$", 1, 0),
    "an old checkpoint is deleted": ("shutil.rmtree", r"checkpoints/checkpoint-\d+$", 1, 0),
    "the adapter is written": ("open", r"adapter\.part/adapter_config\.json$", 1, 0),
    "the adapter's manifest": ("os.rename", r"adapter\.part/manifest\.json\.part$", 1, 0),
    "the adapter is moved away": ("os.rename", r"/adapter$", 1, 0),
    "the adapter is put": ("os.rename", r"adapter\.part$", 1, 0),
    "the old adapter is deleted": ("shutil.rmtree", r"adapter\.old$", 1, 0),
}


def arm(moment: str, action: str = "kill", run_dir: str = "") -> None:
    """Kill this process (or ask the run to stop) at the moment."""
    event, pattern, nth, later = (MOMENTS | {"the fifth metric": ("metric", "", 5, 0)})[moment]
    seen = 0

    def act() -> None:
        if action == "stop":
            (Path(run_dir) / "stop").touch()
            return
        time.sleep(later)
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(name, arguments):
        nonlocal seen
        if name != event or seen >= nth:
            return
        # only the first path counts: what is opened, moved or deleted
        if re.search(pattern, os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""):
            seen += 1
            if seen == nth:
                act()

    if event != "metric":
        sys.addaudithook(hook)
        return

    from kto_core.runs.events import EventLog

    write = EventLog.append

    def append(self, kind, **fields):
        nonlocal seen
        out = write(self, kind, **fields)
        seen += kind == "metric" and "loss" in fields
        if kind == "metric" and seen == nth:
            seen += 1
            threading.Thread(target=act, daemon=True).start() if later else act()
        return out

    EventLog.append = append


def trainer_pid(run) -> int:
    """The process that `start.start` began for a run (it has its folder in the command line), or 0."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and folder.name != str(os.getpid()):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"kto_core.worker" in words and str(run.path).encode() in words:
                return int(folder.name)
    return 0


class Trainings:
    """A process with the libraries imported, which forks a child for each training: a kill costs a second, not ten."""

    def __init__(self):
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def run(self, run_dir, moment: str | None = None, action: str = "kill") -> int:
        """Train to the end or the moment; the child's return code (-9: killed)."""
        self.server.stdin.write(json.dumps([str(run_dir), moment, action, dict(os.environ)]) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def close(self) -> None:
        self.server.kill()  # its child, if there is one, ends by itself
        self.server.communicate()


@functools.cache
def trainings() -> Trainings:
    """One server for all tests of a session."""
    server = Trainings()
    atexit.register(server.close)
    return server


def serve() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import trl.trainer.kto_trainer  # noqa: F401

    from kto_core.config.resolving import load_config
    from kto_core.training.train import train

    for line in sys.stdin:
        run_dir, moment, action, environment = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.environ.update(environment)
                if moment:
                    arm(moment, action, run_dir)
                train(load_config(Path(run_dir) / "config.yaml").config, Path(run_dir), end_on_second_stop=True)
                code = 0
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(code, file=out, flush=True)


if __name__ == "__main__":
    serve()
