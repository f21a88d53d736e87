"""The learning rate before a step is made: a rule, the rates that are tried around it, and what a rate will do.

The rule is a fit to the sweep in docs/learning.md: the best rate falls with the root of the number of steps and with
alpha, in whose product with the rate the adapter grows; that it falls with the model's width is what others found.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .counting import shape_of

if TYPE_CHECKING:
    from kto_core.config.run_config import RunConfig

FITTED, WIDTH = 0.057, 576  # of rate × alpha × √steps, for a model of that hidden size
LOWEST, HIGHEST = 1e-6, 1e-3  # what the rule answers within
FACTOR = math.sqrt(10)  # between neighboring rates of the trials
AROUND = 2  # of them on each side of the rule's
NOTHING, LITTLE, FAR = 1 / 20, 1 / 6, 20  # shares of the rule's rate up to which, and from which, a run disappoints


@dataclass(frozen=True)
class RatePlan:
    """What a run's learning rate is, before it starts.

    Attributes:
        learning_rate: as configured. rule: the rule's rate. tried: the rates that `auto` tries, lowest first.
        gauge: what the run will do, a sentence; "" if nothing is to be said.
    """

    learning_rate: float | str
    rule: float
    tried: tuple[float, ...]
    gauge: str

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self) | {"tried": list(self.tried)}


def plan(config: RunConfig, steps: int) -> RatePlan:
    """For a run of so many optimizer steps."""
    rule = by_rule(config, steps)
    tried = around(rule) if config.learning_rate == "auto" else ()
    return RatePlan(config.learning_rate, rule, tried, gauge(config, steps))


def by_rule(config: RunConfig, steps: int) -> float:
    """The rate that the rule gives, to two digits."""
    width = max(1, shape_of(config).hidden)
    rate = FITTED / (config.lora_alpha * math.sqrt(max(1, steps))) * math.sqrt(WIDTH / width)
    return rounded(min(HIGHEST, max(LOWEST, rate)))


def around(rule: float) -> tuple[float, ...]:
    """The rates to try, lowest first."""
    return tuple(rounded(rule * FACTOR**i) for i in range(-AROUND, AROUND + 1))


def rounded(rate: float) -> float:
    """To two digits: more would say more than anybody knows."""
    return float(f"{rate:.1e}")


def gauge(config: RunConfig, steps: int) -> str:
    """What a run of so many steps will do at its rate, a sentence."""
    if steps < 1:
        return ""
    rule, rate = by_rule(config, steps), config.learning_rate
    about, many = f"about {short(float(f'{rule:.0e}'))}", f"{steps:,} step{'s' * (steps != 1)}"
    if rate == "auto":
        tried = around(rule)
        span = f"{short(tried[0])} to {short(tried[-1])}"
        return f"auto tries learning rates from {span} before training; the rule says {about}."
    if rate == "rule":
        return f"The rule takes a learning rate of {short(rule)} for {many}."
    assert isinstance(rate, float)
    at, share = f"At {short(rate)} and {many} this run will", rate / rule
    if share <= NOTHING:
        return f"{at} change almost nothing; auto would take {about}."
    if share <= LITTLE:
        return f"{at} change little; auto would take {about}."
    if share >= FAR:
        return f"{at} probably drift: good answers would become unlikely, too. auto would take {about}."
    return ""


def short(rate: float) -> str:
    """2.9e-4 of 0.00029: a rate as people write it."""
    digits, power = f"{rate:.5e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
