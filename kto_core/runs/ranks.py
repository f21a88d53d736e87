"""Processes of one run on several GPUs: the main one (rank 0) tells the story, the others end when it has ended.

A process that waits in NCCL for one that is gone waits for good, and hears nothing: so each looks after the others.

A launcher (torchrun) starts every process in a session of its own, and only the launcher and rank 0 are known to the
run's folder.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from kto_core.errors import KTOError
from kto_core.files import write_whole
from kto_core.guards import bounded

from .events import read

PR_SET_PDEATHSIG = 1
TERMINAL = ("finished", "stopped", "failed")
PATIENCE = 5.0  # seconds in which a process ends by itself after the main one has said how the run ended
ERROR = re.compile(r"(?:\[rank\d+\]: *)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)): ?(.*)")
WORKER = b"kto_core.worker"  # a word of the launcher's command line
LOST = ("closed by peer", "reset by peer", "remote process exited", "remote worker crashing",
        "Connection was likely closed", "Broken pipe", "Timed out waiting")  # fmt: skip


class LostError(KTOError):
    """Another process of the run is gone, or does not answer: what happened there is the story, not this."""


def lost(e: BaseException) -> bool:
    """Whether an error of this process only says that another one is gone."""
    return several() and isinstance(e, RuntimeError) and any(words in str(e) for words in LOST)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def several() -> bool:
    return world() > 1


def die_with_launcher() -> None:
    """Be killed when the launcher is: nobody else knows of this process, and the run's lock is free then (Linux)."""
    if not several() or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # when its main thread ends, in which it starts us
    try:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:
        parent = []
    if WORKER not in parent:  # it died before that; who adopted us would never end us
        os._exit(1)


def end_process(code: int) -> NoReturn:
    """End this process without its libraries' destructors: NCCL's may wait for processes that are gone."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def end_with_main(run_dir: Path) -> None:
    """Ranks above 0: end this process when the main one has said how the run ended, whatever this one waits for.

    Processes see a stop at different moments, and one that waits in a collective for one that has left waits forever.
    """
    threading.Thread(target=_follow, args=(run_dir / "events.jsonl", launched()), name="main-rank", daemon=True).start()


def end_with_others(run_dir: Path) -> None:
    """Rank 0: end this process when another has said why it ended, and this one cannot see it.

    The launcher would end it half a minute later. Who reads the run tells the other's error.
    """
    if several():
        began = launched()
        threading.Thread(target=_wait_for_error, args=(run_dir, began), name="other-ranks", daemon=True).start()


def _wait_for_error(run_dir: Path, began: float) -> None:
    while not first_error(run_dir, began):  # older ones are of another start
        time.sleep(0.5)
    time.sleep(2 * PATIENCE)  # in which it ends by itself, or ends what it writes
    os._exit(1)


def launched() -> float:
    """When this process's launcher began, in unix seconds: what the run said before is of another start."""
    import psutil

    with contextlib.suppress(psutil.Error):
        return float(psutil.Process(os.getppid()).create_time())
    return time.time()


def _follow(path: Path, began: float) -> None:
    offset, ended = 0, None  # from the beginning: a slow process may look for the first time when all is over
    while True:
        found, offset = read(path, offset)
        for e in found:
            if e["kind"] == "status":
                ended = e["t"] if e["state"] in TERMINAL and e["t"] >= began else None
        if ended is not None and time.time() - ended > PATIENCE:
            os._exit(0)
        time.sleep(0.5)


# ---- errors ----------------------------------------------------------------------------------------------------------


def note_error(run_dir: Path, message: str) -> None:
    """Keep what went wrong in this rank for whoever says how the run ended."""
    path = run_dir / f"rank-{rank()}.error"
    with contextlib.suppress(OSError):  # a full disk has no room for its own message
        write_whole(path, message)


def forget_errors(run_dir: Path) -> None:
    """Before a start: what an earlier one left says nothing about it."""
    for path in run_dir.glob("rank-*.error"):
        path.unlink(missing_ok=True)


def first_error(run_dir: Path, since: float = 0.0) -> str:
    """What went wrong first in another rank (since then, unix seconds): the lost connection that the main one complains
    of comes of that."""
    try:
        times = {p: p.stat().st_mtime for p in run_dir.glob("rank-*.error")}
        found = [p for p in sorted(times, key=times.__getitem__) if times[p] >= since]
        return bounded.read_text(found[0]).strip() if found else ""
    except (OSError, bounded.Unreadable):
        return ""


def killed_by(log: str) -> int:
    """The signal that ended a process, from the launcher's report of the failed ones; 0 if none did."""
    report = log[log.rfind("ChildFailedError") :] if "ChildFailedError" in log else ""
    found = re.search(r"exitcode *: -(\d+) ", report)
    return int(found[1]) if found else 0


def said_last(log: str) -> str:
    """The last error of a log, else its last line; the launcher's own report of a failed process is neither."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in reversed(lines):
        found = ERROR.match(line)
        if found and not found[1].endswith(("ChildFailedError", "SignalException")):
            return line
    lines = [line for line in lines if not set(line) <= {"=", "-"}]
    return lines[-1] if lines else ""
