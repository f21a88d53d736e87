"""Numbers on a scale: how often each is there, and what thresholds make of them. This module knows no rows."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

_DISTINCT = 1000  # values of a column that are counted one by one
_NAMED = 12  # values that a sentence names


@dataclass
class Numbers:
    """The numbers of one column: how often each, lowest and highest."""

    counts: Counter[float] = field(default_factory=Counter)
    low: float = math.inf
    high: float = -math.inf

    def add(self, number: float) -> None:
        if number in self.counts or len(self.counts) < _DISTINCT:
            self.counts[number] += 1
        if number < self.low:
            self.low = number
        if number > self.high:
            self.high = number

    def __str__(self) -> str:
        if len(self.counts) > _NAMED:
            more = "more than " if len(self.counts) == _DISTINCT else ""
            return f"{self.low:g} to {self.high:g}, {more}{len(self.counts):,} values"
        return ", ".join(f"{value:g} ({count:,})" for value, count in sorted(self.counts.items()))

    @classmethod
    def of(cls, counts: dict[float, int]) -> Numbers:
        return cls(Counter(counts), min(counts, default=math.inf), max(counts, default=-math.inf))


def side(number: float, good_from: float | None, bad_to: float | None) -> bool | None:
    """What thresholds, one of them at least, make of a number: good, bad, or None for neither."""
    if number >= good_from if good_from is not None else number > (bad_to or 0):
        return True
    return False if bad_to is None or number <= bad_to else None


def cut(counts: dict[float, int], good_from: float | None, bad_to: float | None) -> tuple[int, int, int]:
    """How many of a scale's numbers such thresholds make good, bad, and neither."""
    found: Counter[bool | None] = Counter()
    for number, n in counts.items():
        found[side(number, good_from, bad_to)] += n
    return found[True], found[False], found[None]


def suggested(counts: dict[float, int]) -> tuple[float, float]:
    """(good_from, bad_to) to begin with: the upper and the lower quarter, whole numbers where the values are whole."""
    low, high = min(counts), max(counts)
    good, bad = low + 0.75 * (high - low), low + 0.25 * (high - low)
    if all(float(value).is_integer() for value in counts):
        return float(math.ceil(good)), float(math.floor(bad))
    return good, bad


def advice(seen: Numbers) -> str:
    good, bad = suggested({**seen.counts, seen.low: 1, seen.high: 1})
    return (
        f"Set good_from and bad_to, for example --good-from {good:g} --bad-to {bad:g}: rows from {good:g} are good, "
        f"rows to {bad:g} bad, rows between left out."
    )


def misfit(columns: dict[str, Numbers], good_from: float | None, bad_to: float | None) -> str:
    """Why thresholds, one of them at least, do not fit the numbers of these columns, in a sentence; "" if they do."""
    given = " and ".join(
        f"{name} {value:g}" for name, value in (("good_from", good_from), ("bad_to", bad_to)) if value is not None
    )
    if not columns:
        return f"No label of this dataset is a number, so {given} cannot be applied. Leave the thresholds out."
    for column, seen in columns.items():
        if seen.low == seen.high and seen.low in (good_from, bad_to):
            continue  # the only value that there is; other rows may have the other label
        good = good_from is None or seen.low <= good_from <= seen.high
        bad = bad_to is None or seen.low <= bad_to <= seen.high
        if bad_to is None:  # everything below good_from is bad
            good = good and good_from != seen.low
        if good_from is None:  # everything above bad_to is good
            bad = bad and bad_to != seen.high
        if not good or not bad:
            wrong = f"good_from {good_from:g}" if not good else f"bad_to {bad_to:g}"
            return (
                f"{wrong} is outside the scale in column {column}, or leaves rows of one label only: its values go "
                f"from {seen.low:g} to {seen.high:g}. {advice(seen)}"
            )
    return ""
