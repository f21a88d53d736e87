"""Running out of GPU memory: how it is recognised, what is said of it, and TRL's step with more layers recomputed.

The packed engine makes room in its own way (`engine.retry`). Imports torch inside functions only.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import defaultdict
from collections.abc import Callable

from .errors import HardwareError

logger = logging.getLogger(__name__)
# besides torch's own error: the driver's, and libraries that allocate for themselves
MARKS = ("CUDA error: out of memory", "CUDA driver error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
ADVICE = "Lower max_length, halve the batch size and double gradient_accumulation_steps, or use a smaller model"


def is_out_of_memory(e: BaseException) -> bool:
    """Whether an error means that the GPU's memory is full."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(e, RuntimeError):
        return False
    return isinstance(e, torch.cuda.OutOfMemoryError) or any(mark in str(e) for mark in MARKS)


def error(longest: int | None = None, advice: str = "") -> HardwareError:
    """What the user is told, with what was reserved of what is allowed, and the longest row in tokens.

    Args:
        advice: the change that helps most, without its full stop.
    """
    from .hardware import GIB, allowed

    torch, facts = sys.modules.get("torch"), []
    if torch is not None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        reserved = torch.cuda.memory_reserved(device)
        facts.append(f"{reserved / GIB:.1f} of the allowed {allowed(device) / GIB:.1f} GiB were reserved")
    if longest is not None:
        facts.append(f"the longest row has {longest:,} tokens")
    numbers = f": {', and '.join(facts)}" if facts else ""
    return HardwareError(f"The GPU ran out of memory{numbers}. {advice or ADVICE}; then resume.")


def at_loading(model: str) -> HardwareError:
    """What the user is told when the weights of ``model`` themselves do not fit."""
    return HardwareError(
        f"{model} does not fit into the GPU's free memory. Unload the chat model, close what else uses the card, or "
        "choose a smaller preset."
    )


@contextlib.contextmanager
def explained(said: Callable[[], HardwareError]):
    """Inside, an error that means a full GPU becomes ``said()``."""
    try:
        yield
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        raise said() from e


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
        logger.warning("Out of GPU memory; going on with every layer recomputed.")
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
