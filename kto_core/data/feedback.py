"""Answers rated in the chat, or voted on, become KTO rows: a JSONL file that the Data tab reads like any other."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kto_core.data.records.names import WRITTEN
from kto_core.errors import DiskError, ModelError
from kto_core.files import write_whole

_writing = threading.Lock()


@dataclass(frozen=True)
class Rated:
    """One answer and what was thought of it.

    Attributes:
        messages: role/content dicts, the answer last.
        about: columns that say where the answer comes from, see `about`.
    """

    messages: list[dict[str, Any]]
    label: bool
    about: dict[str, Any] = field(default_factory=dict)


def about(what: str, *, model: str, adapter: str, sampling: dict[str, Any], at: float | None = None) -> dict[str, Any]:
    """Columns of a row that the reader knows as notes (`names.NOTED`).

    Args:
        what: "vote", "edit", "correction" or "thumb". model: the base model's name. adapter: the run (and checkpoint),
            "" for the base model. sampling: `Chat.stream`'s settings. at: Unix time; default now.
    """
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
    return {"source": WRITTEN + what, "model": model, "adapter": adapter, "sampling": dict(sampling), "time": moment}


def add(path: str | os.PathLike[str], messages: list[dict[str, Any]], label: bool, **about: Any) -> None:
    """Write a rated answer as a KTO row (TRL's conversational form) into a JSONL file; rated again, it is replaced.

    Args:
        messages: role/content dicts, the rated answer last.
        about: more columns, see `about`.

    Raises:
        DiskError: the file cannot be written.
    """
    add_all(path, [Rated(messages, label, about)])


def add_all(path: str | os.PathLike[str], rated: Iterable[Rated]) -> None:
    """`add` for many answers, in one write: all of them are in the file afterwards, or none. Raises DiskError."""
    new: list[dict[str, Any]] = []
    for one in rated:
        if len(one.messages) < 2 or one.messages[-1]["role"] != "assistant":
            raise ModelError("Only answers can be rated.")
        row = {"prompt": one.messages[:-1], "completion": one.messages[-1:], "label": bool(one.label), **one.about}
        new = [*(r for r in new if not _same(r, row)), row]
    known = {_key(r) for r in new}
    _rewrite(path, lambda rows: [*(r for r in rows if not isinstance(r, dict) or _key(r) not in known), *new])


def remove(path: str | os.PathLike[str], messages: list[dict[str, Any]]) -> None:
    """Take the rating of an answer back. Raises DiskError."""
    row = {"prompt": messages[:-1], "completion": messages[-1:]}
    _rewrite(path, lambda rows: [r for r in rows if not _same(r, row)])


def counts(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(desirable, undesirable) rows of the file; (0, 0) if there is none."""
    labels = [r.get("label") for r in _rows(path) if isinstance(r, dict)]
    return labels.count(True), labels.count(False)


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row.get("prompt"), row.get("completion")], sort_keys=True)


def _same(a: object, b: dict[str, Any]) -> bool:
    return isinstance(a, dict) and a.get("prompt") == b["prompt"] and a.get("completion") == b["completion"]


def _rows(path: str | os.PathLike[str]) -> list[Any]:
    """The file's rows; a line that is no JSON (somebody edited it) stays as the text it is."""
    rows: list[Any] = []
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as f:
        for line in f:
            try:
                rows.append(json.loads(line))
            except ValueError:
                rows += [line.rstrip("\n")] if line.strip() else []
    return rows


def _rewrite(path: str | os.PathLike[str], change: Callable[[list[Any]], list[Any]]) -> None:
    path = Path(path)
    with _writing:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in change(_rows(path))]
            write_whole(path, "".join(line + "\n" for line in lines), sync=True)
        except OSError as e:
            raise DiskError(f"{path.name} is not writable ({e.strerror or e}). Fix this, then rate again.") from e
