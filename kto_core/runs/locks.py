"""Is somebody training this run? A locked file in its folder says so; the lock falls with its holder, however it dies.
Another one holds its exports.

A lock belongs to an open file: this process keeps the ones it holds in a table, and hands one to a child by letting it
inherit the file. Nobody but the holder writes a run's terminal status while the lock is held.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from kto_core.errors import BusyError, DiskError

NAME = "lock"
_held: dict[str, int] = {}  # real folder -> open file
_table = threading.Lock()
_supervised: set[Path] = set()


def _key(run_dir: str | os.PathLike[str]) -> str:
    return os.path.realpath(run_dir)


def is_alive(run_dir: str | os.PathLike[str]) -> bool:
    """True while any process, this one included, holds the run's lock."""
    with _table:
        if _key(run_dir) in _held:
            return True
    try:
        fd = os.open(Path(run_dir) / NAME, os.O_RDWR)
    except OSError:  # never trained
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who only look do not disturb each other
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def held(name: str) -> str:
    """What is said of a run whose lock another holds."""
    return f"Run {name} is already training. Stop it first."


def acquire(run_dir: str | os.PathLike[str], name: str = "") -> None:
    """Take the run's lock.

    Raises:
        BusyError: the run is being trained already.
        DiskError: its folder cannot be written.
    """
    key = _key(run_dir)
    with _table:
        try:
            fd = os.open(Path(run_dir) / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            raise DiskError(f"The run folder {run_dir} is not writable ({e.strerror}). Choose another folder.") from e
        try:
            for attempt in range(20):
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:  # perhaps only somebody who looks
                    if key in _held or attempt == 19:
                        raise
                    threading.Event().wait(0.01)
        except BlockingIOError as e:
            os.close(fd)
            raise BusyError(held(name or Path(run_dir).name)) from e
        _held[key] = fd


def adopt(run_dir: str | os.PathLike[str], fd: int) -> None:
    """Count an inherited open file as this process's lock; -1: a parent holds it as long as this process lives."""
    if fd >= 0:
        os.set_inheritable(fd, False)
    with _table:
        _held[_key(run_dir)] = fd


def lend(run_dir: str | os.PathLike[str]) -> int:
    """The open file of a lock that is held here, for a child's ``pass_fds``."""
    with _table:
        return _held[_key(run_dir)]


def release(run_dir: str | os.PathLike[str]) -> None:
    """Close this process's file; the lock falls when nobody else (a child) has it open."""
    with _table:
        fd = _held.pop(_key(run_dir), None)
    if fd is not None and fd >= 0:
        os.close(fd)


@contextlib.contextmanager
def holding(run_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock for a block; where this process has it already, its owner keeps it."""
    with _table:
        mine = _key(run_dir) not in _held
    if mine:
        acquire(run_dir)
    try:
        yield
    finally:
        if mine:
            release(run_dir)


# ---- exports --------------------------------------------------------------------------------------------------------


class _Located(Protocol):
    """A `run.Run`, which needs this file."""

    path: Path

    @property
    def id(self) -> str: ...


@contextlib.contextmanager
def only_one(run: _Located) -> Iterator[None]:
    """One export of a run at a time, in all processes; the system frees the lock of one that died."""
    from filelock import FileLock, Timeout

    exports = run.path / "exports"
    try:
        exports.mkdir(exist_ok=True)
        lock = FileLock(exports / ".lock", thread_local=False, is_singleton=False)
        lock.acquire(timeout=0.2, poll_interval=0.05)
    except Timeout:
        raise BusyError(f"Another export of run {run.id} is in progress. Wait until it ends, or cancel it.") from None
    except OSError as e:
        raise DiskError(f"The folder {exports} is not writable ({e.strerror or e}).") from e
    try:
        yield
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise DiskError(f"The disk of {exports} is full. Free up disk space and try again.") from e
        raise
    finally:
        lock.release()


# ---- children -------------------------------------------------------------------------------------------------------


def supervised(run_dir: Path) -> bool:
    """Whether a thread of this process watches a child that trains this run, and will note how it ends."""
    return run_dir in _supervised


def supervise(run_dir: Path) -> None:
    """From now on it does, until `supervise_no_more`."""
    _supervised.add(run_dir)


def supervise_no_more(run_dir: Path) -> None:
    _supervised.discard(run_dir)
