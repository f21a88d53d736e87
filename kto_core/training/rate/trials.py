"""A few steps at one rate through the trainer's own step, judged, and everything put back as it was.

What a trial changes is all here: the adapter's weights, random numbers, optimizer, meters, modes. After `session` the
trainer is bit for bit what it was before, so the run does not depend on whether anything was tried.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import TrainerState

from kto_core.errors import NotFinite
from kto_core.runs.rates import Trial

from .rows import PackedRows, TrlRows


class Trials:
    """Trials of one trainer that has not trained yet. To be used inside `session`.

    Args:
        rows: of the trainer's engine, prepared. check: called before each batch; raises where a stop was asked for.
    """

    def __init__(self, trainer, rows: PackedRows | TrlRows, check: Callable[[], None]):
        self.trainer, self.rows, self.check = trainer, rows, check
        self.parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        self.start = [p.detach().cpu().clone() for p in self.parameters]
        self.model: Any = None
        self.seconds = 0.0  # of the trial so far

    # ---- one trial ----

    def begin(self, rate: float) -> None:
        """The adapter as it was, and a new optimizer at this rate, which stays."""
        self._reset()
        trainer = self.trainer
        trainer.args.learning_rate, trainer.optimizer = rate, None
        trainer.accelerator._optimizers.clear()
        trainer.create_optimizer()
        trainer.optimizer = trainer.accelerator.prepare_optimizer(trainer.optimizer)
        self.rate, self.broken, self.seconds = rate, False, 0.0

    def step(self, number: int) -> float:
        """Train on the rows of the run's step ``number`` (0 is the first); the seconds it took."""
        trainer, started = self.trainer, time.perf_counter()
        if self.broken:
            return 0.0
        batches = self.rows.training(number)
        trainer.current_gradient_accumulation_steps = len(batches)
        trainer.state.global_step = number + 1  # the first step has remarks of its own, which the run makes
        try:
            for i, batch in enumerate(batches):
                self.check()
                trainer.accelerator.gradient_state._set_sync_gradients(i == len(batches) - 1)
                trainer.training_step(self.model, batch)
        except NotFinite:
            self.broken = True
        else:
            if trainer.args.max_grad_norm > 0:
                trainer.accelerator.clip_grad_norm_(self.parameters, trainer.args.max_grad_norm)
            trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        passed = time.perf_counter() - started
        self.seconds += passed
        return passed

    def judged(self) -> Trial:
        """What the steps did to the rows that judge."""
        trainer, started = self.trainer, time.perf_counter()
        found: dict[str, list[float]] = {"loss": [], "chosen": [], "rejected": []}
        total, count = 0.0, 0
        self.model.eval()
        precomputed, trainer.precompute_ref_logps = getattr(trainer, "precompute_ref_logps", False), False
        try:
            with self.rows.room():
                for batch, size in self.rows.judging():
                    if self.broken:
                        break
                    self.check()
                    trainer._metrics["eval"].clear()
                    loss = float(trainer.prediction_step(self.model, batch, True)[0])
                    self.broken = not math.isfinite(loss)
                    found["loss"].append(loss)
                    total, count = total + loss * size, count + size
                    for side in ("chosen", "rejected"):
                        found[side] += trainer._metrics["eval"].get(f"rewards/{side}", [])
        finally:
            trainer.precompute_ref_logps = precomputed
        self.seconds += time.perf_counter() - started
        if self.broken:
            return Trial(self.rate, None, seconds=round(self.seconds, 3))
        chosen, rejected = (sum(v) / max(1, len(v)) for v in (found["chosen"], found["rejected"]))
        moved = [abs(v) / trainer.args.beta for side in ("chosen", "rejected") for v in found[side]]
        numbers = total / max(1, count), chosen - rejected, chosen, rejected, sum(moved) / max(1, len(moved))
        loss, margin, chosen, rejected, nats = (float(f"{v:.6g}") for v in numbers)
        losses = tuple(round(v, 6) for v in found["loss"])
        return Trial(self.rate, loss, losses, margin, chosen, rejected, nats, round(self.seconds, 3))

    # ---- around all of them ----

    def _reset(self) -> None:
        for parameter, value in zip(self.parameters, self.start, strict=True):
            parameter.data.copy_(value)
            parameter.grad = None

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Inside trials may be made; afterwards nothing tells of them."""
        trainer = self.trainer
        accelerator, model = trainer.accelerator, trainer.model
        names = ("state", "optimizer", "_metrics", "_total_train_tokens", "current_gradient_accumulation_steps")
        before = {name: getattr(trainer, name) for name in names if hasattr(trainer, name)}
        rate, modes = trainer.args.learning_rate, [(m, m.training) for m in model.modules()]
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        synced = accelerator.gradient_state.sync_gradients
        forward = {name: model.__dict__.get(name) for name in ("forward", "_original_forward")}
        with _random_numbers():
            trainer.state = TrainerState()
            trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
            try:
                self.model = accelerator.prepare_model(
                    model, evaluation_mode=True
                )  # mixed precision, as the run has it
                yield
            finally:
                self._reset()
                for name in names:
                    if name in before:
                        setattr(trainer, name, before[name])
                    else:
                        trainer.__dict__.pop(name, None)
                trainer.args.learning_rate = rate
                for module, training in modes:
                    module.training = training
                for name, value in forward.items():
                    model.__dict__.pop(name, None)
                    if value is not None:
                        model.__dict__[name] = value
                if scaler is not None:
                    accelerator.scaler.load_state_dict(scaler)
                accelerator.gradient_state._set_sync_gradients(synced)
                accelerator._models.clear()
                accelerator._optimizers.clear()
                trainer.forget_batches()
                self.model, self.start = None, []


@contextlib.contextmanager
def _random_numbers() -> Iterator[None]:
    """Whatever is drawn inside is drawn again outside."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cards is not None:
            torch.cuda.set_rng_state_all(cards)
