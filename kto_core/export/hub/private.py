"""Nothing that is published names a folder of this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from kto_core.errors import ExportError

WHOLE = 64 * 2**20  # bytes: up to this size a file is read whole
HEAD = 2**20  # of larger ones, the header
TEXT = (".json", ".jinja", ".md", ".txt", "")  # kinds in which a path is replaced by its last part


def without_paths(files: list[tuple[Path, str]], folders: Iterable[Path], work: Path) -> list[tuple[Path, str]]:
    """The files to publish; of one that names a folder of ours, a copy in ``work`` that has the last part only.

    Args:
        files: (local file, path in the repository). folders: whose names stay private.

    Raises:
        ExportError: a file that is no text names one.
    """
    shutil.rmtree(work, ignore_errors=True)
    names = _spelled(folders)
    return [(_public(path, names, work / name), name) for path, name in files]


def _spelled(folders: Iterable[Path]) -> dict[bytes, bytes]:
    """Each folder as it may stand in a file -> what stands there instead; the longest first."""
    found: dict[bytes, bytes] = {}
    for folder in folders:
        for path in {folder.absolute(), folder.resolve()}:
            if len(path.parts) > 2:  # "/root" may be a word of a tokenizer
                found[os.fsencode(path)] = b"~" if path == Path.home() else os.fsencode(path.name)
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _public(path: Path, names: dict[bytes, bytes], copy: Path) -> Path:
    with open(path, "rb") as f:
        data = f.read(WHOLE if path.stat().st_size <= WHOLE else HEAD)
    if not any(name in data for name in names):
        return path
    if path.suffix not in TEXT or path.stat().st_size > WHOLE:
        raise ExportError(
            f"{path.name} names a folder of this machine, so it is not uploaded. Delete the file and create it again."
        )
    for name, public in names.items():
        data = data.replace(name, public)
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(data)
    return copy
