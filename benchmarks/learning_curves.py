"""The sweep's results as curves over the learning rate, and the rules that would choose a rate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np
from learning_plan import TOO_MUCH


def mean(records: list[dict], name: str) -> float:
    """Over the seeds; nan where one has no number (a training that broke)."""
    values = [r.get(name) for r in records]
    return float("nan") if None in values or not values else float(np.mean(values))


class Curve:
    """One setting under one change: rate -> the seeds' results, in order of the rates."""

    def __init__(self, setting: str, change: str, records: list[dict]):
        self.setting, self.change, self.first = setting, change, records[0]
        by_rate = defaultdict(list)
        for r in records:
            by_rate[r["rate"]].append(r)
        self.at = dict(sorted(by_rate.items()))
        self.rates = [r for r in self.at if r < TOO_MUCH]
        self.losses = np.array([mean(self.at[r], "loss") for r in self.rates])
        self.losses[np.isnan(self.losses)] = 1.0  # broken: as bad as it gets
        self.steps = mean(records, "steps")

    @property
    def lowest(self) -> int:
        return int(np.argmin(self.losses))

    @property
    def inside(self) -> bool:
        """Whether rates on both sides of the best one are worse."""
        return 0 < self.lowest < len(self.rates) - 1

    def best(self) -> float:
        """The rate of the lowest loss: of the parabola through the three points around it, over log rate."""
        i = self.lowest
        if not self.inside:
            return self.rates[i]
        x, y = np.log10(self.rates[i - 1 : i + 2]), self.losses[i - 1 : i + 2]
        a, b, _ = np.polyfit(x, y, 2)
        return float(10 ** np.clip(-b / (2 * a), x[0], x[2])) if a > 0 else self.rates[i]

    def loss(self, rate: float) -> float:
        """Between the measured rates straight lines over the logarithm; beyond them the last one's."""
        return float(np.interp(np.log10(rate), np.log10(self.rates), self.losses))

    def near(self, rate: float) -> bool:
        """Whether the rate is among the measured ones or little beyond: more is not known of it."""
        return self.rates[0] / 1.5 < rate < self.rates[-1] * 1.5

    def gained(self, rate: float) -> float:
        """Share of the best rate's gain; 0 is the untrained model, whose loss is one half."""
        return (0.5 - self.loss(rate)) / max(1e-9, 0.5 - self.losses.min())

    def enough(self, share: float = 0.9) -> float:
        """The lowest measured rate with so much of the best one's gain."""
        return next(r for r in self.rates if self.gained(r) >= share)


def curves(results: list[dict]) -> dict[tuple[str, str], Curve]:
    found = defaultdict(list)
    for r in results:
        found[r["setting"], r["change"]].append(r)
    return {k: Curve(*k, v) for k, v in found.items() if any(r["rate"] < TOO_MUCH for r in v)}


def fitted(train: list[Curve]) -> Callable[[Curve], float]:
    """log(best rate) by least squares over steps, alpha and beta of the curves with a best rate inside."""
    use = [c for c in train if c.inside]

    def features(c: Curve) -> list[float]:
        return [1.0, np.log(c.steps), np.log(c.first["alpha"]), np.log(c.first["beta"])]

    if not use:
        return lambda c: float("nan")
    a, y = np.array([features(c) for c in use]), np.log([c.best() for c in use])
    vary = [i for i in range(a.shape[1]) if i == 0 or np.ptp(a[:, i]) > 0]
    solved = np.linalg.lstsq(a[:, vary], y, rcond=None)[0]
    rule = lambda c: float(np.exp(np.dot(np.array(features(c))[vary], solved)))  # noqa: E731
    names = np.array(["constant", "steps", "alpha", "beta"])[vary]
    rule.said = ", ".join(f"{n} {k:+.2f}" for n, k in zip(names, solved, strict=True))
    return rule


def rules(used: list[Curve]) -> dict[str, Callable[[Curve], float]]:
    """The rule fitted to the other settings never sees the one it is judged on."""
    constant = {f"always {r:g}": (lambda c, r=r: r) for r in (5e-7, 5e-6, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4)}
    others = {s: [c for c in used if c.setting != s] for s in {c.setting for c in used}}
    fit = {s: fitted(o) for s, o in others.items()}
    middle = {s: np.exp(np.mean(np.log([c.best() for c in o]))) if o else float("nan") for s, o in others.items()}
    return constant | {
        "0.08 / (steps × alpha), within 5e-6 and 2e-4": lambda c: min(
            2e-4, max(5e-6, 0.08 / (c.steps * c.first["alpha"]))
        ),
        "0.08 / (steps × alpha)": lambda c: 0.08 / (c.steps * c.first["alpha"]),
        "middle of the other settings' best": lambda c: middle[c.setting],
        "fitted to the other settings": lambda c: fit[c.setting](c),
    }
