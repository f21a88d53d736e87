"""Checkpoints of a run that are either whole or not there: ``checkpoint-N`` with a manifest, made beside and renamed.

Standard library only. A checkpoint without a manifest, or whose files do not agree with it, is never resumed from.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from kto_core.files import MANIFEST, problem
from kto_core.guards import bounded

_NAME = re.compile(r"^checkpoint-(\d+)$")


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def find_all(root: Path) -> list[Path]:
    """Checkpoints with a manifest, oldest first. Their files are not read."""
    try:
        found = [p for p in root.iterdir() if _NAME.match(p.name) and bounded.is_file(p / MANIFEST)]
    except OSError:
        return []
    return sorted(found, key=step_of)


def newest_whole(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files agree with its manifest, and a sentence for each newer one that was skipped."""
    skipped: list[str] = []
    try:
        folders = [p for p in root.iterdir() if _NAME.match(p.name) and p.is_dir()]
    except OSError:
        folders = []
    for folder in sorted(folders, key=step_of, reverse=True):
        if not (wrong := problem(folder)):
            return folder, skipped
        skipped.append(f"Skipping {folder.name}: {wrong}.")
    return None, skipped


def rotate(root: Path, limit: int | None) -> list[Path]:
    """Delete the oldest whole checkpoints beyond ``limit``; returns the deleted ones."""
    found = find_all(root)
    gone = found[: max(0, len(found) - limit)] if limit else []
    for folder in gone:
        # without its manifest it is no checkpoint any more, whatever happens while the rest is deleted
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    return gone
