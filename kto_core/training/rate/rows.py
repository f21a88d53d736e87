"""The rows of the trials: those that train are the run's own first steps, those that judge share no prompt with them.

What a trainer calls a batch differs by its engine; here are both. Nothing of the run's own order is touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from kto_core.config.run_config import RunConfig
    from kto_core.planning.training_data import Planned

LEAST_STEPS = 3
LEAST_JUDGES, MOST_JUDGES = 16, {True: 128, False: 16}  # rows, on a GPU and without one
LEAST_LABEL = 4  # of them, of each label
OF_TRAINING = 3  # where too few rows are held out, at most one of so many training rows judges


@dataclass(frozen=True)
class Chosen:
    """Which rows the trials use.

    Attributes:
        steps: that a trial can make. held: the rows that judge are validation rows; else training rows.
        judges: their numbers, in `Planned.test` or `Planned.train`.
    """

    steps: int
    held: bool
    judges: list[int]


def choose(config: RunConfig, data: Planned, groups: Sequence[Sequence[int]], most: int, gpu: bool) -> Chosen | None:
    """Rows for trials of at most ``most`` steps, or None: there are too few.

    Args:
        groups: numbers of the training rows of each of the run's first steps.
    """
    count = MOST_JUDGES[gpu]
    if judges := _some(range(len(data.test)), data.test_labels, count, config.seed):
        steps = min(most, len(groups))
        return Chosen(steps, True, judges) if steps >= LEAST_STEPS else None
    keys = [tuple(e.whole_prompt or e.prompt_ids) for e in data.train]
    for steps in range(min(most, len(groups)), LEAST_STEPS - 1, -1):
        trained = {keys[i] for group in groups[:steps] for i in group}
        free = [i for i in range(len(keys)) if keys[i] not in trained]
        judges = _some(free, data.labels, min(count, len(keys) // OF_TRAINING), config.seed)
        if judges:
            return Chosen(steps, False, judges)
    return None


def _some(numbers: Sequence[int], labels: Sequence[bool], count: int, seed: int) -> list[int]:
    """``count`` of the rows, of both labels alike where they can be, mixed; [] where they are too few."""
    order = np.random.default_rng(seed).permutation(len(numbers)).tolist()
    sides = {side: [numbers[i] for i in order if labels[numbers[i]] is side] for side in (True, False)}
    few = min(len(sides[True]), len(sides[False]), count // 2)
    taken = {side: sides[side][: max(few, count - min(count // 2, len(sides[not side])))] for side in sides}
    found = [number for pair in zip(*taken.values(), strict=False) for number in pair]
    rest = set(found)
    found += [number for side in taken.values() for number in side if number not in rest]
    return found[:count] if few >= LEAST_LABEL and len(found) >= LEAST_JUDGES else []


class PackedRows:
    """Batches of the packed engine's trainer: one is a whole step."""

    JUDGED_TOGETHER = 8  # rows: enough batches to tell chance from gain

    def __init__(self, trainer):
        self.trainer = trainer
        plan = trainer.planner.epoch(0)
        self.groups = [plan.group(g)[0].tolist() for g in range(len(plan))]

    def prepare(self, judges) -> None:
        """Score what the reference lacks. ``judges``: a data set of `encoded_dataset`."""
        self.trainer.prepare_reference()
        self.judges = self.trainer.judging_batches(judges, self.JUDGED_TOGETHER)

    def training(self, step: int) -> list[Any]:
        rows, partner = self.trainer.planner.epoch(0).group(step)
        part = slice(self.trainer.accelerator.process_index, None, self.trainer.accelerator.num_processes)
        return [{"rows": rows[part], "partner": partner[part], "size": len(rows)}]

    def judging(self) -> list[tuple[Any, int]]:
        """(batch, its rows)."""
        return [(batch, batch["size"]) for batch in self.judges]

    def room(self):
        """What memory judging takes is not the training's to lose."""
        return self.trainer._eval_limits()


class TrlRows:
    """Batches of TRL's trainer: a step is several micro-batches, and its rows come in their order."""

    def __init__(self, trainer, rows: int):
        self.trainer = trainer
        self.size, self.micro = trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps
        step = self.size * self.micro
        self.groups = [list(range(a, min(a + step, rows))) for a in range(0, rows, step)]

    def prepare(self, judges) -> None:
        self.judges = judges

    def training(self, step: int) -> list[Any]:
        numbers = self.groups[step]
        return [self._batch(self.trainer.train_dataset, numbers[a : a + self.size])
                for a in range(0, len(numbers), self.size)]  # fmt: skip

    def judging(self) -> list[tuple[Any, int]]:
        """(batch, its rows)."""
        numbers = list(range(len(self.judges)))
        parts = [numbers[a : a + self.size] for a in range(0, len(numbers), self.size)]
        return [(self._batch(self.judges, part), len(part)) for part in parts]

    def room(self):
        """As the packed engine's; there is nothing to keep."""
        return contextlib.nullcontext()

    def _batch(self, dataset, numbers: list[int]) -> Any:
        return self.trainer.data_collator([dataset[i] for i in numbers])
