"""LangSmith: runs with their feedback, as single entries or as statistics for each key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kto_core.data.records.rows import DroppedRow

from .common import DISAGREE, Importer, Item, Record, answered, asked, at, dicts, number, one, pick, rated, unwrapped


def _entries(feedback: list[Record]) -> tuple[dict[str, Any], list[str], list[Any]]:
    """Key -> value, comments, corrections."""
    found: dict[str, list[Any]] = {}
    for entry in feedback:
        value = entry.get("score") if entry.get("score") is not None else entry.get("value")
        if isinstance(value, str | int | float):
            found.setdefault(str(entry.get("key")), []).append(value)
    comments = [c for e in feedback if isinstance(c := e.get("comment"), str)]
    return {k: one(v) for k, v in found.items()}, comments, [c for e in feedback if (c := e.get("correction"))]


def _statistics(stats: Record) -> tuple[dict[str, Any], list[str]]:
    """Key -> value, comments."""
    found: dict[str, Any] = {}
    comments: list[str] = []
    for key, said in stats.items():
        comments += [c for c in at(said, "comments") or () if isinstance(c, str)]
        mean, words = number(at(said, "avg")), at(said, "values")
        if mean is not None:
            if number(at(said, "stdev")) and -1 < mean < 1:
                raise DroppedRow(DISAGREE, f"{key}: {mean:g} on average")
            found[str(key)] = mean
        elif isinstance(words, dict) and words:
            found[str(key)] = one(list(words))
    return found, comments


def _records(obj: Record) -> Iterator[Item]:
    prompt, answer = asked(unwrapped(obj["inputs"])), answered(unwrapped(obj.get("outputs")))
    if not prompt or not answer:
        raise DroppedRow("no question and answer found", "inputs, outputs")
    corrections: list[Any] = []
    if feedback := dicts(obj.get("feedback")):
        found, comments, corrections = _entries(feedback)
    else:
        stats = unwrapped(obj.get("feedback_stats"))
        found, comments = _statistics(stats if isinstance(stats, dict) else {})
    better = map(answered, corrections)
    yield from rated(prompt, answer, lambda: pick(found), better, comment="\n".join(comments))


def _knows(obj: Record) -> bool:
    marks = ("feedback_stats", "feedback", "run_type", "trace_id", "dotted_order")
    return "inputs" in obj and "outputs" in obj and any(m in obj for m in marks)


RUNS = Importer("LangSmith", _knows, _records)
