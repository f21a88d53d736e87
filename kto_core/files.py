"""Files and folders that are either whole or not there: made beside, then renamed; a folder sealed with a manifest.

Standard library only. The manifest has each file's size and CRC-32.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from kto_core.guards import bounded

from .jobs import Progress, check_cancel, no_progress

MANIFEST = "manifest.json"


@contextlib.contextmanager
def beside(path: str | os.PathLike[str], *, sync: bool = False) -> Iterator[Path]:
    """``with beside(path) as part``: part becomes path at the end, or is removed if the block raises.

    Args:
        sync: it is on the disk when the block is left, its new name too: for what a power cut must not take.

    Raises:
        OSError: it cannot be written or renamed; what was at ``path`` before is still there.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)  # of a killed writer
    try:
        yield part
        if sync:
            _sync(part)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    if sync:
        _sync(path.parent)


def write_whole(path: str | os.PathLike[str], content: str | bytes, *, sync: bool = False) -> None:
    """Write a small file, text as UTF-8: who reads it finds the old content or the new, never a part. See `beside`."""
    with beside(path, sync=sync) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def _sync(path: Path) -> None:
    """What was written to a file, or which names are in a folder, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno != errno.EINVAL:  # a file system that does not sync folders
            raise
    finally:
        os.close(fd)


# ---- folders --------------------------------------------------------------------------------------------------------


def seal(
    folder: Path,
    *,
    sync: bool = False,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> None:
    """Write the manifest of a complete folder. Raises Cancelled, as all its files are read.

    Args:
        sync: all of it is on the disk afterwards; see `beside`.
    """
    found = sorted(folder.rglob("*"))
    if sync:
        for path in found:
            _sync(path)
    sizes = {p: p.stat().st_size for p in found if p.is_file()}
    read = _counted(sum(sizes.values()), progress, cancel)
    files = {p.relative_to(folder).as_posix(): [size, _crc(p, read)] for p, size in sizes.items()}
    write_whole(folder / MANIFEST, json.dumps({"files": files}, indent=1), sync=sync)


def problem(folder: Path, *, progress: Progress = no_progress, cancel: threading.Event | None = None) -> str:
    """Why a sealed folder cannot be used, or "". Raises Cancelled, as all its files are read."""
    try:
        files = bounded.read_json(folder / MANIFEST)["files"]  # type: ignore[index]  # a TypeError is caught below
        read = _counted(sum(size for size, _ in files.values()), progress, cancel)
        for name, (size, crc) in files.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size or _crc(file, read) != crc:
                return f"{name} is damaged"
    except FileNotFoundError:
        return "it is incomplete"
    except bounded.Unreadable as e:
        return f"its manifest cannot be read: {e}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as e:
        return f"its manifest is unreadable ({type(e).__name__})"
    return ""


def move_into_place(part: Path, final: Path, *, sync: bool = False) -> None:
    """Rename a complete folder to its place; what was there before goes away afterwards. ``sync``: as in `seal`."""
    old = final.with_name(final.name + ".old")
    if final.exists():  # else .old may be all there is (see `clean`): it stays until the new one is in its place
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(part, final)
    if sync:
        _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def clean(root: Path, keep: Path | None = None) -> None:
    """Remove what a killed writer left, but for ``keep``; what was moved away, its successor not yet in its place,
    comes back."""
    for old in root.glob("*.old"):
        if (old / MANIFEST).is_file() and not old.with_suffix("").exists():
            os.replace(old, old.with_suffix(""))
    for folder in [*root.glob("*.part"), *root.glob("*.old")]:
        if folder.is_dir() and folder != keep:
            shutil.rmtree(folder, ignore_errors=True)


def _counted(total: int, progress: Progress, cancel: threading.Event | None) -> Callable[[int], None]:
    """To be called with the number of bytes that were read."""
    done = 0

    def read(count: int) -> None:
        nonlocal done
        check_cancel(cancel)
        done += count
        progress(min(1.0, done / max(1, total)), f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB")

    return read


def _crc(file: Path, read: Callable[[int], None]) -> int:
    value = 0
    with open(file, "rb") as f:
        while block := f.read(1 << 22):
            read(len(block))
            value = zlib.crc32(block, value)
    return value
