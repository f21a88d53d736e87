"""One owner of the GPU at a time, across threads and processes: training, chat or export.

The owner holds a file lock in the cache folder, which the system takes back when its process dies; a JSON file beside
it says who that is. Without a GPU nobody needs to own it: `claim` then lets everybody in.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kto_core import paths
from kto_core.errors import BusyError, DiskError
from kto_core.files import write_whole

from .gpus import devices

if TYPE_CHECKING:
    from filelock import BaseFileLock

FORCE = "KTO_STUDIO_CLAIM"  # 1: claims count without a GPU as well, 0: never
WAIT = 0.3  # seconds: an `owner()` elsewhere holds the lock for an instant while it looks
DOES = {
    "train": ("run {} is training", "Stop it, or wait until it finishes"),
    "chat": ("{} is loaded for chat", "Unload it in the Chat tab, or close that chat"),
    "export": ("{} is being exported", "Wait until it finishes, or cancel it"),
}


@dataclass(frozen=True)
class Owner:
    pid: int
    kind: str  # "train", "chat", "export"
    name: str  # run id or model
    since: float  # unix time

    def sentence(self) -> str:
        does, remedy = DOES.get(self.kind, ("{} uses it", "Wait until it finishes"))
        return f"The GPU is busy: {does.format(self.name)} (process {self.pid}). {remedy}."


def needs_claim() -> bool:
    """Whether the GPU has to be owned: there is one, and this is no helper process of an owner (LOCAL_RANK above 0)."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return False
    forced = os.environ.get(FORCE)
    return forced == "1" if forced in ("0", "1") else bool(devices())


@contextlib.contextmanager
def claim(kind: str, name: str) -> Iterator[None]:
    """Own the GPU while the block runs.

    Args:
        kind: "train", "chat" or "export".
        name: run id or model, for the message others get.

    Raises:
        BusyError: somebody else, or another part of this process, owns it; the message says who and what to do.
        DiskError: the cache folder cannot be written.
    """
    if not needs_claim():
        yield
        return
    lock = _take(WAIT)
    if lock is None:
        holder = _read()
        raise BusyError(
            holder.sentence() if holder else "The GPU is in use by another process. Wait until it finishes."
        )
    try:
        _write(Owner(os.getpid(), kind, name, round(time.time(), 3)))
        yield
    finally:
        with contextlib.suppress(OSError):
            _file("json").unlink(missing_ok=True)
        lock.release()


def owner() -> Owner | None:
    """Who owns the GPU now; None if nobody does. Quick: two small files."""
    if not _file("lock").exists():
        return None
    lock = _take(0)
    if lock is not None:  # free: what the JSON says, if it is there, is of a process that died
        lock.release()
        return None
    return _read()


def _file(suffix: str) -> Path:
    return paths.cache_dir() / f"gpu-owner.{suffix}"


def _take(wait: float) -> BaseFileLock | None:
    """The lock, held; None if it is taken. Each call makes its own: threads of one process exclude each other too."""
    from filelock import FileLock, Timeout

    try:
        paths.cache_dir().mkdir(parents=True, exist_ok=True)
        lock = FileLock(_file("lock"), thread_local=False, is_singleton=False)
        lock.acquire(timeout=wait, poll_interval=0.02)
    except Timeout:
        return None
    except OSError as e:
        raise DiskError(
            f"The cache folder {paths.cache_dir()} is not writable ({e.strerror}). Set KTO_STUDIO_CACHE to another "
            "folder."
        ) from None
    return lock


def _write(holder: Owner) -> None:
    write_whole(_file("json"), json.dumps(asdict(holder)))


def _read() -> Owner | None:
    try:
        return Owner(**json.loads(_file("json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
