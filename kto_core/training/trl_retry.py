"""TRL's step after the GPU's memory ran out: computed again with every layer recomputed.

The packed engine makes room in its own way (`engine.retry`). Imports torch inside functions only.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable

from kto_core.hardware.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)


class MicroBatches:
    """The micro-batches of one optimizer step of TRL's trainer, to be computed again with every layer recomputed.

    All of the step's are, rather than keeping a copy of their gradients, which would take memory in each step. A
    micro-batch is never split: its rows' KL completions are each other's, and its z0 is the mean over all of them.
    """

    def __init__(self, trainer):
        self.trainer, self.step, self.calls, self.before = trainer, None, [], None

    def run(self, compute: Callable, *args, **kwargs):
        """``compute(*args, **kwargs)``, the training step of a micro-batch.

        Raises:
            HardwareError: it does not fit with every layer recomputed either, or there are several processes, whose
                sums are taken inside the step: one cannot compute it again alone.
        """
        trainer = self.trainer
        if trainer.state.global_step != self.step:
            self.step, self.calls, self.before = trainer.state.global_step, [], _meters(trainer)
        self.calls.append((args, kwargs))
        try:
            return compute(*args, **kwargs)
        except RuntimeError as e:
            if not is_out_of_memory(e) or trainer.accelerator.num_processes > 1 or not recompute_all(trainer):
                raise
        # outside of the handler, whose traceback would hold on to what failed
        logger.warning("Out of GPU memory. Continuing with all layers recomputed.")
        trainer.model.zero_grad()
        _free()
        _put_back(trainer, self.before)
        return [compute(*args, **kwargs) for args, kwargs in self.calls][-1]


def recompute_all(trainer) -> bool:
    """Gradient checkpointing for all layers of the trainer's model. False: it was so already, or has no such layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    model = trainer.accelerator.unwrap_model(trainer.model)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if all(m.gradient_checkpointing for m in layers):
        return False
    how = {"use_reentrant": False}
    model.gradient_checkpointing_enable(how)
    trainer.args.gradient_checkpointing_kwargs = how  # TRL switches it off and on again where it scores
    return True


def _meters(trainer) -> tuple[dict, int]:
    return {k: list(v) for k, v in trainer._metrics["train"].items()}, trainer._total_train_tokens


def _put_back(trainer, before: tuple[dict, int]) -> None:
    """What was noted of the step's micro-batches is noted again when they are computed again."""
    trainer._metrics["train"] = defaultdict(list, {k: list(v) for k, v in before[0].items()})
    trainer._total_train_tokens = before[1]


def _free() -> None:
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
