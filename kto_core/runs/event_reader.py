"""Lines of an event log -> events of the right types. Whatever a line is, nothing is raised: it is used, or counted.

Standard library only. Read in blocks, so that neither a long run nor a line without an end takes memory; of a long
backlog most metric rows are only counted, as `events.RunState` would thin them anyway.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from typing import Any

from kto_core.guards.bounded import open_plain
from kto_core.plain_text import cut, whole

BLOCK = 1 << 20
LINE = 1 << 20  # bytes of one line; a longer one is no event
TEXT = 20_000  # characters of a message
VALUES = 300  # of one metric row
BACKLOG = 8 << 20  # bytes; of more than that only a sample of the metric rows is parsed
SAMPLE = 2 << 20  # bytes of rows that are parsed of it, and as many at its end, where all are
FEW = 20  # rows that begin with a name that less than one of so many does
LAST = 253_402_300_799  # the end of the year 9999, in unix seconds: no clock shows more
MOST = 2**53  # steps; what a float still counts

STATES = ("preparing", "training", "stopping", "finished", "stopped", "failed", "interrupted")
MARKS = ("clock", "gap")  # of any event: see `events.EventLog`
_OWN = {"kind", "t", "step", *MARKS}
BAD = object()  # kind of what stands for a line that is no event
PASSED = object()  # kind of what stands for metric rows that were not parsed: rows, step, t
_ROW = re.compile(rb'\{"t": (\d{1,12}(?:\.\d{1,6})?), "kind": "metric", "step": (\d{1,15}), "([^"\\]{1,100})": ').match


def lines(path: str | os.PathLike[str], offset: int, end: int) -> Iterator[tuple[bytes | None, int]]:
    """(a whole line or None for one that is too long, offset behind it) from ``offset``, up to byte ``end``.

    A last line without its newline is left for the next time, unless it is too long.

    Raises:
        OSError: the file cannot be opened or read.
    """
    with open_plain(path) as f:
        f.seek(offset)
        rest, long = b"", False
        while offset < end and (block := f.read(min(BLOCK, end - offset - len(rest)))):
            found = (rest + block).split(b"\n")
            rest = found.pop()
            for line in found:
                offset += len(line) + 1
                yield (None if long or len(line) > LINE else line), offset
                long = False
            if len(rest) > LINE:
                offset, rest, long = offset + len(rest), b"", True
        if long:
            yield None, offset


def events(
    path: str | os.PathLike[str], offset: int, end: int, *, sample: bool = False
) -> Iterator[tuple[dict[str, Any], int]]:
    """(event, offset behind it) of each line; `BAD` and, where rows are sampled, `PASSED` ones among them.

    Raises:
        OSError: the file cannot be opened or read.
    """
    every = max(1, (end - offset) // SAMPLE) if sample and end - offset > BACKLOG else 1
    sampled_until = end - SAMPLE if every > 1 else 0
    seen: dict[bytes, int] = {}  # first name of a metric row -> rows: those of evaluations are few, and all parsed
    passed, total, at = 0, 0, offset
    last: re.Match[bytes] | None = None
    for line, at in lines(path, offset, end):
        if at < sampled_until and line and (row := _ROW(line)):
            name, total = row[3], total + 1
            count = seen[name] = seen.get(name, -1) + 1
            if count % every and FEW * count > total:
                passed, last = passed + 1, row
                continue
        event = {"kind": BAD} if line is None else parse(line)
        if event is None:
            continue
        if passed and last:
            yield _passed(passed, last), at
            passed = 0
        yield event, at
    if passed and last:
        yield _passed(passed, last), at


def _passed(rows: int, last: re.Match[bytes]) -> dict[str, Any]:
    return {"kind": PASSED, "rows": rows, "step": int(last[2]), "t": float(last[1])}


def parse(line: bytes) -> dict[str, Any] | None:
    """One line's event, its values checked; a `BAD` one; None for a line without anything."""
    if not line.strip():
        return None
    try:
        event = json.loads(line)
        kind = event["kind"]
        if not isinstance(kind, str):
            return {"kind": BAD}
        return {"kind": kind, **_common(event), **_CHECKS.get(kind, _other)(event)}
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return {"kind": BAD}


def _common(event: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"t": number(event.get("t"), 0, LAST)}
    if "clock" in event:
        found["clock"] = number(event["clock"], 0, LAST)
    if event.get("gap"):
        found["gap"] = True
    return found


def number(value: object, low: float = -math.inf, high: float = math.inf) -> float | None:
    """A finite number of that range, or None for null. Raises TypeError, ValueError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(value)
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(value)
    return value


def step(value: object) -> int:
    """A number of steps; 0 for null. Raises TypeError, ValueError."""
    return int(number(value, 0, MOST) or 0)


def text(value: object) -> str:
    """A text that can be shown and written; "" for null. Raises TypeError."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(value)
    return whole(cut(value, TEXT))


def _status(event: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"state": event["state"], "message": text(event.get("message"))}
    if found["state"] not in STATES:
        raise ValueError(found["state"])
    for name in ("total_steps", "resumed_from"):
        if name in event:
            found[name] = step(event[name])
    if "fraction" in event:
        found["fraction"] = number(event["fraction"], 0, 1)
    if event.get("seconds") is not None:
        found["seconds"] = number(event["seconds"], 0, LAST)
    return found


def _metric(event: dict[str, Any]) -> dict[str, Any]:
    if len(event) > VALUES:
        raise ValueError
    found: dict[str, Any] = {"step": step(event.get("step"))}
    for name, value in event.items():
        if type(value) is float:
            value = value if value - value == 0 else None  # NaN and infinities: null, as our own writer has them
        elif isinstance(value, int):
            value = value if _floats(value) else None
        elif isinstance(value, str):
            value = text(value)
        elif value is not None:
            continue
        if name not in _OWN:
            found[name if name.isascii() else whole(name)] = value
    return found


def _floats(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _log(event: dict[str, Any]) -> dict[str, Any]:
    return {"text": text(event.get("text")), "level": text(event.get("level")) or "info"}


def _checkpoint(event: dict[str, Any]) -> dict[str, Any]:
    return {"step": step(event.get("step")), "path": text(event.get("path"))}


def _error(event: dict[str, Any]) -> dict[str, Any]:
    return {"message": text(event.get("message")), "type": text(event.get("type"))}


def _used(event: dict[str, Any]) -> dict[str, Any]:
    return {whole(k): _scalar(v) for k, v in event.items() if k not in ("kind", "t", *MARKS)}


def _scalar(value: object) -> object:
    """What `used` notes: words, numbers, and one object in the other (where an adapter began)."""
    if isinstance(value, dict):
        return {whole(k): _scalar(v) for k, v in value.items()}
    if isinstance(value, str):
        return text(value)
    if isinstance(value, int | float):
        return value if _floats(value) else None
    return None


def _other(event: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in event.items() if k not in ("kind", "t", *MARKS)}


_CHECKS = {"status": _status, "metric": _metric, "log": _log, "checkpoint": _checkpoint, "error": _error, "used": _used}
