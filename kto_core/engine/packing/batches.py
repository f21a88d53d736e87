"""One optimizer batch at a time for transformers' Trainer: the planned groups as a DataLoader."""

from __future__ import annotations

import functools

import numpy as np
from torch.utils.data import BatchSampler, DataLoader, Dataset

from .groups import EpochPlan, TokenRows, plan_epoch, plan_sequential


class Planner:
    """The plans of a run, epoch by epoch; the same arguments give the same plans.

    Args:
        group_size: rows of an optimizer batch, over all processes. micro_batch: None pairs inside the whole batch; else
            rows stay in order and are paired inside micro-batches, as TRL does. kl: the loss has a y'.
    """

    def __init__(self, rows: TokenRows, group_size: int, seed: int, micro_batch: int | None, kl: bool):
        self.rows, self.group_size, self.seed, self.micro_batch, self.kl = rows, group_size, seed, micro_batch, kl
        self._keys = (None, None)
        if kl and micro_batch is None:
            prompts = rows.prompt.keys() if rows.prompt_keys is None else rows.prompt_keys
            self._keys = (prompts, rows.completion.keys())
        self.epoch = functools.lru_cache(maxsize=2)(self._plan)

    def _plan(self, epoch: int) -> EpochPlan:
        if self.micro_batch is not None:
            return plan_sequential(len(self.rows), self.micro_batch, self.group_size // self.micro_batch)
        return plan_epoch(self.rows.labels, *self._keys, self.group_size, self.seed, epoch, self.kl)


class _Groups(Dataset):
    def __init__(self, planner: Planner, rank: int, world: int):
        self.planner, self.rank, self.world = planner, rank, world

    def __len__(self) -> int:
        return len(self.planner.rows)

    def __getitem__(self, place: tuple[int, int]) -> dict:
        epoch, g = place
        rows, partner = self.planner.epoch(epoch).group(g)
        return {"rows": rows[self.rank :: self.world], "partner": partner[self.rank :: self.world], "size": len(rows)}


class _Sampler(BatchSampler):
    """Yields (epoch, group). It survives `accelerate.skip_first_batches`, which keeps only dataset and sampler."""

    def __init__(self, planner: Planner):
        self.planner, self.epoch = planner, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return len(self.planner.epoch(0))

    def __iter__(self):
        for g in range(len(self)):
            yield [(self.epoch, g)]


def _one(items: list) -> dict:
    return items[0]


class GroupLoader(DataLoader):
    """One dict a group: ``rows`` and ``partner`` (row numbers, int64) of this process, ``size`` over all processes."""

    def __init__(self, planner: Planner, rank: int = 0, world: int = 1):
        super().__init__(_Groups(planner, rank, world), batch_sampler=_Sampler(planner), collate_fn=_one)

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def planned_pairs(planner: Planner, steps: int) -> list[tuple[int, int]]:
    """(row, row whose completion) of everything the first ``steps`` steps score, each once, in order."""
    pairs: dict[tuple[int, int], None] = {}
    epoch = 0
    while steps > 0:
        plan = planner.epoch(epoch)
        end = int(plan.bounds[min(steps, len(plan))])
        rows, partner = plan.rows[:end].tolist(), plan.partner[:end].tolist()
        pairs.update(dict.fromkeys((r, r) for r in rows))
        if planner.kl:
            pairs.update(dict.fromkeys(zip(rows, partner, strict=True)))
        steps -= len(plan)
        epoch += 1
        if planner.micro_batch is not None:  # every epoch is the same
            break
    return list(pairs)


def longest(rows: TokenRows) -> int:
    """Most packed tokens that one row takes (its last token is no input)."""
    return int(np.max(rows.prompt.lengths + rows.completion.lengths)) - 1
