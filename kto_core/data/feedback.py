"""Answers rated in the chat become KTO rows: a JSONL file that the Data tab reads like any other."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kto_core.errors import DiskError, ModelError
from kto_core.files import write_whole

_writing = threading.Lock()


def add(path: str | os.PathLike[str], messages: list[dict[str, Any]], label: bool) -> None:
    """Write a rated answer as a KTO row (TRL's conversational form) into a JSONL file; rated again, it is replaced.

    Args:
        messages: role/content dicts, the rated answer last.

    Raises:
        DiskError: the file cannot be written.
    """
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ModelError("Only answers can be rated.")
    row = {"prompt": messages[:-1], "completion": messages[-1:], "label": bool(label)}
    _rewrite(path, lambda rows: [*(r for r in rows if not _same(r, row)), row])


def remove(path: str | os.PathLike[str], messages: list[dict[str, Any]]) -> None:
    """Take the rating of an answer back. Raises DiskError."""
    row = {"prompt": messages[:-1], "completion": messages[-1:]}
    _rewrite(path, lambda rows: [r for r in rows if not _same(r, row)])


def counts(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(desirable, undesirable) rows of the file; (0, 0) if there is none."""
    labels = [r.get("label") for r in _rows(path) if isinstance(r, dict)]
    return labels.count(True), labels.count(False)


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
