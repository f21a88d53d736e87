"""The trainings of the sweep, in order of worth: whenever it ends, what is there is balanced over the settings."""

from __future__ import annotations

from dataclasses import dataclass, replace

RATES = (5e-7, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3)
TOO_MUCH = 1e-2  # once, to see what is said of a model that is broken
SEEDS = (0, 1, 2)
MAIN_ROWS = 2000  # rows of the base curves; the change "all rows" takes the rest
PROBE_STEPS = 20


@dataclass(frozen=True)
class Job:
    """One training. ``rows``: 0 takes all. ``start``: which of LoRA's two matrices begins at 0. ``change``: what is not
    as in the base curve. ``show``: also generate answers."""

    setting: str
    change: str
    rate: float
    seed: int
    beta: float = 0.1
    r: int = 64
    alpha: int = 128
    batch: int = 32
    start: str = "B=0"
    rows: int = MAIN_ROWS
    epochs: float = 1.0
    max_steps: int = -1
    schedule: str = "cosine"
    show: bool = False

    @property
    def id(self) -> str:
        return f"{self.setting}|{self.change}|{self.rate:g}|{self.seed}"


# name, what is other, the four rates as places from the best one of the base curve. A change to more movement for a
# rate looks further down, one to less further up.
CHANGES = (
    ("beta 0.5", {"beta": 0.5}, (-1, 0, 1, 2)),
    ("A = 0", {"start": "A=0"}, (-3, -2, -1, 0)),
    ("r 16", {"r": 16, "alpha": 32}, (-1, 0, 1, 2)),
    ("batch 8, 1000 rows", {"batch": 8, "rows": 1000}, (-2, -1, 0, 1)),
    ("300 rows", {"rows": 300}, (-1, 0, 1, 2)),
    ("alpha 32", {"alpha": 32}, (-1, 0, 1, 2)),
    ("all rows", {"rows": 0}, (-2, -1, 0, 1)),
    ("beta 0.25", {"beta": 0.25}, (-1, 0, 1, 2)),
    ("1000 rows", {"rows": 1000}, (-1, 0, 1, 2)),
)
PAIRS = (
    ("beta 0.5, r 16", {"beta": 0.5, "r": 16, "alpha": 32}, (-1, 0, 1, 2)),
    ("3 epochs, 300 rows", {"epochs": 3.0, "rows": 300}, (-1, 0, 1, 2)),
    ("beta 0.5, A = 0", {"beta": 0.5, "start": "A=0"}, (-3, -2, -1, 0)),
    ("r 16, batch 8, 300 rows", {"r": 16, "alpha": 32, "batch": 8, "rows": 300}, (-1, 0, 1, 2)),
)


# ---- the list --------------------------------------------------------------------------------------------------------


def stages(settings: dict, done: dict[str, dict], plan: dict | None = None) -> list[tuple[str, list[Job]]]:
    """All jobs in order of worth, as (name, jobs) of each stage; jobs of a stage are of equal worth.

    Args:
        settings: name -> facts (``rows``). done: id -> result; the changes' rates hang on the base curve of the first
            seed, so they are listed once that is there. plan: ``rates``, ``seeds``, ``changes`` (False: none; or the
            names of some) other than this module's, for a small sweep.
    """
    plan = plan or {}
    rates, seeds = plan.get("rates", RATES), plan.get("seeds", SEEDS)

    def base(setting: str, rate: float, seed: int) -> Job:
        return Job(setting, "base", rate, seed, show=seed == seeds[0])

    def curve(seed: int) -> list[Job]:
        return [base(s, rate, seed) for rate in rates for s in settings]

    first, *others = seeds
    listed = [("base, first seed", curve(first))]
    listed += [(f"base, seed {seed}", curve(seed)) for seed in others]
    if plan.get("changes") is False:
        return listed
    listed.append(("far too much", [base(s, TOO_MUCH, first) for s in settings]))
    probe = {"max_steps": PROBE_STEPS, "schedule": "constant", "show": False}
    listed.append(("probes", [replace(j, change="probe", **probe) for j in curve(first)]))
    chosen = plan.get("changes")
    for changes, which in ((CHANGES, seeds[:1]), (CHANGES, others), (PAIRS, seeds)):
        for seed in which:
            for change in (c for c in changes if not chosen or c[0] in chosen):
                jobs = [j for s in settings for j in changed(s, change, seed, settings[s]["rows"], rates, first, done)]
                listed.append((f"{change[0]}, seed {seed}", jobs))
    return listed


def changed(setting: str, change, seed: int, available: int, rates, first: int, done: dict) -> list[Job]:
    """One change at the rates around the best of the base curve; none while that is not known, nor where the change
    would be none (fewer rows than it asks for)."""
    name, other, places = change
    if set(other) == {"rows"} and available <= (other["rows"] or MAIN_ROWS):
        return []
    curve = [done.get(Job(setting, "base", rate, first).id) for rate in rates]
    if None in curve:
        return []
    losses = [r["loss"] if r["loss"] is not None else float("inf") for r in curve]
    best = losses.index(min(losses))
    low = min(max(0, best + places[0]), max(0, len(rates) - len(places)))
    return [Job(setting, name, rate, seed, **other) for rate in rates[low : low + len(places)]]
