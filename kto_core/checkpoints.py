"""Checkpoints of a run that are either whole or not there: ``checkpoint-N`` with a manifest, made beside and renamed.

Standard library only. The manifest has each file's size and CRC-32; a checkpoint without a manifest, or whose files do
not agree with it, is never resumed from.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

from .jobs import Progress, check_cancel, no_progress

MANIFEST = "manifest.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")


def step_of(folder: Path) -> int:
    return int(_NAME.match(folder.name)[1])


def find_all(root: Path) -> list[Path]:
    """Checkpoints with a manifest, oldest first. Their files are not read."""
    try:
        found = [p for p in root.iterdir() if _NAME.match(p.name) and (p / MANIFEST).is_file()]
    except OSError:
        return []
    return sorted(found, key=step_of)


def newest_whole(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files agree with its manifest, and a sentence for each newer one that was skipped."""
    skipped = []
    try:
        folders = [p for p in root.iterdir() if _NAME.match(p.name) and p.is_dir()]
    except OSError:
        folders = []
    for folder in sorted(folders, key=step_of, reverse=True):
        if not (wrong := problem(folder)):
            return folder, skipped
        skipped.append(f"{folder.name} is not used: {wrong}.")
    return None, skipped


def problem(folder: Path, *, progress: Progress = no_progress, cancel: threading.Event | None = None) -> str:
    """Why a checkpoint cannot be used, or "". Raises Cancelled, as all its files are read."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        read = _counted(sum(size for size, _ in files.values()), progress, cancel)
        for name, (size, crc) in files.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size or _crc(file, read) != crc:
                return f"{name} is damaged"
    except FileNotFoundError:
        return "it was not written to its end"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"its manifest cannot be read ({type(e).__name__})"
    return ""


def seal(folder: Path, *, progress: Progress = no_progress, cancel: threading.Event | None = None) -> None:
    """Write the manifest of a complete folder. Raises Cancelled, as all its files are read."""
    sizes = {p: p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    read = _counted(sum(sizes.values()), progress, cancel)
    files = {p.relative_to(folder).as_posix(): [size, _crc(p, read)] for p, size in sizes.items()}
    part = folder / (MANIFEST + ".part")
    part.write_text(json.dumps({"files": files}, indent=1))
    os.replace(part, folder / MANIFEST)


def put(part: Path, final: Path) -> None:
    """Rename a complete folder to its place; what was there before goes away afterwards."""
    old = final.with_name(final.name + ".old")
    if final.exists():  # else .old may be all there is (see `clean`): it stays until the new one is in its place
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(part, final)
    shutil.rmtree(old, ignore_errors=True)


def rotate(root: Path, limit: int | None) -> list[Path]:
    """Delete the oldest whole checkpoints beyond ``limit``; returns the deleted ones."""
    found = find_all(root)
    gone = found[: max(0, len(found) - limit)] if limit else []
    for folder in gone:
        # without its manifest it is no checkpoint any more, whatever happens while the rest is deleted
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    return gone


def clean(root: Path) -> None:
    """Remove what a killed writer left; what was moved away, its successor not yet in its place, comes back."""
    for old in root.glob("*.old"):
        if (old / MANIFEST).is_file() and not old.with_suffix("").exists():
            os.replace(old, old.with_suffix(""))
    for folder in [*root.glob("*.part"), *root.glob("*.old")]:
        if folder.is_dir():
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
