"""Long jobs in background threads (merge, GGUF, upload, model conversion): progress, cancel, result.

A job takes ``progress(fraction | None, text)`` and ``cancel: threading.Event``; it raises `Cancelled` when it sees the
event. Jobs live in this process only: what must survive a restart is in files.
"""

from __future__ import annotations

import threading
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from .errors import Cancelled, KTOError

TELLING = 0.05  # of a job: what remains is told from here on
Progress = Callable[[float | None, str], None]


def no_progress(fraction: float | None, text: str) -> None:
    """For callers that do not show progress."""


def check_cancel(cancel: threading.Event | None) -> None:
    if cancel is not None and cancel.is_set():
        raise Cancelled("Stopped as you asked.")


@dataclass
class Job:
    name: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    state: str = "running"  # running, done, failed, cancelled
    fraction: float | None = None  # 0..1; None: unknown
    text: str = ""
    error: str = ""
    result: object = None
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

    def progress(self, fraction: float | None, text: str) -> None:
        self.fraction, self.text = fraction, text

    def cancel(self) -> None:
        self.cancel_event.set()
        if self.running:
            self.text = "Stopping…"


_JOBS: dict[str, Job] = {}


def start(name: str, work: Callable[[Progress, threading.Event], object]) -> Job:
    """Run ``work(progress, cancel)`` in a daemon thread. Its errors end in the Job, never in the thread's stderr."""
    job = Job(name)

    def body():
        try:
            job.result = work(job.progress, job.cancel_event)
            job.state, job.fraction = "done", 1.0
        except Cancelled as e:
            job.state, job.text = "cancelled", str(e)
        except KTOError as e:
            job.state, job.error = "failed", str(e)
        except Exception as e:
            traceback.print_exc()  # a bug of ours: the terminal gets the trace, the user a sentence
            job.state, job.error = "failed", f"Unexpected {type(e).__name__}: {e}. The terminal has the details."
        finally:
            job.ended = time.time()

    job.thread = threading.Thread(target=body, name=f"job-{name}", daemon=True)
    _JOBS[job.id] = job
    job.thread.start()
    return job


def get(job_id: str) -> Job | None:
    return _JOBS.get(job_id)


def all_jobs() -> list[Job]:
    return sorted(_JOBS.values(), key=lambda j: j.started)
