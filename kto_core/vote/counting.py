"""What votes say: the win rate, an interval that holds whenever somebody looks, and how many votes more settle it.

Somebody who looks after every vote and stops when it looks good would find an ordinary 95 % interval wrong in far more
than 5 % of all votes. So the interval is a confidence sequence: with probability 95 % it has the true rate after every
vote at once. Of w votes for side ``a`` and l for side ``b`` it is the set of rates p that the mixture martingale

    M(p) = B(w + 1, l + 1) / (p^w · (1 - p)^l)

does not refuse (M < 20): Robbins' mixture over all rates (Robbins 1970, "Statistical methods related to the law of the
iterated logarithm"); by Ville's inequality M of the true rate ever reaches 20 with a chance of at most 1/20.

Votes without a preference say nothing of p, as in the sign test (Dixon and Mood 1946): the interval is of the share of
the decided votes. The win rate counts them half on each side, and is above one half exactly if that share is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ERROR = 0.05  # the chance that the interval ever misses the true rate
MOST = 1000  # votes; what would take more is not said as a number
WORDS = ("better", "no difference yet", "worse")


@dataclass(frozen=True)
class Counts:
    """Votes by what they chose. ``identical``: both answered the same, so nobody was asked."""

    wins: int = 0
    losses: int = 0
    ties: int = 0
    bad: int = 0
    identical: int = 0

    @property
    def asked(self) -> int:
        return self.wins + self.losses + self.ties + self.bad

    @property
    def votes(self) -> int:
        """All that count, those that nobody was asked for included."""
        return self.asked + self.identical


@dataclass(frozen=True)
class Result:
    """What `Counts` say of side ``a``.

    Attributes:
        rate: share of all votes won, ties half; None without a vote.
        decided: share of the decided votes won; None without one.
        interval: of ``decided``, 95 %, right after any number of votes.
        word: one of `WORDS`: whether the interval lies above one half, around it, or below it.
        more: votes after which the interval leaves one half if they go on as they did, ties included; 0 if it has, None
            if that takes more than `MOST` decided ones, or never happens.
    """

    counts: Counts
    rate: float | None
    decided: float | None
    interval: tuple[float, float]
    word: str
    more: int | None


def result(counts: Counts) -> Result:
    """The judgement of these votes."""
    n = counts.votes
    if not n:
        return Result(counts, None, None, (0.0, 1.0), WORDS[1], None)
    decided = counts.wins + counts.losses
    low, high = interval(counts.wins, counts.losses)
    word = WORDS[0] if low > 0.5 else WORDS[2] if high < 0.5 else WORDS[1]
    left = more(counts.wins, counts.losses)
    left = None if left is None else math.ceil(left * n / decided)
    of_decided = counts.wins / decided if decided else None
    return Result(counts, 0.5 + (counts.wins - counts.losses) / (2 * n), of_decided, (low, high), word, left)


def evidence(wins: float, losses: float, rate: float = 0.5) -> float:
    """log M(rate): from log 20 on this rate is refused. Counts may be of votes to come, so they need not be whole."""
    mixed = math.lgamma(wins + 1) + math.lgamma(losses + 1) - math.lgamma(wins + losses + 2)
    return mixed - _log(wins, rate) - _log(losses, 1 - rate)


def _log(count: float, rate: float) -> float:
    return 0.0 if not count else count * math.log(rate) if rate > 0 else -math.inf


def interval(wins: float, losses: float, error: float = ERROR) -> tuple[float, float]:
    """The rates that are not refused."""
    limit, middle = -math.log(error), wins / (wins + losses) if wins + losses else 0.5

    def edge(far: float) -> float:
        if evidence(wins, losses, far) < limit:
            return far
        inside, outside = middle, far
        for _ in range(60):
            at = (inside + outside) / 2
            inside, outside = (at, outside) if evidence(wins, losses, at) < limit else (inside, at)
        return inside

    return edge(0.0), edge(1.0)


def more(wins: int, losses: int, error: float = ERROR) -> int | None:
    """How many decided votes at the present rate until one half is refused; None: more than `MOST`, or never."""
    n, limit = wins + losses, -math.log(error)
    if not n or wins == losses:
        return None
    for k in range(MOST + 1):
        if evidence(wins * (n + k) / n, losses * (n + k) / n) >= limit:
            return k
    return None
