"""Before an export begins: nobody else makes one of this run, and disk and memory have room (refusals have numbers)."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import BusyError, DiskError, HardwareError

RESERVE = 100e6  # bytes left free


@contextlib.contextmanager
def only_one(run) -> Iterator[None]:
    """One export of a run at a time, in all processes; the system frees the lock of one that died."""
    from filelock import FileLock, Timeout

    exports = run.path / "exports"
    try:
        exports.mkdir(exist_ok=True)
        lock = FileLock(exports / ".lock", thread_local=False, is_singleton=False)
        lock.acquire(timeout=0.2, poll_interval=0.05)
    except Timeout:
        raise BusyError(f"Another export of run {run.id} is going on. Wait for it, or cancel it.") from None
    except OSError as e:
        raise DiskError(f"The folder {exports} cannot be written ({e.strerror or e}).") from e
    try:
        yield
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise DiskError(f"The disk of {exports} is full. Free some space and try again.") from e
        raise
    finally:
        lock.release()


def require_disk(folder: Path, needed: float, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed + RESERVE > free:
        raise DiskError(
            f"Not enough room on the disk. {what}: {(needed + RESERVE) / 1e9:.1f} GB; free in {folder}: "
            f"{free / 1e9:.1f} GB. Free some space, or choose fewer files."
        )


def require_memory(parameters: int, quantized: str, base: Path) -> None:
    """The merge holds the whole model, in the dtype of its files, and a converted copy of it for a moment."""
    import psutil

    own = json.loads((base / "config.json").read_text(encoding="utf-8"))
    full = (own.get("dtype") or own.get("torch_dtype")) == "float32"
    per_weight = 6.0 if full else 2.7 if quantized else 2.2
    needed, free = parameters * per_weight + 1e9, psutil.virtual_memory().available
    if needed > free:
        raise HardwareError(
            f"The merge needs about {needed / 1e9:.1f} GB of memory (not of the GPU), {free / 1e9:.1f} GB are free. "
            "Close other programs, or merge on a machine with more."
        )
