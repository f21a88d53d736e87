"""Numbers -> better, no difference, worse or drifted, with the reasons. Pure; rewards are in nats (reward / beta).

The limits were chosen on the sweep in docs/learning.md: seven settings, eleven rates, three seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kto_core.data.splitting import FEWEST

from .intervals import Interval

BETTER, SAME, WORSE, DRIFTED = "better", "no difference", "worse", "drifted"
WORDS = (BETTER, SAME, WORSE, DRIFTED)

SURE = 0.99  # of the interval that decides. At 95 % one useless run in forty would be called better, here one in 200.
MOVED = 1.0  # nats an answer. Runs at 5e-7 move by 0.1 to 0.7, rounding included; runs that learned, by 10 and more.
MARGIN = 0.5  # nats. At 5e-7 a margin of 0.04 nats can be certain (± 0.007 in one run) and still means nothing.
LOST = 30.0  # nats. At the best rates good answers lose at most 20, at rates that destroy a model 40 to 10,000.
LOST_PER_TOKEN = 0.1  # nats: in an answer of 1,000 tokens, 30 nats are not much
MOVED_PER_TOKEN = 6.0  # nats. The best rates move a token by at most 3.8, rates that destroy a short answer by 12.
FORGOTTEN, NOTED = 1.5, 1.1  # perplexity after / before: a language lost, a price worth knowing


@dataclass(frozen=True)
class Measured:
    """What `judge` looks at.

    Attributes:
        questions: distinct ones with (good, bad) rows.
        moved, moved_per_token: mean |log π − log π_ref| of an answer, of a token.
        margin: mean reward of good minus bad answers. margin_sure: its interval at `SURE`, None: cannot be known.
        chosen: mean reward of good answers. chosen_interval: at 95 %. chosen_per_token: of their tokens.
        perplexity: on the neutral text, (before, after).
        beta: what rewards were divided by, to say the margin as the plots do.
    """

    questions: tuple[int, int]
    moved: float
    moved_per_token: float
    margin: float
    margin_sure: Interval | None
    chosen: float
    chosen_interval: Interval | None
    chosen_per_token: float
    perplexity: tuple[float, float]
    beta: float


@dataclass(frozen=True)
class Verdict:
    """A word of `WORDS` and why, as clauses that follow a colon."""

    word: str
    reasons: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """One sentence."""
        return said(self.word, self.reasons)


def said(word: str, reasons: Sequence[str]) -> str:
    """The sentence of a verdict."""
    return f"{word.capitalize()}: {'; '.join(reasons)}."


def judge(m: Measured) -> Verdict:
    """What these numbers say. Drift comes first: a model that lost its language may still have a fine margin."""
    if drift := _drift(m):
        return Verdict(DRIFTED, drift)
    if m.moved < MOVED:
        reason = f"training moved the log-prob of an answer by {m.moved:.2g} nats, and less than {MOVED:g} hardly shows"
        return Verdict(SAME, (reason,))
    moved = f"answers moved by {m.moved:.3g} nats"
    if min(m.questions) < FEWEST or m.margin_sure is None:
        good, bad = m.questions
        reason = (
            f"{good} questions with good answers and {bad} with bad ones are too few to tell; {FEWEST} each are needed"
        )
        return Verdict(SAME, (reason, moved))
    low, high = m.margin_sure
    margin = f"the reward margin is {m.beta * m.margin:+.3g}"
    if low <= 0 <= high:
        about = f"{m.beta * low:+.2g} to {m.beta * high:+.2g}"
        return Verdict(SAME, (f"{margin} and may be chance ({100 * SURE:.0f} % interval {about})", moved))
    if abs(m.margin) < MARGIN:
        small = f"{margin}, which is certain but small: {abs(m.margin):.2g} nats between a good and a bad answer"
        return Verdict(SAME, (small, moved))
    reasons = [f"{margin} and not chance", moved, *_good_answers(m), *_price(m)]
    return Verdict(BETTER if m.margin > 0 else WORSE, tuple(reasons))


def _drift(m: Measured) -> tuple[str, ...]:
    numbers = (m.moved, m.moved_per_token, m.margin, m.chosen, m.chosen_per_token, *m.perplexity)
    if not all(map(math.isfinite, numbers)):
        return ("log-probs became NaN or infinite; train again at a lower learning rate",)
    found = []
    if m.chosen < -LOST and m.chosen_per_token < -LOST_PER_TOKEN:
        found.append(f"good answers became less likely by {-m.chosen:.3g} nats")
    if m.moved_per_token > MOVED_PER_TOKEN:
        found.append(f"each token of an answer moved by {m.moved_per_token:.2g} nats")
    if m.perplexity[1] > FORGOTTEN * m.perplexity[0]:
        found.append("perplexity on neutral text rose from {:.3g} to {:.3g}".format(*m.perplexity))
    return (*found, "train again at a lower learning rate or a higher beta") if found else ()


def _good_answers(m: Measured) -> list[str]:
    if m.chosen_interval is None or m.chosen_interval[0] <= 0 <= m.chosen_interval[1]:
        return ["good answers are about as likely as before"]
    if m.chosen > 0:
        return [f"good answers became likelier by {m.chosen:.3g} nats"]
    return [f"good answers became less likely, too, by {-m.chosen:.3g} nats"]


def _price(m: Measured) -> list[str]:
    before, after = m.perplexity
    if after <= NOTED * before:
        return []
    return [f"perplexity on neutral text rose by {100 * (after / before - 1):.0f} %"]
