"""Answers rated in the chat become KTO rows: a JSONL file that the Data tab reads like any other."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from pathlib import Path

from .errors import DiskError, ModelError

_writing = threading.Lock()


def add(path: str | os.PathLike, messages: list[dict], label: bool) -> None:
    """Write a rated answer as a KTO row (TRL's conversational form) into a JSONL file; rated again, it is replaced.

    Args:
        messages: role/content dicts, the rated answer last.

    Raises:
        DiskError: the file cannot be written.
    """
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ModelError("Only an answer to a message can be rated.")
    row = {"prompt": messages[:-1], "completion": messages[-1:], "label": bool(label)}
    _rewrite(path, lambda rows: [*(r for r in rows if not _same(r, row)), row])


def remove(path: str | os.PathLike, messages: list[dict]) -> None:
    """Take the rating of an answer back. Raises DiskError."""
    row = {"prompt": messages[:-1], "completion": messages[-1:]}
    _rewrite(path, lambda rows: [r for r in rows if not _same(r, row)])


def counts(path: str | os.PathLike) -> tuple[int, int]:
    """(desirable, undesirable) rows of the file; (0, 0) if there is none."""
    labels = [r.get("label") for r in _rows(path) if isinstance(r, dict)]
    return labels.count(True), labels.count(False)


def _same(a, b: dict) -> bool:
    return isinstance(a, dict) and a.get("prompt") == b["prompt"] and a.get("completion") == b["completion"]


def _rows(path) -> list:
    """The file's rows; a line that is no JSON (somebody edited it) stays as the text it is."""
    rows: list = []
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as f:
        for line in f:
            try:
                rows.append(json.loads(line))
            except ValueError:
                rows += [line.rstrip("\n")] if line.strip() else []
    return rows


def _rewrite(path, change) -> None:
    path = Path(path)
    with _writing:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(path.name + ".part")
            lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in change(_rows(path))]
            part.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            os.replace(part, path)
        except OSError as e:
            raise DiskError(f"{path.name} cannot be written ({e.strerror or e}). Make room and rate again.") from e
