"""Which rate is tried next, how long a trial is, and which rate is taken. Pure: only the trials' numbers count.

Checked against the trials of ten steps in `benchmarks/learning_results.jsonl.gz` by `tests/training/test_rate.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kto_core.planning.rate import short
from kto_core.runs.rates import Trial

SHARE = 0.1  # of the run's own time that the trials may take
FLOOR = {True: 120.0, False: 40.0}  # seconds that they may take in a run however short, on a GPU and without one
FULL = 10  # steps of a trial after which the lowest loss tells most; after fewer it is at too high a rate
SIZES = ((5, FULL), (5, 7), (5, 5), (4, 4), (3, 4), (3, 3))  # (most rates, steps of each), the first that is in time
JUDGED = 0.5  # what judging a row costs of training on it: forward only
AS_GOOD = 0.05  # of the best rate's gain: so much worse is as good, and the lower rate drifts less
FALL = 5.0  # of the good answers' reward, where the loss of a row is all but flat: so far is drift
CERTAIN = 2.0  # standard errors that the best rate's gain must have


@dataclass(frozen=True)
class Size:
    """How much is tried: at most so many rates, and steps of each; ``seconds`` that this is expected to take."""

    rates: int
    steps: int
    seconds: float


def size(step: float, rows: float, run_steps: int, most_steps: int, gpu: bool) -> tuple[Size | None, float]:
    """The largest size that is in time, or None, and the seconds that are allowed.

    Args:
        step: seconds of one. rows: that judge, in steps' worth of rows. most_steps: that a trial has rows for.
    """
    allowed = max(FLOOR[gpu], SHARE * run_steps * step)
    for rates, steps in SIZES:
        steps = min(steps, most_steps)
        seconds = rates * step * (steps + rows * JUDGED)
        if seconds <= allowed:
            return Size(rates, steps, seconds), allowed
    return None, allowed


def nearest(rates: tuple[float, ...], most: int) -> tuple[float, ...]:
    """At most so many of them around the middle one, which is in the middle again; lower ones rather than higher."""
    middle = len(rates) // 2
    return rates[max(0, middle - most // 2) : middle + (most + 1) // 2]


def usable(trial: Trial) -> bool:
    """Its loss is a number, and good answers have not become far less likely."""
    return trial.loss is not None and trial.chosen > -FALL


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The lowest loss of those that can be used."""
    return min(filter(usable, trials), key=_loss, default=None)


def next_rate(trials: Sequence[Trial], rates: Sequence[float], rest: float) -> float | None:
    """The rate to try next, or None: the middle one, then upwards and downwards for as long as that can be better.

    Args:
        rates: all that may be tried, lowest first. rest: the loss before any step.
    """
    known, middle = {t.rate: t for t in trials}, len(rates) // 2
    if rates[middle] not in known:
        return rates[middle]
    best = best_of(trials)
    lowest = _loss(best) if best is not None else rest

    def close(trial: Trial) -> bool:
        return usable(trial) and _loss(trial) <= lowest + AS_GOOD * max(0.0, rest - lowest)

    higher = next((i for i in range(middle + 1, len(rates)) if rates[i] not in known), None)
    if higher is not None and close(known[rates[higher - 1]]):
        return rates[higher]
    lower = next((i for i in range(middle - 1, -1, -1) if rates[i] not in known), None)
    if lower is not None and (close(above := known[rates[lower + 1]]) or not usable(above)):
        return rates[lower]
    return None


def choose(trials: Sequence[Trial], rest: float, rule: float) -> tuple[float, str, str]:
    """The rate to train with, by what ("trials" or "rule") and why, a sentence.

    The lowest loss decides; of rates that are as good as the best one the lowest. Where the rows cannot tell the rates
    apart the rule does, within what can be used.
    """
    best = best_of(trials)
    if best is None:
        lowest = min(t.rate for t in trials)
        why = "Good answers became far less likely at every rate that was tried, or the loss became NaN."
        return lowest / math.sqrt(10), "trials", f"{why} The run takes a rate below all of them."
    gain = rest - _loss(best)
    if gain <= max(1e-3, CERTAIN * noise(best)):
        fit = [t.rate for t in trials if usable(t)]
        why = "No rate lowered the loss on the held-out rows by more than chance."
        return min(max(rule, fit[0]), fit[-1]), "rule", f"{why} The rule decides."
    close = [t for t in trials if usable(t) and t.rate <= best.rate and _loss(t) <= _loss(best) + AS_GOOD * gain]
    if close[0] is best:
        return best.rate, "trials", "It has the lowest loss on rows that it was not trained on."
    return (
        close[0].rate,
        "trials",
        f"Its loss is as good as the lowest, at {short(best.rate)}, and it changes less.",
    )


def for_run(rate: float, steps: int) -> tuple[float, str]:
    """The rate for the run of one that trials of so few steps found, and a sentence about the difference, if any.

    As the best rate falls with the root of the steps (`planning.rate`): on the sweep's trials of three steps this
    raises the worst gain from 34 to 68 % and leaves the mean.
    """
    if steps >= FULL:
        return rate, ""
    share = math.sqrt(steps / FULL)
    return rate * share, f"Trials of {steps} steps find too high a rate, so the run takes {share:.2f} of {short(rate)}."


def noise(trial: Trial) -> float:
    """Standard error of a trial's mean loss, from its batches."""
    n = len(trial.losses)
    if n < 2:
        return 0.0
    mean = sum(trial.losses) / n
    return math.sqrt(sum((x - mean) ** 2 for x in trial.losses) / (n - 1) / n)


def _loss(trial: Trial) -> float:
    return trial.loss if trial.loss is not None else math.inf
