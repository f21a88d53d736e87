"""How the rows of a data set are read: the columns and thresholds that its owner chose, kept in the data folder.

A reading has `RunConfig`'s names: ``map``, ``good_from``, ``bad_to``. It is the data set's, for every page and run.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from kto_core import paths
from kto_core.config import column_map
from kto_core.errors import DataError, DiskError
from kto_core.files import write_whole

NAMES = ("map", "good_from", "bad_to")


def _path(data_id: str):
    kind, _, rest = data_id.partition(":")
    return paths.data_dir() / "made" / kind / (re.sub(r"[^\w.-]+", "_", rest) + "-reading.json")


def of(data_id: str) -> dict[str, Any]:
    """What was chosen for a data set, under `RunConfig`'s names; {} if nothing was, or if it cannot be read."""
    try:
        kept = json.loads(_path(data_id).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found: dict[str, Any] = {}
    for name in NAMES[1:]:
        value = kept.get(name) if isinstance(kept, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[name] = value
    text = kept.get("map") if isinstance(kept, dict) else None
    if isinstance(text, str) and text and not column_map.wrong(text):
        found["map"] = text
    return found


def keep(data_id: str, **changes: Any) -> None:
    """Keep a choice; None or "" takes it back.

    Raises:
        DataError: no map.
        DiskError: the data folder cannot be written.
    """
    if problem := column_map.wrong(changes.get("map") or ""):
        raise DataError(problem)
    kept = {k: v for k, v in {**of(data_id), **changes}.items() if v not in (None, "")}
    path = _path(data_id)
    try:
        if kept:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(kept, ensure_ascii=False))
        else:
            path.unlink(missing_ok=True)
    except OSError as e:
        raise DiskError.of(path, e) from None


def keywords(data_id: str) -> dict[str, Any]:
    """A reading as `kto_core.data.dataset.load` takes it."""
    kept = of(data_id)
    return {"good_from": kept.get("good_from"), "bad_to": kept.get("bad_to"), "columns": kept.get("map", "")}
