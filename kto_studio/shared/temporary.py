"""Gradio's temporary files (uploads): a folder of each app's own, gone with the app.

Gradio keeps what is uploaded for ever, in one folder that all its apps share. Here each app has one below our cache,
with a locked file in it: the lock falls with the app, however it dies, and the next start removes what it left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kto_core import paths
from kto_core.errors import DiskError

PREFIX, LOCK = "kto-studio-", "lock"
VARIABLE = "GRADIO_TEMP_DIR"  # where Gradio puts what is uploaded; read when the page is built


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Gradio's folder for as long as the block runs; what apps left that are gone is removed first.

    It lies in ``$GRADIO_TEMP_DIR`` if that is set, else in the cache folder.

    Raises:
        DiskError: the folder cannot be written.
    """
    from filelock import FileLock

    asked = os.environ.get(VARIABLE)
    base = Path(asked or paths.cache_dir() / "gradio").expanduser().resolve()
    variable = VARIABLE if asked else "KTO_STUDIO_CACHE"
    paths.make_folder(base, "uploads", variable)
    try:
        with FileLock(base / "kto-studio.lock"):  # nobody removes a folder between its making and its lock
            _remove_left(base)
            own = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
            lock = _lock(own)
            lock.acquire(timeout=0)
    except OSError as e:
        raise DiskError(
            f"The folder {base} for uploads is not writable ({e.strerror}). Set {variable} to another folder."
        ) from None
    os.environ[VARIABLE] = str(own)
    try:
        yield own
    finally:
        if asked is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = asked
        shutil.rmtree(own, ignore_errors=True)
        lock.release()


def drop(path: str | os.PathLike) -> None:
    """Remove an uploaded file that is not needed any more; nothing outside of this app's folder."""
    own, real = Path(os.environ.get(VARIABLE, "")), Path(path).resolve()
    if not own.name.startswith(PREFIX) or not real.is_relative_to(own.resolve()) or not real.is_file():
        return
    with contextlib.suppress(OSError):  # it goes with the app, then
        real.unlink()
        if real.parent != own.resolve():
            real.parent.rmdir()


def _lock(own: Path):
    from filelock import FileLock

    return FileLock(own / LOCK, thread_local=False, is_singleton=False)


def _remove_left(base: Path) -> None:
    """Remove the folders of apps that are gone. Only what has our name and, unless it is empty, our lock."""
    from filelock import Timeout

    for left in base.glob(f"{PREFIX}*"):
        if left.is_symlink() or not left.is_dir():
            continue
        if not (left / LOCK).is_file():
            with contextlib.suppress(OSError):
                left.rmdir()
            continue
        lock = _lock(left)
        with contextlib.suppress(Timeout, OSError):
            lock.acquire(timeout=0)
            shutil.rmtree(left, ignore_errors=True)
            lock.release()
