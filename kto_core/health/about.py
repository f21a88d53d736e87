"""What the rules know of a run beside its log, and what they say. Pure data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from kto_core.planning.rate import short

if TYPE_CHECKING:
    from kto_core.config.run_config import RunConfig

WARNING, INFO = "warning", "info"


@dataclass(frozen=True)
class Finding:
    """One thing that a log says.

    Attributes:
        kind: a word by which it is known again: nan, large, little, worse, overfitting, spikes, entropy, labels,
            falling, alike, lengths. level: "warning", or "info" for what may well be meant.
        sentence: what is seen, with its numbers. change: what to change, a sentence.
    """

    kind: str
    level: str
    sentence: str
    change: str

    @property
    def text(self) -> str:
        return f"{self.sentence} {self.change}"

    def to_dict(self) -> dict[str, str]:
        """JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class About:
    """Settings and data of a run, as far as rules need them.

    Attributes:
        rate: peak learning rate in use; None before it is known. rate_by: "auto", "rule", or "user" for a number.
        schedule, warmup: of the rate. batch: rows of a step. good, bad: training rows. lengths: of both labels'
            answers (`data.contrast.Contrast.lengths`). continues: from an adapter, whose weights may be at fault.
    """

    rate: float | None = None
    rate_by: str = "user"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    schedule: str = "cosine"
    warmup: float = 0.1
    epochs: float = 1.0
    batch: int = 32
    dtype: str = "auto"
    continues: bool = False
    good: int = 0
    bad: int = 0
    lengths: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: RunConfig, data: dict[str, Any], rate: float | None = None) -> About:
        """Of a run's settings and its dataset.json. ``rate``: the one in use, where it was found or computed."""
        set_by_hand = isinstance(config.learning_rate, float)
        train, report = _part(data, "train"), _part(data, "report")
        counts = [n if isinstance(n := train.get(k), int) else 0 for k in ("desirable", "undesirable")]
        return cls(
            rate=config.learning_rate if isinstance(config.learning_rate, float) else rate,
            rate_by="user" if set_by_hand else str(config.learning_rate),
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
            schedule=config.lr_scheduler_type,
            warmup=config.warmup_ratio,
            epochs=config.num_train_epochs,
            batch=config.effective_batch_size,
            dtype=config.dtype,
            continues=bool(config.adapter),
            good=counts[0],
            bad=counts[1],
            lengths=_part(report, "answers"),
        )

    @property
    def rest(self) -> float:
        """The loss before any step: half the mean weight of a row."""
        rows = self.good + self.bad
        share = self.good / rows if rows else 0.5
        return 0.5 * (share * self.desirable_weight + (1 - share) * self.undesirable_weight)

    def lower(self) -> str:
        """How to get a lower learning rate, without a full stop."""
        if self.rate is None:
            return "Lower learning_rate"
        if self.rate_by == "user":
            return f"Lower learning_rate, which is {short(self.rate)}, or set it to auto"
        third = float(f"{self.rate / 3:.0e}")
        return f"Set learning_rate to about {short(third)}: {self.rate_by} took {short(self.rate)}"

    def higher(self) -> str:
        """How to get a higher one, without a full stop."""
        if self.rate is None:
            return "Raise learning_rate"
        if self.rate_by == "user":
            return f"Raise learning_rate, which is {short(self.rate)}, or set it to auto"
        thrice = float(f"{self.rate * 3:.0e}")
        took = f"{self.rate_by} took {short(self.rate)}"
        return f"Set learning_rate to about {short(thrice)}, or train for more steps: {took}"

    def done(self, step: int, total: int) -> float:
        """Share of the run's movement that its schedule allows in ``step`` of ``total`` steps: the rate, summed."""
        if step >= total:
            return 1.0
        warm = math.ceil(self.warmup * total) if self.schedule != "constant" else 0
        rest = max(1, total - warm)

        def rate(i: int) -> float:
            if i < warm:
                return (i + 1) / (warm + 1)
            at = (i - warm) / rest
            return {"cosine": (1 + math.cos(math.pi * at)) / 2, "linear": 1 - at}.get(self.schedule, 1.0)

        stride = max(1, total // 1000)
        whole = sum(rate(i) for i in range(0, total, stride))
        return sum(rate(i) for i in range(0, step, stride)) / whole if whole else 1.0


def _part(data: dict[str, Any], name: str) -> dict[str, Any]:
    """A dictionary within one of a file that anybody may have written."""
    found = data.get(name)
    return found if isinstance(found, dict) else {}
