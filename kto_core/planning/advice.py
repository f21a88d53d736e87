"""The one change to the settings that helps most."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kto_core.hardware.gpus import Device

from .coefficients import Coefficients
from .counting import Fit, fit, shape_of, verdict_of

if TYPE_CHECKING:
    from kto_core.config.run_config import RunConfig
    from kto_core.engine.packing.sample import Sample


SMALLER = {
    "30b-a3b": "20b",
    "27b": "20b",
    "20b": "14b",
    "14b": "8b",
    "13b": "7b",
    "8b": "4b",
    "7b": "3b",
    "4b": "3b",
    "3b": "demo",
}


def best_change(
    c: RunConfig, lengths: Sequence[int], packed: Sample | None, gpu: Device, now: Fit, k: Coefficients
) -> str:
    """The change that saves most, with its numbers; a smaller model only where no setting is enough."""
    s = shape_of(c)
    options = []
    for text, update in _changes(c, lengths):
        changed = c.model_copy(update=update)
        cut = [min(n, changed.max_length) for n in lengths]
        same = packed if cut == lengths or packed is None else packed._replace(tokens=[])
        found = fit(changed, s, cut, same, gpu.available_gib, k, gpu=True)
        options.append((found.total, text, found))
    others = gpu.used_by_others_gib
    if others > 1:
        found = fit(c, s, lengths, packed, gpu.total_gib, k, gpu=True)
        options.append((found.total - others, f"Close other programs that use the GPU ({others:.1f} GiB)", found))
    better = [o for o in options if o[0] < now.total]
    for level in ("fits", "tight"):
        if pool := [o for o in better if verdict_of(o[2], k) == level]:
            _, text, found = min(pool, key=lambda o: o[0])
            still = ", which is still tight" if level == "tight" else ""
            return f"{text}. This needs {found.total:.1f} of {found.available:.1f} GiB{still}."
    return f"Changing one setting is not enough. {_smaller(c)}."


def helps_most(c: RunConfig, lengths: Sequence[int]) -> str:
    """The change that saves most where the memory ran out although everything is cut as small as it can be; without
    its full stop."""
    k = Coefficients()

    def least(changed: RunConfig) -> float:
        found = fit(changed, shape_of(changed), [min(n, changed.max_length) for n in lengths], None, 0.0, k, gpu=True)
        return found.total if found.least is None else found.least

    options = [(least(c.model_copy(update=update)), text) for text, update in _changes(c, lengths)]
    need, text = min(options, default=(math.inf, ""))
    return text if need < least(c) else _smaller(c)


def _smaller(c: RunConfig) -> str:
    name = SMALLER.get(c.preset)
    return f"Use preset {name}, a smaller model" if name else "Use a smaller model"


def _changes(c: RunConfig, lengths: Sequence[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what to do, update) of each setting that can save memory."""
    batch, steps = c.per_device_train_batch_size, c.gradient_accumulation_steps
    if c.gradient_checkpointing is False:
        yield "Set gradient_checkpointing to auto", {"gradient_checkpointing": "auto"}
    if not c.load_in_4bit:
        yield "Set load_in_4bit to true", {"load_in_4bit": True}
    if batch >= 4 and batch % 2 == 0:
        update = {"per_device_train_batch_size": batch // 2, "gradient_accumulation_steps": steps * 2}
        yield (
            (
                f"Set batch size to {batch // 2} and gradient accumulation to {steps * 2}, which gives the same "
                "effective batch"
            ),
            update,
        )
    if (longest := max(lengths)) > 256:
        shorter = 2 ** (math.ceil(math.log2(longest)) - 1)
        yield f"Set max_length to {shorter}", {"max_length": shorter}
    if c.r >= 16:
        yield f"Set r to {c.r // 2} and lora_alpha to {c.lora_alpha // 2}", {"r": c.r // 2}
    if c.shard is False and c.num_gpus > 1 and c.engine in ("auto", "packed"):
        yield "Set shard to auto", {"shard": True}
    if "8bit" not in c.optim:
        yield "Set optim to adamw_8bit", {"optim": "adamw_8bit"}
