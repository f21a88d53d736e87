"""How a run's learning rate was found: RUN/rate.json, written whole after each trial, read within bounds.

A run that goes on finds its rate there, and tries again only what was not tried yet.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kto_core.files import write_whole
from kto_core.guards import bounded

FILE = "rate.json"
MOST = 32  # trials, and numbers of one, that are read
TEXT = 500  # characters


@dataclass(frozen=True)
class Trial:
    """A few steps at one rate, judged on rows that it did not train on.

    Attributes:
        loss: mean over these rows; None: it is no number. losses: of each batch of them, the same for all trials.
        margin, chosen, rejected: rewards. nats: how far an answer's log-prob moved, the mean over batches and labels.
        seconds: that it took.
    """

    rate: float
    loss: float | None
    losses: tuple[float, ...] = ()
    margin: float = 0.0
    chosen: float = 0.0
    rejected: float = 0.0
    nats: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Found:
    """A run's learning rate and how it was found.

    Attributes:
        rate: the peak; None while it is being found. by: "trials" or "rule". reason: a sentence.
        rule: what the rule says. most: trials. steps: of one trial. rows: that judge. rest: their loss before any step.
        key: of the settings and rows; other trials are of another run. trials: in order of the rates.
    """

    rate: float | None = None
    by: str = ""
    reason: str = ""
    rule: float = 0.0
    most: int = 0
    steps: int = 0
    rows: int = 0
    rest: float = 0.5
    key: str = ""
    trials: tuple[Trial, ...] = field(default=())

    def with_trial(self, trial: Trial) -> Found:
        """With one more."""
        return replace(self, trials=tuple(sorted((*self.trials, trial), key=lambda t: t.rate)))


def write(run_dir: Path, found: Found) -> None:
    """Keep it in the run's folder. Raises OSError."""
    write_whole(run_dir / FILE, json.dumps(asdict(found), indent=1), sync=True)


def read(run_dir: Path) -> Found | None:
    """What was found, as far as the file can be used; None where there is none, or it is of another form."""
    try:
        values = json.loads(bounded.read_text(run_dir / FILE))
        trials = tuple(_trial(t) for t in values["trials"][:MOST])
        rate = values["rate"]
        return Found(
            rate=None if rate is None else _number(rate, above=0.0),
            by=_text(values["by"]),
            reason=_text(values["reason"]),
            rule=_number(values["rule"]),
            most=int(_number(values["most"])),
            steps=int(_number(values["steps"])),
            rows=int(_number(values["rows"])),
            rest=_number(values["rest"]),
            key=_text(values["key"]),
            trials=trials,
        )
    except (OSError, bounded.Unreadable, ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None


def _trial(values: dict[str, Any]) -> Trial:
    numbers: Callable[[str], float] = lambda name: _number(values[name])  # noqa: E731
    loss = values["loss"]
    return Trial(
        rate=_number(values["rate"], above=0.0),
        loss=None if loss is None else _number(loss),
        losses=tuple(_number(v) for v in values["losses"][: MOST * MOST]),
        **{n: numbers(n) for n in ("margin", "chosen", "rejected", "nats", "seconds")},
    )


def _number(value: object, above: float = -math.inf) -> float:
    """A finite number. Raises TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(value)
    if not math.isfinite(value) or value <= above:
        raise ValueError(value)
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value[:TEXT]
