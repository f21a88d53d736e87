"""What sets good rows apart from bad ones beside what they say: how long their answers are, and of what category.

A model learns whatever tells the two apart. Where that is the length, it learns length.
"""

from __future__ import annotations

from array import array
from collections import Counter
from typing import Any

from kto_core.data.records.names import spelled
from kto_core.data.records.rows import Row

CATEGORIES = (
    "category", "behavior", "behaviour", "topic", "task", "kind", "type", "subset", "domain", "source", "lang",
    "language",
)  # fmt: skip
MOST = 50  # values of a column; one with more is no category
FEW = 20  # rows of a label, below which lengths say nothing
TELLING = 0.75  # share of pairs in which one label's answer is the longer one


class Contrast:
    """Both labels' answers of one data set."""

    def __init__(self) -> None:
        self._lengths = (array("I"), array("I"))  # characters of the answers: bad, good
        self._rows: dict[str, dict[str, list[int]]] = {}  # column -> value -> rows: bad, good
        self._known: dict[str, bool] = {}  # whether a column may be a category

    def add(self, row: Row) -> None:
        said = row.completion[0]["content"]
        self._lengths[row.label].append(len(said) if said else 0)
        for column, value in row.extra.items():
            known = self._known.get(column)
            if known is None:
                known = self._known[column] = spelled(column) in CATEGORIES
            if not known or value.__class__ is not str or not value:
                continue
            values = self._rows.setdefault(column, {})
            counts = values.get(value)
            if counts is None:
                if len(values) == MOST:
                    self._known[column] = False
                    del self._rows[column]
                    continue
                counts = values[value] = [0, 0]
            counts[row.label] += 1

    def lengths(self) -> dict[str, Any]:
        """Answers of both labels in characters; {} if one label has fewer than `FEW` rows.

        ``desirable`` and ``undesirable``: the medians; ``longer``: in what share of all pairs of a good and a bad
        answer the good one is longer (ties count half).
        """
        bad, good = (sorted(lengths) for lengths in self._lengths)
        if len(good) < FEW or len(bad) < FEW:
            return {}
        return {
            "desirable": good[(len(good) - 1) // 2],
            "undesirable": bad[(len(bad) - 1) // 2],
            "longer": round(_longer(good, bad), 4),
        }

    def categories(self) -> dict[str, Any]:
        """``column``, and ``rows``: value -> [good, bad], the most frequent first. {} if no column is a category."""
        found = [c for name in CATEGORIES for c in self._rows if spelled(c) == name and len(self._rows[c]) > 1]
        if not found:
            return {}
        rows = self._rows[found[0]]
        order = sorted(rows, key=lambda value: -sum(rows[value]))
        return {"column": found[0], "rows": {value: [rows[value][1], rows[value][0]] for value in order}}


def _longer(good: list[int], bad: list[int]) -> float:
    """Share of pairs of two sorted lists in which the first one's number is larger."""
    counts = Counter(bad)
    below, wins, at = 0, 0.0, 0
    for n in good:
        while at < len(bad) and bad[at] < n:
            below += 1
            at += 1
        wins += below + counts[n] / 2
    return wins / (len(good) * len(bad))


def hint(lengths: dict[str, Any]) -> str:
    """What lengths that tell the labels apart mean, in a sentence; "" where they do not."""
    longer = lengths.get("longer", 0.5)
    if 1 - TELLING < longer < TELLING:
        return ""
    which, than = ("good", "bad") if longer > 0.5 else ("bad", "good")
    share = max(longer, 1 - longer)
    learns = "at length" if which == "good" else "briefly"
    return (
        f"A {which} answer is longer than a {than} one in {100 * share:.0f} % of all pairs of them, so the model may "
        f"learn to answer {learns}, and little else. If that is not what you want, add short {which} answers or long "
        f"{than} ones."
    )
