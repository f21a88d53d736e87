"""A metric of several runs over each other: by step, or by the time that they worked. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from kto_core.runs.events import RunState

Points = list[tuple[float, float]]
METRICS = ("loss", "eval_loss", "rewards/margins", "eval_rewards/margins", "rewards/chosen", "eval_rewards/chosen",
           "rewards/rejected", "eval_rewards/rejected", "logps/chosen", "eval_logps/chosen", "logps/rejected",
           "eval_logps/rejected", "kl", "eval_kl", "grad_norm", "learning_rate")  # fmt: skip
PAUSE = 20  # times the usual time between two rows, and at least
LEAST = 60.0  # seconds: then nobody worked in between
UNITS = (("seconds", 1.0, 300.0), ("minutes", 60.0, 18_000.0), ("hours", 3600.0, math.inf))  # size, used up to


def by_step(state: RunState, metric: str) -> Points:
    """(step, value) in order of steps; a value that is no number is left out."""
    return [(step, value) for step, value in state.series(metric) if math.isfinite(value)]


def by_time(state: RunState, metric: str) -> Points:
    """(seconds since the first row, value) in order of time. A pause between two rows counts as a usual step."""
    rows = [m for m in state.metrics if isinstance(m.get("t"), int | float)]
    gaps = [max(0.0, b["t"] - a["t"]) for a, b in zip(rows, rows[1:], strict=False)]
    usual = median(g for g in gaps if g > 0) if any(gaps) else 0.0
    most = max(LEAST, PAUSE * usual)
    points, now = [], 0.0
    for row, gap in zip(rows, [0.0, *gaps], strict=False):
        now += gap if gap <= most else usual
        value = row.get(metric)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            points.append((now, float(value)))
    return points


def in_unit(lines: Sequence[Points]) -> tuple[str, list[Points]]:
    """Times in seconds as (unit, times in the unit that suits the longest), to two digits behind the point."""
    longest = max((points[-1][0] for points in lines if points), default=0.0)
    unit, size, _ = next(u for u in UNITS if longest < u[2])
    return unit, [[(round(x / size, 2), y) for x, y in points] for points in lines]
