"""Langfuse: traces or observations with their scores; a session is several traces."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from kto_core.data.records.rows import DroppedRow

from .common import (
    Importer,
    Item,
    Record,
    Turn,
    answered,
    asked,
    at,
    dicts,
    number,
    one,
    pick,
    rated,
    text_at,
    unwrapped,
)  # fmt: skip

_MARKS = ("projectId", "sessionId", "traceId", "htmlPath", "observations", "traceTags", "bookmarked", "environment")


def _scores(obj: Record) -> tuple[dict[str, Any], list[str], list[str]]:
    """Name -> value, comments, corrected answers."""
    found: dict[str, list[Any]] = {}
    comments: list[str] = []
    better: list[str] = []
    scores = unwrapped(obj.get("scores"))
    if isinstance(scores, dict):  # name -> values, as tables are exported
        found = {str(k): v if isinstance(v, list) else [v] for k, v in scores.items()}
    for score in dicts(scores) if isinstance(scores, list) else ():
        kind, words = score.get("dataType"), text_at(score, "stringValue")
        comments += [c] if (c := text_at(score, "comment")) else []
        if kind == "CORRECTION":
            better += [t] if (t := words or text_at(score, "longStringValue")) else []
        else:
            value = score.get("value")
            said: Any = value == 1 if kind == "BOOLEAN" else words if kind == "CATEGORICAL" and words else value
            found.setdefault(str(score.get("name")), []).append(said)
    kept = {k: [v for v in values if isinstance(v, str | int | float)] for k, values in found.items()}
    return {k: one(v) for k, v in kept.items() if v}, comments, better


def _exchange(obj: Record) -> tuple[list[Turn], list[Turn]]:
    """Question and answer of a trace, else of its last generation."""
    generations = [o for o in dicts(obj.get("observations")) if o.get("type") == "GENERATION"]
    for logged in (obj, *generations[-1:]):
        prompt, answer = asked(unwrapped(logged.get("input"))), answered(unwrapped(logged.get("output")))
        if prompt and answer:
            return prompt, answer
    raise DroppedRow("no question and answer found", "input, output")


def _records(obj: Record) -> Iterator[Item]:
    for trace in dicts(obj.get("traces")) or [obj]:
        if isinstance(inner := trace.get("trace"), dict):
            trace = {"observations": trace.get("observations"), "scores": trace.get("scores"), **inner}
        try:
            prompt, answer = _exchange(trace)
            found, comments, better = _scores(trace)
        except DroppedRow as e:
            yield e
            continue
        about = {"comment": "\n".join(comments)}
        yield from rated(prompt, answer, partial(pick, found), (answered(unwrapped(t)) for t in better), **about)


def _knows(obj: Record) -> bool:
    inner = at(obj, "traces", 0) or obj.get("trace")
    if isinstance(inner, dict):
        return _knows(inner) or "scores" in obj
    if "input" not in obj or "output" not in obj or "scores" not in obj:
        return False
    scores = dicts(obj["scores"])
    named = bool(scores) and all("name" in s and "value" in s for s in scores)
    return named or any(m in obj for m in _MARKS) and number(obj["scores"]) is None


TRACES = Importer("Langfuse", _knows, _records)
