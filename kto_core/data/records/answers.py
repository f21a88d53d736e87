"""One cell that holds several answers to a question, or the turns before it; nothing of columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .names import holds, spelled
from .turns import unpacked_messages

SCORES = ("overall_score", "score", "rating", "reward")  # of one answer in a list: more is better
RANKS = ("rank", "ranking")  # less is better
TEXTS = ("response", "completion", "answer", "output", "text", "content", "generation", "reply")


class Several(list[Any]):
    """Alternatives: several answers to one question, each to be a row."""


def alternatives(value: object) -> list[Any]:
    """The answers of one side: a list of texts or of talks is several, anything else is one."""
    if isinstance(value, Several):
        return value
    if (
        isinstance(value, list)
        and value
        and (all(isinstance(v, str) for v in value) or all(isinstance(v, list) for v in value))
    ):
        return value
    return [value]


def scored(answers: list[Any], scores: list[float] | None) -> Iterator[tuple[object, float]]:
    """Answers with a number each, more is better (or True and False); nothing if one of them has none."""
    out: list[tuple[object, float]] = []
    for i, answer in enumerate(answers):
        said, score = answer, scores[i] if scores else None
        if isinstance(answer, dict) and "role" not in answer and "from" not in answer:
            said = next((answer[t] for t in TEXTS if holds(answer.get(t))), None)
        if score is None and isinstance(answer, dict):
            found = ((n, answer.get(n)) for n in ("label", *SCORES, *RANKS))
            name, number = next(((n, v) for n, v in found if isinstance(v, int | float) and v == v), ("", None))
            score = -number if number is not None and name in RANKS else number
        if score is None or said is None:
            return
        out.append((said, score))
    yield from out


def column_of_scores(obj: dict[str, Any], n: int) -> tuple[str, list[float] | None]:
    """The column with a number for each of ``n`` answers of a record, and the numbers: more is better."""
    for key, value in obj.items():
        name = spelled(key).removesuffix("s")
        if name not in (*SCORES, *RANKS, "label") or not isinstance(value, list) or len(value) != n:
            continue
        if all(isinstance(v, int | float) and v == v for v in value):
            return key, [-v for v in value] if name in RANKS else value
    return "", None


def two_texts(value: object) -> bool:
    """Whether a cell is a pair of answers, the better one first, as older preference files have them."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) and v.strip() for v in value)


def earlier(value: object) -> list[dict[str, Any]]:
    """Turns of a history: messages, or pairs of question and answer; [] if it is neither."""
    if isinstance(value, str):
        return unpacked_messages(value) or []
    if not isinstance(value, list) or not value:
        return []
    if all(isinstance(m, dict) and ("role" in m or "from" in m) for m in value):
        return value
    if all(isinstance(p, list) and len(p) == 2 and all(isinstance(t, str) for t in p) for p in value):
        return [{"role": r, "content": t} for p in value for r, t in zip(("user", "assistant"), p, strict=True)]
    return []
