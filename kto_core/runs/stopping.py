"""The stop file of a run: asked once, finish the step and save; asked twice, end now. Standard library only."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from kto_core.errors import KTOError

from .events import EventLog

AT_ONCE = "Stopped immediately. The last checkpoint is the latest saved state."
STOP_NOW = "now"  # content of the stop file when nobody wants to wait any more


class StopNow(KTOError):
    """Stopped for the second time: end without saving."""


class Stopped(KTOError):
    """Stopped before the first step."""


class StopWatch:
    """Watches the run's stop file in a small thread, so that a request is answered within a moment.

    ``asked`` is set by the first request, ``now`` by the second; then ``on_now`` is called (a child ends itself).
    ``cancel`` is for work whose cancelling all processes of a run agree on.
    """

    def __init__(self, run_dir: Path, events: EventLog, on_now: Callable[[], None] | None = None):
        self.file, self.events, self.on_now = run_dir / "stop", events, on_now
        self.asked, self.now = threading.Event(), threading.Event()
        self.cancel = self.asked
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="stop-watch", daemon=True)

    def __enter__(self) -> StopWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.1) and not self.now.is_set():
            self.look()

    def look(self) -> bool:
        """Read the stop file; True if a stop was asked for."""
        try:
            text = self.file.read_text()
        except OSError:
            return self.asked.is_set()
        with self._lock:
            if not self.asked.is_set():
                self.asked.set()
                with contextlib.suppress(OSError):
                    self.events.status("stopping", message="Finishing this step, then saving.")
            if STOP_NOW in text and not self.now.is_set():
                self.now.set()
                if self.on_now:
                    self.on_now()
        return True

    def check(self) -> None:
        """For the time before the first step: nothing is to be saved yet."""
        if self.look():
            raise Stopped("Stopped before the first step.")


class Follower(StopWatch):
    """For ranks above 0, which never stop by themselves: the main process would wait for them in its next collective.

    ``asked`` is set when all have agreed on it (`callbacks.RunCallback`); `ranks.end_with_main` ends who waits.
    """

    def __init__(self, run_dir: Path, events: EventLog):
        super().__init__(run_dir, events)
        self.cancel = threading.Event()

    def look(self) -> bool:
        if self.file.exists():
            self.cancel.set()
        return self.asked.is_set()


def end_process() -> None:
    """End this process at once, with nothing flushed but what is written: the answer to a second stop."""
    os._exit(130)
