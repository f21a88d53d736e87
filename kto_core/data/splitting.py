"""Which rows are held out: whole questions, a share of each label. Seeded; one rule for runs and plans."""

from __future__ import annotations

import math
import random
import unicodedata
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import orjson

from kto_core.data.records.rows import Row

from .order import labels_of, take

TestSize = Literal["auto"] | float  # TRL's word for a share of the rows; 0 is none
SHARE = 0.1  # of the rows, at most, that auto holds out
MOST = 500  # rows: the interval hardly narrows with more, and each evaluation during training reads them all
FEWEST = 5  # questions of each label: with fewer, two that agree by chance look certain
RARE = 0.2  # of a label's rows, at most, where a tenth of them is too few to judge


def question(row: Row) -> str:
    """What a row asks: its last user turn, whatever the case, the blanks and the system prompt are.

    A row without one asks with its whole prompt.
    """
    asked = [m for m in row.prompt if m.get("role") == "user"][-1:] or row.prompt
    return " ".join(unicodedata.normalize("NFKC", " ".join(_text(m.get("content")) for m in asked)).casefold().split())


def _text(content: Any) -> str:
    if isinstance(content, list):  # parts
        return " ".join(str(p.get("text", "")) if isinstance(p, dict) else str(p) for p in content)
    return "" if content is None else str(content)


def prompt_key(row: Row) -> int:
    """Equal for rows with the same prompt (64 bits of hash, which differ from process to process)."""
    try:
        return hash(orjson.dumps(row.prompt, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SORT_KEYS))
    except orjson.JSONEncodeError:  # numbers beyond 64 bits
        return hash(repr(row.prompt))


KEYS: dict[str, Callable[[Row], Hashable]] = {"question": question, "prompt": prompt_key}


def expected(good: int, bad: int, test_size: TestSize) -> int:
    """How many rows `split_rows` holds out where no two rows ask the same; else about so many."""
    wanted = _wanted(good, bad, test_size)
    held = [max(0, math.ceil(w - 0.5)) for w in wanted]
    if test_size != "auto":
        return sum(held)
    return min(sum(held), _limit(good + bad)) if min(held) >= FEWEST else 0


def split_rows(
    rows: Sequence[Row], test_size: TestSize, seed: int, by: str = "question"
) -> tuple[Sequence[Row], Sequence[Row]]:
    """(train, test): all rows of a question lie on one side, and both sides have about the same share of each label.

    Args:
        test_size: a share of the rows, 0 to 1. "auto": a tenth, at most `MOST` rows, and none where that gives fewer
            than `FEWEST` questions of a label.
        by: "question", or "prompt": rows of one prompt, character by character, lie on one side.

    Returns:
        Both in the order of ``rows``. With a single question the test side is empty.
    """
    labels, key = labels_of(rows), KEYS[by]
    auto = test_size == "auto"
    everything = take(rows, list(range(len(labels)))), take(rows, [])
    if not auto and not 0 < test_size < 1:  # type: ignore[operator]
        return everything
    good = sum(map(bool, labels))
    if auto and not expected(good, len(labels) - good, test_size):  # without parsing them
        return everything
    groups: dict[Hashable, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(key(row), []).append(i)
    if len(groups) < 2:
        return everything
    test = _choose(list(groups.values()), labels, test_size, seed)
    if auto and not _enough([g for g in groups.values() if g[0] in test], labels):
        return everything
    return take(rows, [i for i in range(len(labels)) if i not in test]), take(rows, sorted(test))


def _choose(groups: list[list[int]], labels: Sequence[bool], test_size: TestSize, seed: int) -> set[int]:
    """Rows of whole groups, taken in a random order while that brings both labels nearer to what is wanted."""
    good = sum(map(bool, labels))
    wanted = _wanted(good, len(labels) - good, test_size)
    limit = _limit(len(labels)) if test_size == "auto" else len(labels) - 1
    random.Random(seed).shuffle(groups)
    test: set[int] = set()
    have = [0, 0]
    for group in groups:
        d = sum(1 for i in group if labels[i])
        add = (d, len(group) - d)
        before = sum(abs(w - h) for w, h in zip(wanted, have, strict=True))
        after = sum(abs(w - h - a) for w, h, a in zip(wanted, have, add, strict=True))
        if after < before and len(test) + len(group) <= limit:
            test.update(group)
            have = [h + a for h, a in zip(have, add, strict=True)]
    return test


def _limit(rows: int) -> int:
    return min(MOST, int(SHARE * rows))


def _wanted(good: int, bad: int, test_size: TestSize) -> list[float]:
    """Rows of each label to hold out."""
    if test_size == "auto":
        wanted = [max(SHARE * n, min(FEWEST + 1.0, RARE * n)) for n in (good, bad)]
        limit = _limit(good + bad)
        few = min(range(2), key=wanted.__getitem__)
        wanted[few] = min(wanted[few], limit / 2)
        wanted[1 - few] = min(wanted[1 - few], limit - wanted[few])  # the label that has more gives way
        return wanted
    wanted = [test_size * good, test_size * bad]
    if 0 < sum(wanted) < 1:
        wanted = [max(w, min(1.0, w * 1e9)) for w in wanted]  # a share below one row still means one row
    return wanted


def _enough(groups: list[list[int]], labels: Sequence[bool]) -> bool:
    return all(sum(any(labels[i] == side for i in g) for g in groups) >= FEWEST for side in (True, False))
