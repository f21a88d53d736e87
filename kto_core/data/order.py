"""The order of rows: micro-batches with both labels, and the split by prompt. Seeded, nothing dropped."""

from __future__ import annotations

import random
from collections.abc import Sequence

import orjson

from kto_core.data.records.rows import Row


def labels_of(rows: Sequence[Row]) -> Sequence[bool]:
    """The labels, without parsing the rows where the sequence knows them."""
    return getattr(rows, "labels", None) or [r.label for r in rows]


def take(rows: Sequence[Row], indices: list[int]) -> Sequence[Row]:
    """Some rows in another order; compact rows stay compact."""
    return rows.take(indices) if hasattr(rows, "take") else [rows[i] for i in indices]


def spread(rows: Sequence[Row], batch_size: int, seed: int) -> Sequence[Row]:
    """Shuffled rows, each label spread evenly over the micro-batches of ``batch_size``; all rows, each once.

    A micro-batch has both labels wherever there are enough rows of the rarer one to go round. Same seed, same order.
    """
    rng = random.Random(seed)
    labels = labels_of(rows)
    sides = [[i for i, label in enumerate(labels) if bool(label) is wanted] for wanted in (True, False)]
    for side in sides:
        rng.shuffle(side)
    few, many = sorted(sides, key=len)
    order: list[int] = []
    n, given = len(labels), 0
    for start in range(0, n, batch_size):
        end = min(start + batch_size, n)
        until = len(few) * end // n  # the rarer label's share up to here
        batch = few[given:until] + many[start - given : end - until]
        given = until
        rng.shuffle(batch)
        order += batch
    return take(rows, order)


def split_rows(rows: Sequence[Row], test_size: float, seed: int) -> tuple[Sequence[Row], Sequence[Row]]:
    """(train, test): all rows of a prompt lie on one side, and both sides have about the same share of each label.

    ``test_size`` is a share of the rows, 0 to 1. Order is kept. With a single prompt the test side is empty.
    """
    labels = labels_of(rows)
    groups: dict[int | bytes, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(prompt_key(row), []).append(i)
    if not 0 < test_size < 1 or len(groups) < 2:
        return take(rows, list(range(len(labels)))), take(rows, [])
    good = sum(map(bool, labels))
    wanted = [test_size * good, test_size * (len(labels) - good)]
    if sum(wanted) < 1:
        wanted = [max(w, min(1.0, w * 1e9)) for w in wanted]  # a share below one row still means one row
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    test: list[int] = []
    have = [0, 0]
    for group in order:
        d = sum(1 for i in group if labels[i])
        add = (d, len(group) - d)
        before = sum(abs(w - h) for w, h in zip(wanted, have, strict=True))
        after = sum(abs(w - h - a) for w, h, a in zip(wanted, have, add, strict=True))
        if after < before and len(test) + len(group) < len(labels):
            test += group
            have = [h + a for h, a in zip(have, add, strict=True)]
    chosen = set(test)
    return take(rows, [i for i in range(len(labels)) if i not in chosen]), take(rows, sorted(test))


def prompt_key(row: Row) -> int:
    """Equal for rows with the same prompt (64 bits of hash, which differ from process to process)."""
    try:
        return hash(orjson.dumps(row.prompt, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SORT_KEYS))
    except orjson.JSONEncodeError:  # numbers beyond 64 bits
        return hash(repr(row.prompt))
