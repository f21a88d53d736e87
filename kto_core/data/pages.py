"""Rows as pages of a table."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from kto_core.config import column_map
from kto_core.data.reading import sources
from kto_core.data.reading.record_rows import rows_of_record
from kto_core.data.records.rows import Labels, Row, shorten
from kto_core.errors import DataError

from .dataset import Rows
from .order import labels_of
from .row_text import characters, compact, find

SHOWN = 400  # characters of a text in the table
LOOK = 2000  # records that a first page is looked for in


def page(
    rows: Sequence[Row], page: int = 0, size: int = 50, search: str = "", label: bool | None = None
) -> tuple[list[dict[str, Any]], int]:
    """Page ``page`` (from 0) of the rows that match, for a table, and how many match in all."""
    needle = search.strip()
    if needle:
        hits: Sequence[int] = rows.search(needle) if isinstance(rows, Rows) else list(find(rows, needle))
    else:
        hits = range(len(rows))
    if label is not None:
        labels = labels_of(rows)
        hits = [i for i in hits if labels[i] is label]
    return [table_row(rows[i], i) for i in hits[page * size : (page + 1) * size]], len(hits)


def preview(
    source: str,
    split: str = "train",
    size: int = 50,
    *,
    good_from: float | None = None,
    bad_to: float | None = None,
    columns: str = "",
) -> list[dict[str, Any]]:
    """Rows among the first `LOOK` records that can be used, as `page` gives them, without reading the rest of the file.

    Raises:
        DataError: see `load`.
    """
    if problem := column_map.wrong(columns):
        raise DataError(problem)
    labels = Labels(good_from, bad_to, column_map.parse(columns))
    while True:
        out: list[dict[str, Any]] = []
        for line, _, raw in itertools.islice(sources.records(str(source), split)[1], LOOK):
            usable = [row for row in rows_of_record(raw, line, labels)[0] if isinstance(row, Row)]
            out += [table_row(row, len(out) + k) for k, row in enumerate(usable)]
            if len(out) >= size or labels.stale:
                break
        labels.close()
        if not labels.stale:
            return out[:size]
        labels = labels.again()


def table_row(row: Row, index: int) -> dict[str, Any]:
    """A row for a table: its place, label, the beginnings of the last question and of the answer, and what is in it."""
    asked = next((m["content"] for m in reversed(row.prompt) if m["role"] == "user" and m["content"]), None)
    answer = row.completion[0]
    calls = [c.get("function", c) for c in answer.get("tool_calls", ())]
    said = [answer["content"] or "", *(f"{c.get('name')}({compact(c.get('arguments'))})" for c in calls)]
    return {
        "index": index,
        "line": row.line,
        "label": row.label,
        "prompt": shorten(asked or next((m["content"] for m in reversed(row.prompt) if m["content"]), ""), SHOWN),
        "completion": shorten("\n".join(s for s in said if s), SHOWN),
        "turns": len(row.prompt) + 1,
        "system": any(m["role"] == "system" for m in row.prompt),
        "tools": bool(row.tools) or any("tool_calls" in m or m["role"] == "tool" for m in (*row.prompt, answer)),
        "characters": characters(row),
        "extra": row.extra,
    }
