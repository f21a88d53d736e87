"""Running out of GPU memory: how it is recognised, and what is said of it. Never imports torch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from kto_core.errors import HardwareError

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
    from .gpus import GIB, allowed

    torch, facts = sys.modules.get("torch"), []
    if torch is not None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        reserved = torch.cuda.memory_reserved(device)
        facts.append(f"{reserved / GIB:.1f} of the allowed {allowed(device) / GIB:.1f} GiB were reserved")
    if longest is not None:
        facts.append(f"the longest row has {longest:,} tokens")
    numbers = f": {', and '.join(facts)}" if facts else ""
    return HardwareError(f"The GPU ran out of memory{numbers}. {advice or ADVICE}, then resume.")


def at_loading(model: str) -> HardwareError:
    """What the user is told when the weights of ``model`` themselves do not fit."""
    return HardwareError(
        f"{model} does not fit in free GPU memory. Unload the chat model, close other programs that use the GPU, or "
        "choose a smaller preset."
    )


@contextlib.contextmanager
def explained(said: Callable[[], HardwareError]) -> Iterator[None]:
    """Inside, an error that means a full GPU becomes ``said()``."""
    try:
        yield
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        raise said() from e
