"""Who trains a run: a thread of this process, or a child that outlives it. Both are handed the run's lock."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

from kto_core.errors import KTOError
from kto_core.paths import ROOT
from kto_core.plain_text import print_trace
from kto_core.runs import locks, ranks
from kto_core.runs.events import EventLog

if TYPE_CHECKING:
    from kto_core.config.run_config import RunConfig
    from kto_core.runs.run import Run

PATIENCE = 5.0  # seconds a child has to end itself after the second stop
POLL = 0.2
LESS_URGENT = 10  # nice value
TURN = 2e-4  # seconds, not Python's 5e-3: an answer to a page takes the interpreter dozens of times, each after a turn


def in_thread(run: Run, config: RunConfig) -> threading.Thread:
    """Train in a daemon thread of this process."""

    def body() -> None:
        turn = sys.getswitchinterval()
        try:
            _give_way()
            from .train import train

            train(config, run.path)
        except BaseException as e:  # not from the training itself, whose errors are events: say it, never lose it
            print_trace(e)
            with contextlib.suppress(OSError):
                EventLog(run.path / "events.jsonl").status("failed", message=f"Unexpected {type(e).__name__}: {e}")
        finally:
            sys.setswitchinterval(turn)
            locks.release(run.path)

    thread = threading.Thread(target=body, name=f"train-{run.id}", daemon=True)
    thread.start()
    return thread


def _give_way() -> None:
    """The page's answers come between this thread's turns; on a CPU before it and the threads torch starts for it."""
    from kto_core.hardware.gpus import devices

    sys.setswitchinterval(TURN)

    with contextlib.suppress(OSError, AttributeError, KTOError):  # only Linux has priorities of threads
        if sys.platform == "linux" and not devices():
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LESS_URGENT)


def in_process(run: Run, config: RunConfig) -> threading.Thread:
    """Train in a child with a session of its own, watched by a thread that notes how it ended."""
    fd = locks.lend(run.path)
    if config.num_gpus > 1:  # the launcher keeps the lock's file open while its workers train
        launcher = ["accelerate.commands.launch", "--num_processes", str(config.num_gpus), "--num_machines", "1",
                    "--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
                    "-m"]  # fmt: skip
        command = [sys.executable, "-m", *launcher, "kto_core.worker", str(run.path), "--lock-fd", "-1"]
    else:
        command = [sys.executable, "-m", "kto_core.worker", str(run.path), "--lock-fd", str(fd)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with open(run.path / "worker.log", "ab") as log:
        begin = log.tell()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path},
            pass_fds=(fd,),
            start_new_session=True,
        )
    locks.release(run.path)  # our copy of the file; the child has its own

    locks.supervise(run.path)
    thread = threading.Thread(target=_supervise, args=(run, child, begin), name=f"supervise-{run.id}", daemon=True)
    thread.start()
    return thread


def _supervise(run: Run, child: subprocess.Popen, begin: int) -> None:
    """Wait for the child's end; what it says stands in worker.log from byte ``begin``."""
    waited = 0.0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(POLL)
            break
        with contextlib.suppress(OSError):
            waited = waited + POLL if (run.path / "stop").read_text() else 0.0
        if waited > PATIENCE:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # a launcher's processes die with it
    run.note_interrupted(_ending(child.returncode, run, begin))
    locks.supervise_no_more(run.path)


def _ending(code: int, run: Run, begin: int = 0) -> str:
    log = ""
    with contextlib.suppress(OSError), open(run.path / "worker.log", "rb") as file:
        file.seek(begin)
        log = file.read().decode(errors="replace")
    if code > 0 and (killed := ranks.killed_by(log)):
        code = -killed
    if code < 0:
        name = signal.Signals(-code).name
        hint = " The machine probably ran out of memory." if name == "SIGKILL" else ""
        return f"the training process was killed by {name}.{hint}"
    said = ranks.said_last(log)
    return f"the training process ended with code {code} ({said[:300] or 'no message'})."
