"""How sure a mean is when several rows ask the same question: jackknife over questions, and Student's t.

Rows of one question move together, so an interval over rows would be too narrow. Leaving out one question at a time
asks how much each of them decides.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence

Interval = tuple[float, float]


def of_mean(values: Sequence[float], questions: Sequence[Hashable], share: float = 0.95) -> Interval | None:
    """The interval of the mean that is right in ``share`` of all cases; None with fewer than two questions.

    Args:
        values, questions: ``[n]``, one of each a row.
    """
    return of_difference(values, questions, [True] * len(values), share)


def of_difference(
    values: Sequence[float], questions: Sequence[Hashable], labels: Iterable[bool], share: float = 0.95
) -> Interval | None:
    """The interval of mean(good) − mean(bad), or of the mean where all are good; None where a label has one question.

    Args:
        values, questions, labels: ``[n]``, one of each a row. A question may have rows of both labels.
    """
    import numpy as np

    x, good = np.asarray(values, float), np.array(list(labels), bool)
    numbers: dict[Hashable, int] = {}
    group = np.array([numbers.setdefault(q, len(numbers)) for q in questions], int)
    count, sides, middle, without = len(numbers), [], 0.0, np.zeros(len(numbers))
    for sign, side in ((1, good), (-1, ~good)):
        if not side.any():
            continue
        sums = np.bincount(group[side], x[side], count)
        rows = np.bincount(group[side], minlength=count)
        here = np.count_nonzero(rows)
        if here < 2:
            return None
        sides.append(int(here))
        middle += sign * sums.sum() / rows.sum()
        without += sign * (sums.sum() - sums) / (rows.sum() - rows)
    if count < 2 or not np.isfinite(without).all():
        return None
    error = math.sqrt((count - 1) / count * float(((without - without.mean()) ** 2).sum()))
    half = t_quantile((1 + share) / 2, min(sides) - 1) * error
    return middle - half, middle + half


def t_quantile(p: float, df: int) -> float:
    """The quantile of Student's t distribution with ``df`` degrees of freedom, for p in 0.5 to 1."""
    low, high = 0.0, 1.0
    while _t_cdf(high, df) < p:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, df: int) -> float:
    """P(T <= t) for t >= 0, by the finite series for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 4)."""
    if df > 2000:  # the normal distribution, to four places
        return 0.5 * (1 + math.erf(t / math.sqrt(2)))
    angle = math.atan(t / math.sqrt(df))
    cos2, total, term = math.cos(angle) ** 2, 0.0, 1.0
    odd = df % 2
    for k in range(1 + odd, df, 2):  # cos^0, cos^2, … times their coefficients
        total += term
        term *= cos2 * k / (k + 1)
    if odd:
        inside = angle + (math.sin(angle) * math.cos(angle) * total if df > 1 else 0.0)
        return 0.5 + inside / math.pi
    return 0.5 + 0.5 * math.sin(angle) * total
