"""Long jobs in background threads (merge, GGUF, upload, model conversion): progress, cancel, result.

A job takes ``progress(fraction | None, text)`` and ``cancel: threading.Event``; it raises `Cancelled` when it sees the
event. Jobs live in this process only: what must survive a restart is in files.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from .errors import Cancelled, KTOError
from .plain_text import print_trace

TELLING = 0.05  # of a job: what remains is told from here on
STOPPED = "Stopped."
Progress = Callable[[float | None, str], None]


def no_progress(fraction: float | None, text: str) -> None:
    """For callers that do not show progress."""


def part_of(progress: Progress, start: float, end: float) -> Progress:
    """``progress`` for a part of the work, from ``start`` to ``end`` of the whole."""
    return lambda fraction, text: progress(None if fraction is None else start + (end - start) * fraction, text)


def named(what: str, progress: Progress) -> Progress:
    """``progress`` that says of what the numbers are."""
    return lambda fraction, text: progress(fraction, f"{what}: {text}")


def check_cancel(cancel: threading.Event | None) -> None:
    if cancel is not None and cancel.is_set():
        raise Cancelled(STOPPED)


Result = TypeVar("Result")


@dataclass
class Job(Generic[Result]):
    name: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    state: str = "running"  # running, done, failed, cancelled
    fraction: float | None = None  # 0..1; None: unknown
    text: str = ""
    error: str = ""
    result: Result | None = None
    started: float = field(default_factory=time.time)
    ended: float | None = None
    cancel_event: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        return self.state == "running"

    @property
    def eta(self) -> float | None:
        """Seconds left, from the share done so far; None while that is too little to tell."""
        if not self.running or not self.fraction or self.fraction < TELLING:
            return None
        return (time.time() - self.started) * (1 - self.fraction) / self.fraction

    def wait(self, timeout: float | None = None) -> None:
        """Until it has ended, or that many seconds."""
        if self.thread is not None:
            self.thread.join(timeout)

    def progress(self, fraction: float | None, text: str) -> None:
        self.fraction, self.text = fraction, text

    def cancel(self) -> None:
        self.cancel_event.set()
        if self.running:
            self.text = "Stopping…"


_JOBS: dict[str, Job[Any]] = {}


def start(name: str, work: Callable[[Progress, threading.Event], Result]) -> Job[Result]:
    """Run ``work(progress, cancel)`` in a daemon thread. Its errors end in the Job, never in the thread's stderr."""
    job: Job[Result] = Job(name)

    def body() -> None:
        try:
            job.result = work(job.progress, job.cancel_event)
            job.state, job.fraction = "done", 1.0
        except Cancelled as e:
            job.state, job.text = "cancelled", str(e)
        except KTOError as e:
            job.state, job.error = "failed", str(e)
        except Exception as e:
            print_trace(e)  # a bug of ours: the terminal gets the trace, the user a sentence
            job.state, job.error = "failed", f"Unexpected {type(e).__name__}: {e}. See the terminal for details."
        finally:
            job.ended = time.time()

    job.thread = threading.Thread(target=body, name=f"job-{name}", daemon=True)
    _JOBS[job.id] = job
    job.thread.start()
    return job


def get(job_id: str) -> Job[Any] | None:
    return _JOBS.get(job_id)


def all_jobs() -> list[Job[Any]]:
    return sorted(_JOBS.values(), key=lambda j: j.started)


def duration(seconds: float) -> str:
    """A span of time as a person says it: ``42 s``, ``3 min 5 s``, ``2 h 10 min``."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
