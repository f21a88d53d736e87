"""What a row says, as text: its length, and where a word stands in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kto_core.data.reading import json_text
from kto_core.data.records import thoughts
from kto_core.data.records.rows import Row


def characters(row: Row) -> int:
    """Length of a row's texts, tool calls as JSON included."""
    n = 0
    for m in (*row.prompt, *row.completion):
        n += len(m["content"] or "")
        if len(m) > 2:
            n += sum(len(t) for k in thoughts.KEYS if isinstance(t := m.get(k), str))
        if "tool_calls" in m:
            n += len(json_text.encode(m["tool_calls"]))
    return n


def compact(arguments: object) -> str:
    """A tool call's arguments as text: as they are, or as JSON."""
    return arguments if isinstance(arguments, str) else json_text.encode(arguments or {}).decode("utf-8", "replace")


def find(rows: Sequence[Row], needle: str, raw: Callable[[int], bytes] | None = None) -> Iterator[int]:
    """Indices of the rows with ``needle`` in a message, a tool call or a column; case does not matter.

    ``raw(i)``: the JSON text of row ``i``, where there is one.
    """
    needle = needle.casefold()
    # ASCII that JSON never escapes can be looked for in the raw text first, which spares parsing most rows
    plain = needle.isascii() and not set(needle) & set('"\\/\x7f')
    quick = needle.encode() if plain else b""
    for i in range(len(rows)):
        if quick and raw is not None:
            record = raw(i)
            if quick not in record.lower() and b"\\u" not in record and record.isascii():
                continue
        if needle in _text(rows[i]).casefold():
            yield i


def _text(row: Row) -> str:
    """All that a search looks at."""
    parts = [m["content"] or "" for m in (*row.prompt, *row.completion)]
    parts += [compact(m["tool_calls"]) for m in (*row.prompt, *row.completion) if "tool_calls" in m]
    parts += [t for m in (*row.prompt, *row.completion) for k in thoughts.KEYS if isinstance(t := m.get(k), str)]
    parts += [v if isinstance(v, str) else str(v) for v in row.extra.values()]
    return "\n".join(parts)
