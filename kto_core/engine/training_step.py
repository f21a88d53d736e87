"""The step of the packed trainer: the passes of one optimizer batch, what other processes add, the metrics."""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
import torch

from kto_core.engine.packing.batches import longest
from kto_core.engine.packing.groups import TokenRows
from kto_core.engine.packing.passes import y_tokens
from kto_core.errors import HardwareError
from kto_core.hardware import out_of_memory

from . import limits, retry
from .adapters import trainable
from .group import Group, Objective
from .metrics import record, reference_gap
from .reference import ReferenceScores

logger = logging.getLogger(__name__)
# what policy and reference may differ by at the start (`metrics.reference_gap`): bfloat16 was seen to make 0.05
LARGEST_GAP = 0.2


class TrainingStep:
    """Mixin of `trainer.PackedKTOTrainer`."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        return self._step(inputs, backward=True)

    def no_room(self, longest: int) -> HardwareError:
        """What is raised where nothing is left to give. ``longest``: tokens of the longest row."""
        return out_of_memory.error(longest)

    def _make_room(self, rows: TokenRows, inputs: dict, backward: bool) -> None:
        """Tighter limits after running out of memory; the whole batch of this process is then computed again.

        Raises:
            HardwareError: nothing is left to give.
        """
        own, other = inputs["rows"], inputs["partner"]
        batch = int(np.sum(rows.prompt.lengths[own] + rows.completion.lengths[own]))
        batch += sum(y_tokens(int(n)) for n in rows.completion.lengths[other])
        # where layers are divided, the others wait in the middle of a pass and cannot be asked to run it again
        tighter = None
        if not self.engine.divided:
            tighter = limits.tightened(self.engine, longest(rows), batch, recompute=backward)
        if tighter is None:
            raise self.no_room(longest(rows) + 1)
        self.engine.limits = tighter
        logger.warning(
            "Out of GPU memory. Continuing with %d recomputed layers%s and %s tokens per pass.",
            tighter.checkpoint_layers,
            ", their inputs offloaded to CPU memory," if tighter.offload else "",
            tighter.token_budget,
        )
        if backward:
            for p in trainable(self.model).values():
                p.grad = None
        torch.cuda.empty_cache()

    def _step(self, inputs: dict, backward: bool, planned=None, mode: str = "train") -> torch.Tensor:
        rows, scores = planned or (self.rows, self.reference_scores)
        several = self.accelerator.num_processes > 1
        sums = retry.Sums(partial(self.accelerator.reduce, reduction="sum")) if several else None

        def attempt():
            if sums is not None:
                sums.restart()
            return self._passes(inputs, rows, scores, sums, backward, mode)

        loss, results = retry.until_it_fits(attempt, partial(self._make_room, rows, inputs, backward))
        if several:
            loss = self.accelerator.reduce(loss, reduction="sum")
            if backward:
                self._reduce_gradients()
        self._note(results, mode)
        return loss.detach()

    def _passes(self, inputs: dict, rows, scores, sums, backward: bool, mode: str) -> tuple[torch.Tensor, list]:
        """This process's part of a step: its loss, and a (group, result) of each KL group. ``sums`` is all that it
        asks other processes for."""
        numbers, partner, size = inputs["rows"], inputs["partner"], inputs["size"]
        world = self.accelerator.num_processes
        micro = self.micro_batch if self.kl_group == "microbatch" and mode == "train" else size
        starts = range(0, size, micro * world)  # the same number on every process
        results, loss = [], torch.zeros((), device=self.engine.device)
        for start in starts:
            chunk = slice(start // world, start // world + micro)
            divisor = min(micro * world, size - start) * len(starts)
            if not len(numbers[chunk]):  # fewer rows than processes
                idle = partial(self._idle_z0, sums)
                z0 = self.engine.stand_by(idle, kl=self.calculate_KL, backward=backward, autocast=self._autocast)
                results.append((None, z0))
                continue
            group = self._group(rows, scores, numbers[chunk], partner[chunk])
            with self.engine.using_tree():
                result = self.engine.run(
                    group,
                    Objective(self.beta, self.desirable_weight, self.undesirable_weight, self.loss_type),
                    rows=divisor,
                    backward=self.accelerator.backward if backward else None,
                    reduce=sums,
                    autocast=self._autocast,
                )
            loss = loss + result.loss
            results.append((group, result))
        return loss, results

    def _group(self, rows: TokenRows, scores: ReferenceScores, numbers, partner) -> Group:
        device = self.engine.device
        own, other = numbers.tolist(), partner.tolist()

        def tensor(values, dtype=torch.float32):
            return torch.as_tensor(values, dtype=dtype, device=device)

        kl = self.calculate_KL
        return Group(
            [rows.prompt[i] for i in own],
            [rows.completion[i] for i in own],
            [rows.completion[i] for i in other] if kl else None,
            tensor(rows.labels[numbers], torch.bool),
            tensor(scores.values(zip(own, own, strict=True)), torch.float64),
            tensor(scores.values(zip(own, other, strict=True)), torch.float64) if kl else None,
        )

    def _idle_z0(self, sums) -> float:
        """Take part in z0 with no rows, so that the other processes do not wait."""
        if not self.calculate_KL:
            return 0.0
        total = sums(torch.zeros(2, dtype=torch.float64, device=self.engine.device)).tolist()
        return max(0.0, total[0] / total[1])

    def _reduce_gradients(self) -> None:
        """Sum over processes; the row losses were divided by the rows of all of them."""
        for p in trainable(self.model).values():
            grad = p.grad if p.grad is not None else torch.zeros_like(p)
            p.grad = self.accelerator.reduce(grad, reduction="sum")

    def _note(self, results: list, mode: str) -> None:
        reduce = partial(self.accelerator.reduce, reduction="sum") if self.accelerator.num_processes > 1 else None
        tokens = record(self._metrics[mode], results, self.beta, self.engine.device, reduce)
        if mode == "train":
            self._total_train_tokens += tokens
            if not self.state.global_step:
                self._say_start(*reference_gap(results))
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _say_start(self, off: float, by_root: float) -> None:
        """Before the first update the policy is the reference: what they differ by, every reward has as an error."""
        if by_root > LARGEST_GAP:
            logger.warning(
                "The policy's log-probs differ from the reference's by %.1f before the first step, so rewards start "
                "with this error. Clear the cached reference log-probs (python -m kto_core cache --clear) and start "
                "again. If the message returns, please report it.",
                off,
            )
