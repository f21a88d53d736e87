"""Is somebody training this run? A locked file in its folder says so; the lock falls with its holder, however it dies.

Standard library only. A lock belongs to an open file: this process keeps the ones it holds in a table, and hands one
to a child by letting it inherit the file. Nobody but the holder writes a run's terminal status while the lock is held.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from pathlib import Path

from .errors import BusyError, DiskError

NAME = "lock"
_held: dict[str, int] = {}  # real folder -> open file
_table = threading.Lock()


def _key(run_dir: str | os.PathLike) -> str:
    return os.path.realpath(run_dir)


def is_alive(run_dir: str | os.PathLike) -> bool:
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


def acquire(run_dir: str | os.PathLike, name: str = "") -> None:
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
            raise DiskError(
                f"The run's folder {run_dir} cannot be written ({e.strerror}). Choose another folder."
            ) from e
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
            raise BusyError(f"Run {name or Path(run_dir).name} is being trained already. Stop it first.") from e
        _held[key] = fd


def adopt(run_dir: str | os.PathLike, fd: int) -> None:
    """Count an inherited open file as this process's lock; -1: a parent holds it as long as this process lives."""
    if fd >= 0:
        os.set_inheritable(fd, False)
    with _table:
        _held[_key(run_dir)] = fd


def lend(run_dir: str | os.PathLike) -> int:
    """The open file of a lock that is held here, for a child's ``pass_fds``."""
    with _table:
        return _held[_key(run_dir)]


def release(run_dir: str | os.PathLike) -> None:
    """Close this process's file; the lock falls when nobody else (a child) has it open."""
    with _table:
        fd = _held.pop(_key(run_dir), None)
    if fd is not None and fd >= 0:
        os.close(fd)


@contextlib.contextmanager
def holding(run_dir: str | os.PathLike):
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
