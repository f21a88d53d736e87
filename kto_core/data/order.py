"""The order of rows: micro-batches with both labels. Seeded, nothing dropped."""

from __future__ import annotations

import random
from collections.abc import Sequence

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
