"""What differs between the settings of runs, and their final numbers beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kto_core.config import sharing
from kto_core.errors import ConfigError
from kto_core.runs.run import Run
from kto_core.verdict import keeping

NOT_COMPARED = ("output_dir", "run_name", "alternatives")
UNREADABLE = "cannot be read"
METRICS = ("loss", "eval_loss", "rewards/margins", "eval_rewards/margins", "rewards/chosen", "eval_rewards/chosen",
           "rewards/rejected", "eval_rewards/rejected", "kl", "eval_kl", "grad_norm")  # fmt: skip
JUDGED = (("rewards/margins", "margin"), ("accuracy", "accuracy"), ("auc", "AUC"))


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run as text) where they are not all the same, in `RunConfig`'s order.

    Model and data set come first. A run that cannot be read has "cannot be read".
    """
    values = [_values(run) for run in runs]
    there = [v for v in values if v is not None]
    names = [*sharing.ELSEWHERE, *(n for n in (there[0] if there else ()) if n not in sharing.ELSEWHERE)]
    found = []
    for name in names if there else ():
        if any(v[name] != there[0][name] for v in there[1:]):
            said = [_short(name, v[name]) if v is not None else UNREADABLE for v in values]
            whole = [sharing.text(v[name]) if v is not None else UNREADABLE for v in values]
            found.append((name, said if len(set(said)) > 1 else whole))  # two files of one name in two folders
    return found


def _values(run: Run) -> dict[str, Any] | None:
    try:
        config = run.config().config
    except ConfigError:
        return None
    return {name: value for name, value in config.model_dump().items() if name not in NOT_COMPARED}


def _short(name: str, value: object) -> str:
    """A file without its folder."""
    said = sharing.text(value)
    return Path(said).name if name in ("data", "adapter") and said.startswith("/") else said


def metrics(runs: Sequence[Run]) -> list[tuple[str, list[float | None]]]:
    """(metric, its newest value in each run), of those that any of them has; then numbers of the verdicts."""
    states = [run.state() for run in runs]
    found = [(name, [state.latest(name) for state in states]) for name in METRICS]
    judged = [keeping.read(run) or {} for run in runs]
    found += [(f"verdict: {title}", [v.get(name) for v in judged]) for name, title in JUDGED]
    return [(name, values) for name, values in found if any(v is not None for v in values)]


def verdicts(runs: Sequence[Run]) -> list[str]:
    """The sentence of each run's verdict; "" where it has none."""
    judged = [keeping.read(run) for run in runs]
    return [v["verdict"]["sentence"] if v else "" for v in judged]


def answers(runs: Sequence[Run], most: int = 12) -> list[tuple[str, str, list[str | None]]]:
    """(prompt, answer of the model before, answer of each run or None) of the prompts that verdicts were made with.

    Prompts that more of the runs answered come first. The answer before is that of the first run that has the prompt.
    """
    rows: dict[str, tuple[str, list[str | None]]] = {}
    for i, run in enumerate(runs):
        for sample in keeping.samples(run) if keeping.read(run) else ():
            _, tuned = rows.setdefault(sample["prompt"], (sample["base"], [None] * len(runs)))
            tuned[i] = sample["tuned"]
    by_many = sorted(rows.items(), key=lambda row: sum(answer is None for answer in row[1][1]))
    return [(prompt, base, tuned) for prompt, (base, tuned) in by_many][:most]
