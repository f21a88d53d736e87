"""Processes of one run on several GPUs: the main one (rank 0) tells the story, the others end when it has ended.

A launcher (torchrun) starts every process in a session of its own, and only the launcher and rank 0 are known to the
run's folder. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

from .events import read

PR_SET_PDEATHSIG = 1
TERMINAL = ("finished", "stopped", "failed")
PATIENCE = 5.0  # seconds in which a process ends by itself after the main one has said how the run ended
ERROR = re.compile(r"(?:\[rank\d+\]: *)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)): ?(.*)")


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
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died in between
        os._exit(1)


def end_with_main(run_dir: Path) -> None:
    """Ranks above 0: end this process when the main one has said how the run ended, whatever this one waits for.

    Processes see a stop at different moments, and one that waits in a collective for one that has left waits forever.
    """
    threading.Thread(
        target=_follow, args=(run_dir / "events.jsonl", time.time()), name="main-rank", daemon=True
    ).start()


def _follow(path: Path, began: float) -> None:
    offset, ended = path.stat().st_size if path.exists() else 0, None
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
    part = path.with_name(path.name + ".part")
    part.write_text(message, encoding="utf-8")
    os.replace(part, path)


def forget_errors(run_dir: Path) -> None:
    for path in run_dir.glob("rank-*.error"):
        path.unlink(missing_ok=True)


def first_error(run_dir: Path) -> str:
    """What went wrong first in another rank: the lost connection that the main one complains of comes of that."""
    try:
        found = sorted(run_dir.glob("rank-*.error"), key=lambda p: p.stat().st_mtime)
        return found[0].read_text(encoding="utf-8").strip() if found else ""
    except OSError:
        return ""


def said_last(log: str) -> str:
    """The last error of a log, else its last line; the launcher's own report of a failed process is neither."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in reversed(lines):
        found = ERROR.match(line)
        if found and not found[1].endswith(("ChildFailedError", "SignalException")):
            return line
    lines = [line for line in lines if not set(line) <= {"=", "-"}]
    return lines[-1] if lines else ""
