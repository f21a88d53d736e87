"""What the one object of a JSON file can stand for: a list of rows under a key, a table by columns, or one record."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kto_core.data.records.rows import COLUMNS

_LISTS = ("data", "rows", "records", "examples", "items", "instances", "runs")  # keys that rows stand under
_SPEAKS = ("role", "from", "content", "value")


def rows_of(whole: dict[str, Any]) -> Iterator[object] | None:
    """The rows that an object stands for, as a list under a key or by columns; None if it is a record itself."""
    names, cells = whole.get("columns"), whole.get("data")
    if isinstance(names, list) and isinstance(cells, list) and _fit(cells, len(names)):  # a form of pandas
        return (dict(zip(map(str, names), row, strict=True)) for row in cells)
    for key in _LISTS:
        if isinstance(found := whole.get(key), list) and (key == "data" or not COLUMNS & whole.keys()):
            return map(_viewed, found)
    if found := _by_columns(whole):
        return (dict(zip(whole, row, strict=True)) for row in zip(*found, strict=True))
    return None


def _fit(rows: list[Any], width: int) -> bool:
    return bool(rows) and all(isinstance(row, list) and len(row) == width for row in rows)


def _viewed(row: object) -> object:
    """A row as the Hub's viewer wraps it, without its wrapping."""
    if isinstance(row, dict) and "row_idx" in row and isinstance(row.get("row"), dict):
        return row["row"]
    return row


def _by_columns(whole: dict[str, Any]) -> list[list[object]] | None:
    """Cells by column, if an object is a table: lists of one length, or objects with the same keys (pandas' own form).

    A list of messages is no column: a record has such lists too.
    """
    if len(COLUMNS & whole.keys()) < 2 and len(whole) < 2:
        return None
    cells: list[list[object]] = []
    keys = None
    for value in whole.values():
        if isinstance(value, dict) and value and all(k.isdecimal() for k in value):
            if keys is not None and value.keys() != keys:
                return None
            keys = value.keys()
            value = list(value.values())
        elif keys is not None or not isinstance(value, list):
            return None
        if not value or any(isinstance(v, dict) and any(k in v for k in _SPEAKS) for v in value[:1]) and keys is None:
            return None
        cells.append(value)
    return cells if len({len(c) for c in cells}) == 1 else None
