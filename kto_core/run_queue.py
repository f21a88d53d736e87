"""Runs that wait for another one. A mark in the folder says since when; a thread of this process waits.

A waiting run holds its lock, so it counts as alive; if this process dies it is interrupted before its first step.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from . import alive
from .events import EventLog

if TYPE_CHECKING:
    from .run import Run

MARK = "waiting"
LOOK = 0.3  # seconds between two looks


def since(run_dir: Path) -> int | None:
    """When the run began to wait (ns since the epoch), or None if it does not wait."""
    try:
        return int((run_dir / MARK).read_text())
    except (OSError, ValueError):
        return None


def leave(run_dir: Path) -> None:
    (run_dir / MARK).unlink(missing_ok=True)


def begin_later(run: Run, blocker: Callable[[], str], begin: Callable[[], threading.Thread]) -> threading.Thread:
    """Call ``begin()`` as soon as ``blocker()`` is empty; a stop takes the run out of the queue.

    Args:
        blocker: a sentence about what has to end first, or "".
        begin: starts the training, which then owns the run's lock.

    Raises:
        OSError: the folder cannot be written.
    """
    events = EventLog(run.path / "events.jsonl")
    part = run.path / (MARK + ".part")
    part.write_text(str(time.time_ns()))
    os.replace(part, run.path / MARK)

    def give_up(state: str, message: str) -> None:
        with contextlib.suppress(OSError):
            leave(run.path)
            (run.path / "stop").unlink(missing_ok=True)
            events.status(state, message=message)
        alive.release(run.path)

    def body() -> None:
        said = None
        try:
            while sentence := blocker():
                if (run.path / "stop").exists():
                    give_up("stopped", "Taken out of the queue before it began.")
                    return
                if sentence != said:
                    said = sentence
                    events.status("preparing", message=f"Waiting: {sentence}")
                threading.Event().wait(LOOK)
            leave(run.path)
            training = begin()
        except BaseException as e:
            traceback.print_exc()
            give_up("failed", f"It could not be started: {e}")
            return
        training.join()

    thread = threading.Thread(target=body, name=f"queue-{run.id}", daemon=True)
    thread.start()
    return thread
