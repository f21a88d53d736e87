"""The votes of this machine: make one, find one, go on with one."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kto_core import paths
from kto_core.errors import DataError, DiskError
from kto_core.files import write_whole
from kto_core.guards import bounded
from kto_core.plain_text import one_line
from kto_core.runs.event_reader import lines

from . import entries
from .entries import Settings
from .session import ENDING, SAMPLING, Session, now
from .sides import Side

KEPT = 16  # votes that stay in memory
NOWHERE = "Vote {} does not exist. `vote result` without a name shows the newest."

_known: dict[Path, Session] = {}
_table = threading.Lock()


def create(
    a: Side, b: Side, sampling: dict[str, float] | None = None, system: str = "", seed: int | None = None
) -> Session:
    """A new vote. ``sampling``: of `SAMPLING`, what differs. ``seed`` None: drawn, and kept.

    Raises:
        DiskError: the folder cannot be written.
    """
    chosen: dict[str, float] = {**SAMPLING, **(sampling or {})}
    settings = Settings(a, b, chosen, system, secrets.randbelow(2**31) if seed is None else seed, now())
    folder = paths.make_folder(paths.votes_dir(), "votes", "KTO_STUDIO_VOTES")
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}{ENDING}"
    first: dict[str, Any] = {
        "kind": "session",
        "a": a.to_dict(),
        "b": b.to_dict(),
        "sampling": chosen,
        "system": system,
    }
    first |= {"seed": settings.seed, "t": settings.began}
    try:
        write_whole(path, json.dumps(first, ensure_ascii=False) + "\n", sync=True)
    except OSError as e:
        raise DiskError.of(path, e) from e
    return _open(path)


def resume(a: Side, b: Side, sampling: dict[str, float] | None = None, system: str = "") -> Session | None:
    """The newest vote with these sides and settings, whose votes may be counted together; None if there is none."""
    wanted = Settings(a, b, {**SAMPLING, **(sampling or {})}, system, 0, 0.0)
    return next((one for one in by_age() if one.settings.same(wanted)), None)


def find(name: str) -> Session:
    """The vote with this id.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    plain = name and name == Path(name).name and name not in (".", "..") and "\0" not in name
    path = paths.votes_dir() / (name + ENDING)
    if not plain or not bounded.is_file(path):
        raise DataError(NOWHERE.format(one_line(name, 100)))
    return _open(path)


def newest() -> Session | None:
    """The vote that was written to last."""
    return next(by_age(), None)


def by_age() -> Iterator[Session]:
    """Votes that can be read, the one that was written to last first; read as they are asked for."""
    found = []
    with contextlib.suppress(OSError), os.scandir(paths.votes_dir()) as there:
        for entry in there:
            if entry.name.endswith(ENDING):
                with contextlib.suppress(OSError):
                    found.append((entry.stat().st_mtime_ns, entry.path))
    for _, path in sorted(found, reverse=True):
        with contextlib.suppress(DataError):
            yield _open(Path(path))


def _open(path: Path) -> Session:
    with _table:
        known = _known.pop(path, None)
        if known is None:
            known = Session(path, _first(path))
        _known[path] = known
        while len(_known) > KEPT:
            del _known[next(iter(_known))]
    return known.refresh()


def _first(path: Path) -> Settings:
    try:
        size = (bounded.stamp(path) or (0, 0, 0))[1]
        line = next(iter(lines(path, 0, size)), (None, 0))[0]
        return entries.settings_of(json.loads(line or b"null") or {})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise DataError(f"Vote {path.name.removesuffix(ENDING)} cannot be read: {bounded.reason(e)}.") from e
