"""Training begins: at once, in its turn, or again from the newest checkpoint."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator

from kto_core import files
from kto_core.errors import BusyError, DiskError, RunError
from kto_core.paths import make_folder, runs_dir
from kto_core.runs import locks, ranks
from kto_core.runs.events import EventLog
from kto_core.runs.folders import active, first_of, list_runs
from kto_core.runs.run import Run, stop_waiting, wait_for_end

from . import queue as run_queue
from .workers import in_process, in_thread


def start(run: Run, *, block: bool = False, queue: bool = False) -> None:
    """Train ``run`` in the background (a thread, or its own process as configured); goes on from its checkpoints.

    Args:
        block: return when it has ended.
        queue: wait for what trains now (in state ``preparing``, as long as this process lives) instead of BusyError.

    Raises:
        BusyError: a run trains already, or something else owns the GPU.
        ConfigError: the run's config.yaml is not valid.
        RunError: its events cannot be read.
    """
    from kto_core.hardware.gpu_owner import owner

    config = run.config().config
    if problem := run.state().problem:
        raise RunError(f"Run {run.id} cannot be read: {problem}. Fix its folder {run.path}, or delete the run.")
    with _starting():  # two that start at once would both see nobody
        if (other := active(settle=True)) is not None and (other == run or not queue):
            raise BusyError(f"Run {other.id} is training. Stop it or wait until it finishes, then start this one.")
        if (holder := owner()) is not None and not queue:
            raise BusyError(holder.sentence())
        locks.acquire(run.path, run.id)
    try:
        (run.path / "stop").unlink(missing_ok=True)
        stop_waiting(run.path)  # of a process that died while it waited
        ranks.forget_errors(run.path)
        EventLog(run.path / "events.jsonl").begin()
        worker = in_process if config.worker == "process" or config.needs_process else in_thread
        if other or holder:
            thread = run_queue.begin_later(run, _blocker(run), lambda: worker(run, config))
        else:
            thread = worker(run, config)
    except BaseException as e:
        with contextlib.suppress(OSError):
            EventLog(run.path / "events.jsonl").status("failed", message=f"The run could not start: {e}")
        locks.release(run.path)
        if isinstance(e, OSError):
            raise DiskError(f"The run folder {run.path} is not writable ({e.strerror or e}).") from e
        raise
    if block:
        thread.join()


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """One start at a time on this machine."""
    make_folder(runs_dir(), "runs", "KTO_STUDIO_RUNS")
    try:
        fd = os.open(runs_dir() / ".start.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        raise DiskError.of(runs_dir() / ".start.lock", e) from e
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def resume(run: Run, *, block: bool = False, queue: bool = False) -> Run:
    """Go on with a stopped, failed or interrupted run from its newest whole checkpoint (or from the start).

    A finished run whose adapter was lost or damaged gets it again from its last checkpoint.

    Raises:
        BusyError: see `start`.
        RunError: it has finished.
    """
    wait_for_end(run)
    if run.alive():
        raise BusyError(locks.held(run.id))
    state = run.state()
    whole = run.adapter is not None and not files.problem(run.adapter)
    if state.state == "finished" and state.step >= state.total_steps and whole:
        raise RunError(
            f"Run {run.id} has already finished all {state.total_steps:,} steps. Start a new run to train further."
        )
    start(run, block=block, queue=queue)
    return run


def _blocker(waiting: Run) -> Callable[[], str]:
    """To be asked what has to end before a waiting run begins; "" for nothing."""
    from kto_core.hardware.gpu_owner import owner

    first: Run | None = None

    def ask() -> str:
        nonlocal first
        if first is None or first == waiting or not first.alive():  # else nothing can come before it meanwhile
            first = first_of(run for run in list_runs() if run == waiting or run.alive())
        if first is not None and first != waiting:
            return f"run {first.id} is ahead in the queue."
        return holder.sentence() if (holder := owner()) is not None else ""

    return ask
