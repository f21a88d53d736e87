"""The rules: a run's state -> findings. Pure.

Limits are checked on the trainings of `benchmarks/learning_results.jsonl.gz` by `tests/health/test_recorded.py`.

No rule blames the data for what a learning rate may have done, and none the user for a rate that the program took.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median

from kto_core.data import contrast
from kto_core.planning.rate import short
from kto_core.runs.events import RunState

from .about import INFO, WARNING, About, Finding

FIRST = 10  # steps before which nothing is said of movement; the log says what the first three foretell
RECENT = 10  # logged steps that are averaged
LITTLE = 0.5  # nats an answer, of which nobody sees anything
NO_GAIN = 0.02  # of the loss: so little may be chance
FAR = 5.0  # of the good answers' reward below 0: they became exp(-50) times as likely at beta 0.1
FARTHER = 15.0  # of both rewards' mean size, whatever its sign
FALLING, FELL = 1.0, 3.0  # of both rewards below 0: worth a word, and a warning
WORSE = 0.01  # of the held-out loss above where it began
TURNED = 0.01  # of the held-out loss above its lowest, and this share of the gain:
TURNED_SHARE = 0.1
SPIKE, SPIKES, WINDOW = 10.0, 2, 50  # times the median before; how many; among so many logged steps
SINGLE = 100.0  # times the median: one is enough
ENTROPY = 0.25  # of what it was in the first steps
PURE, ENOUGH = 0.5, 5  # share of logged steps with one label only; of at least so many


def findings(state: RunState, about: About) -> list[Finding]:
    """What a run's log says, warnings first; [] if all is as it should be.

    Args:
        state: metrics may end anywhere: the rules work while the run trains.
    """
    if nan := _nan(state, about):
        return [nan]
    look = _Look(state, about)
    found = [rule(look) for rule in RULES]
    said = [f for f in found if f is not None]
    kinds = {f.kind for f in said}
    if kinds & {"large", "worse"}:  # they say why the others are so
        said = [f for f in said if f.kind not in ("falling", "alike", "little", "entropy", "overfitting")]
    return sorted(said, key=lambda f: f.level != WARNING)


@dataclass(frozen=True)
class _Newest:
    """The numbers of now: of the validation rows where they are fresh, else means over the last logged steps."""

    chosen: float
    rejected: float
    loss: float
    held_out: bool

    @property
    def size(self) -> float:
        return (abs(self.chosen) + abs(self.rejected)) / 2

    @property
    def margin(self) -> float:
        return self.chosen - self.rejected


class _Look:
    """A state with what several rules ask of it."""

    def __init__(self, state: RunState, about: About):
        self.state, self.about = state, about
        self.newest = self._newest()

    def recent(self, name: str) -> float | None:
        """Mean of the last logged values: at most `RECENT`, and of a short run a fifth of all."""
        points = self.state.series(name)
        if not points:
            return None
        return fmean(v for _, v in points[-max(1, min(RECENT, len(points) // 5)) :])

    def _newest(self) -> _Newest | None:
        names = ("rewards/chosen", "rewards/rejected", "loss")
        held = [self.state.series(f"eval_{name}") for name in names]
        if all(held) and held[0][-1][0] >= 0.8 * self.state.step:
            good, bad, loss = (points[-1][1] for points in held)
            return _Newest(good, bad, loss, held_out=True)
        chosen, rejected, mean = map(self.recent, names)
        if chosen is None or rejected is None or mean is None:
            return None
        return _Newest(chosen, rejected, mean, held_out=False)

    @property
    def begun(self) -> bool:
        total = self.state.total_steps or math.inf
        return self.state.step >= min(FIRST, total)


def _nan(state: RunState, about: About) -> Finding | None:
    """A loss or a gradient that is no number: who is to blame is told by when it came."""
    rows = [m for m in state.metrics if "loss" in m]
    bad = next((m for m in rows if m["loss"] is None), None)
    half = about.dtype == "float16"  # whose scaler skips steps with infinite gradients
    gradient = None if half else next((m for m in rows if "grad_norm" in m and m["grad_norm"] is None), None)
    ended = state.state == "failed" and "NaN" in state.error
    if bad is None and gradient is None and not ended:
        return None
    first = min((m["step"] for m in (bad, gradient) if m is not None), default=state.step + 1)
    whole = [m for m in rows if m["step"] < first and m["loss"] is not None]
    what = "The gradient" if bad is None and not ended else "The loss"
    if not whole:
        whose = "the adapter it continues from or the base model's" if about.continues else "the base model's"
        return Finding(
            "nan", WARNING,
            f"{what} was NaN at step {first}, before anything was changed, so it is not the learning rate.",
            f"Look at {whose} weights: fetch them again, or choose another model. With dtype float16, choose bfloat16 "
            "or float32 first.",
        )  # fmt: skip
    grew = _Look(state, about)
    far = grew.newest is not None and (grew.newest.chosen < -FALLING or grew.newest.size > FAR)
    if far or _spikes_of([v for step, v in state.series("grad_norm") if step < first]):
        return Finding(
            "nan", WARNING,
            f"{what} became NaN at step {first}; rewards or gradients had grown far before, so it is the rate.",
            f"{about.lower()}.",
        )  # fmt: skip
    if half:
        return Finding(
            "nan", WARNING, f"{what} became NaN at step {first}, and nothing grew before: float16 probably overflowed.",
            "Choose dtype bfloat16 or float32.",
        )  # fmt: skip
    return Finding(
        "nan", WARNING,
        f"{what} became NaN at step {first} without a sign before. The log does not tell whether the rate or a row is "
        "why.",
        f"{about.lower()}; if it comes at the same step again, look at the rows of that step.",
    )  # fmt: skip


def _large(look: _Look) -> Finding | None:
    n = look.newest
    if n is None or (n.chosen > -FAR and n.size < FARTHER):
        return None
    kl = look.state.latest("eval_kl" if n.held_out else "kl")
    hidden = " KL shows 0 because it cannot fall below it, so it hides this." if kl is not None and kl < 0.01 else ""
    where = "On validation rows good" if n.held_out else "Good"
    return Finding(
        "large", WARNING,
        f"The model moved too far: it drifts. {where} answers have a reward of {n.chosen:+.3g} and bad ones of "
        f"{n.rejected:+.3g}.{hidden}",
        f"{look.about.lower()}; or raise beta, which is {look.about.beta:g}.",
    )  # fmt: skip


def _little(look: _Look) -> Finding | None:
    n, s, about = look.newest, look.state, look.about
    if n is None or not look.begun or not s.total_steps:
        return None
    moved = n.size / about.beta
    whole = moved / max(about.done(s.step, s.total_steps), 1e-9)
    if whole >= LITTLE or about.rest - n.loss > NO_GAIN:
        return None
    so_far = (
        f"After {s.step:,} of {s.total_steps:,} steps an answer has moved by {moved:.2g} nats, which is almost nothing"
    )
    more = "" if s.step >= s.total_steps else f"; at the end it will be about {whole:.2g}"
    return Finding("little", WARNING, f"{so_far}{more}.", f"{about.higher()}.")


def _worse(look: _Look) -> Finding | None:
    """A held-out loss above where it began, at the end or late."""
    points = look.state.series("eval_loss")
    if not points or look.newest is None or not look.newest.held_out or not look.begun:
        return None
    above, n = points[-1][1] - look.about.rest, look.newest
    if above < WORSE or n.size / look.about.beta < LITTLE:
        return None
    return Finding(
        "worse", WARNING,
        f"The validation loss is {points[-1][1]:.3f}, above the {look.about.rest:.3f} from before training.",
        f"{look.about.lower()}.",
    )  # fmt: skip


def _overfitting(look: _Look) -> Finding | None:
    points = look.state.series("eval_loss")
    if len(points) < 3:
        return None
    at, lowest = min(points, key=lambda p: p[1])
    limit = lowest + max(TURNED, TURNED_SHARE * max(0.0, look.about.rest - lowest))
    if any(v <= limit for _, v in points[-2:]):
        return None
    epochs = look.state.epoch or look.about.epochs
    fewer = "Lower num_train_epochs, or set" if epochs > 1 else "Set"
    return Finding(
        "overfitting", WARNING,
        f"The validation loss was lowest at step {at:,} ({lowest:.3f}) and has risen to {points[-1][1]:.3f}: the model "
        "learns its rows by heart.",
        f"{fewer} max_steps to about {at:,}; or raise beta, which is {look.about.beta:g}.",
    )  # fmt: skip


def _spikes_of(norms: list[float]) -> list[float]:
    """How many times the median of those before the last norms are, of those that stand out."""
    found = []
    for i in range(max(5, len(norms) - WINDOW), len(norms)):
        before = median(norms[max(0, i - 20) : i])
        if before > 0 and norms[i] > SPIKE * before:
            found.append(norms[i] / before)
    return found if len(found) >= SPIKES or any(f > SINGLE for f in found) else []


def _spikes(look: _Look) -> Finding | None:
    found = _spikes_of([v for _, v in look.state.series("grad_norm")[-WINDOW - 20 :]])
    if not found:
        return None
    many = "once" if len(found) == 1 else f"{len(found)} times"
    return Finding(
        "spikes", WARNING,
        f"In the last {WINDOW} logged steps the gradient norm jumped {many}, to up to {max(found):,.0f} times what it "
        "was before.",
        f"{look.about.lower()}; or lower max_grad_norm.",
    )  # fmt: skip


def _entropy(look: _Look) -> Finding | None:
    points = look.state.series("entropy")
    now = look.recent("entropy")
    if now is None or len(points) < 2 * RECENT:
        return None
    before = fmean(v for _, v in points[:3])
    if before <= 0 or now > ENTROPY * before:
        return None
    return Finding(
        "entropy", WARNING,
        f"The entropy fell from {before:.3g} to {now:.3g}: the model becomes certain of few words "
        "and may repeat itself.",
        f"{look.about.lower()}; or raise beta, which is {look.about.beta:g}.",
    )  # fmt: skip


def _labels(look: _Look) -> Finding | None:
    """Steps whose rows all have one label log no margin."""
    rows = [m for m in look.state.metrics[-WINDOW:] if "loss" in m]
    rows = [m for m in rows if "rewards/chosen" in m or "rewards/rejected" in m]
    pure = [m for m in rows if not ("rewards/chosen" in m and "rewards/rejected" in m)]
    if len(rows) < ENOUGH or len(pure) <= PURE * len(rows):
        return None
    about = look.about
    few, name = min((about.good, "good"), (about.bad, "bad"))
    needed = f" to at least {math.ceil((about.good + about.bad) / few)} rows" if few else ""
    rare = f"; there are {few:,} {name} ones among {about.good + about.bad:,}" if few else ""
    return Finding(
        "labels", WARNING,
        f"In {len(pure)} of the last {len(rows)} logged steps all rows had one label{rare}, so these steps have no "
        "contrast.",
        f"Raise gradient_accumulation_steps so that a step, now {about.batch} rows, grows{needed}.",
    )  # fmt: skip


def _falling(look: _Look) -> Finding | None:
    n = look.newest
    if n is None or not look.begun or n.chosen > -FALLING or n.rejected > -FALLING:
        return None
    level = WARNING if n.chosen < -FELL and n.margin < -n.chosen else INFO
    beta = f"; or try beta 0.5 instead of {look.about.beta:g}" if look.about.beta < 0.5 else ""
    return Finding(
        "falling", level,
        f"Good answers become less likely, too: their reward is {n.chosen:+.2f}, that of bad ones {n.rejected:+.2f}.",
        f"{look.about.lower()}{beta}.",
    )  # fmt: skip


def _alike(look: _Look) -> Finding | None:
    """A loss that stays where it began although answers moved: good and bad move together."""
    n, s, about = look.newest, look.state, look.about
    if n is None or not look.begun or s.step < 2 * FIRST or not s.total_steps or s.step < 0.5 * s.total_steps:
        return None
    if about.rest - n.loss > NO_GAIN / 2 or n.size / about.beta < LITTLE or abs(n.margin) > 0.1:
        return None
    said = f"Good and bad answers move alike: the margin is {n.margin:+.2g} after {s.step:,} steps."
    if about.rate_by == "user":
        rate = f", which is {short(about.rate)}" if about.rate is not None else ""
        return Finding("alike", INFO, said, f"Set learning_rate{rate} to auto, before anything else is tried.")
    change = f"{about.higher()}. If that changes nothing, look for contradictions in the Data tab."
    return Finding("alike", INFO, said, change)


def _lengths(look: _Look) -> Finding | None:
    try:
        said = contrast.hint(look.about.lengths)
    except TypeError:  # a file that somebody wrote
        return None
    sentence, found, change = said.partition(". If ")
    return Finding("lengths", INFO, f"{sentence}.", f"If {change}") if found else None


RULES: tuple[Callable[[_Look], Finding | None], ...] = (
    _large, _worse, _overfitting, _little, _spikes, _entropy, _labels, _falling, _alike, _lengths,
)  # fmt: skip
