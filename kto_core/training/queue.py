"""Runs that wait for another one. A mark in the folder says since when; a thread of this process waits.

A waiting run holds its lock, so it counts as alive; if this process dies it is interrupted before its first step.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from kto_core.files import write_whole
from kto_core.plain_text import print_trace
from kto_core.runs import locks
from kto_core.runs.events import WAITING, EventLog
from kto_core.runs.run import MARK, Run, stop_waiting

LOOK = 0.3  # seconds between two looks


def begin_later(run: Run, blocker: Callable[[], str], begin: Callable[[], threading.Thread]) -> threading.Thread:
    """Call ``begin()`` as soon as ``blocker()`` is empty; a stop takes the run out of the queue.

    Args:
        blocker: a sentence about what has to end first, or "".
        begin: starts the training, which then owns the run's lock.

    Raises:
        OSError: the folder cannot be written.
    """
    events = EventLog(run.path / "events.jsonl")
    write_whole(run.path / MARK, str(time.time_ns()))

    def give_up(state: str, message: str) -> None:
        with contextlib.suppress(OSError):
            stop_waiting(run.path)
            (run.path / "stop").unlink(missing_ok=True)
            events.status(state, message=message)
        locks.release(run.path)

    def body() -> None:
        said = None
        try:
            while sentence := blocker():
                if (run.path / "stop").exists():
                    give_up("stopped", "Removed from the queue before it started.")
                    return
                if sentence != said:
                    said = sentence
                    events.status("preparing", message=WAITING + sentence)
                threading.Event().wait(LOOK)
            stop_waiting(run.path)
            training = begin()
        except BaseException as e:
            print_trace(e)
            give_up("failed", f"The run could not start: {e}")
            return
        training.join()

    thread = threading.Thread(target=body, name=f"queue-{run.id}", daemon=True)
    thread.start()
    return thread
