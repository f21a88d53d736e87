"""One record of a source -> the rows that it stands for."""

from __future__ import annotations

from kto_core.data.records.rows import PLAIN, DroppedRow, Labels, Row, parse_all

from . import json_text


def rows_of_record(
    raw: bytes | DroppedRow, line: int, labels: Labels = PLAIN
) -> tuple[list[Row | DroppedRow], str, list[str]]:
    """What one record stands for: rows or the reasons why not, form, changes."""
    if isinstance(raw, DroppedRow):
        return [raw], "", []
    try:
        obj, mended = json_text.decode(raw)
    except DroppedRow as e:
        return [e], "", []
    parsed, form, changes = parse_all(obj, line, labels)
    if key := json_text.repeated_key(raw, obj):
        return [DroppedRow("key given twice with different values", key)] * len(parsed), form, []
    return parsed, form, mended + changes
