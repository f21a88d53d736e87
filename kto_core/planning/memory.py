"""What a run will need at its peak, before anything is loaded: fits, tight, or not, and the one change that helps most.

Counts from the model's sizes (`model_shape`), the settings and the rows' lengths; also chooses how many layers to
checkpoint and how many tokens to pack into one pass. Knows nothing of torch. All sizes in GiB = 2**30 bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kto_core.engine.packing import passes
from kto_core.hardware import gpus as hardware
from kto_core.hardware.gpus import Device
from kto_core.models.shape import Shape

from .advice import best_change
from .coefficients import Coefficients
from .counting import Fit, fit, is_sharded, shape_of, verdict_of

if TYPE_CHECKING:
    from kto_core.config.run_config import RunConfig
    from kto_core.engine.packing.sample import Sample


def remarks(sharded: bool, offload: bool, gpus: int) -> list[str]:
    """Where a plan puts what one card has no room for, a sentence each."""
    found = {f"The base model's weights are sharded across {gpus} GPUs.": sharded, passes.OFFLOADED: offload}
    return [text for text, holds in found.items() if holds]


@dataclass(frozen=True)
class MemoryPlan:
    predicted_gib: float
    available_gib: float
    verdict: str  # "fits" | "tight" | "does not fit" | "cpu"
    advice: str  # the one change that helps most; "" where none is needed
    parts: dict[str, float]  # GiB of weights, adapters, optimizer, activations, K/V store, logits, …; sums to the total
    layers: int
    checkpoint_layers: int  # computed twice instead of kept
    offload: bool  # their inputs wait in main memory
    token_budget: int  # tokens of one pass
    sharded: bool  # the frozen weights are divided over the GPUs
    model: str  # where the model's sizes come from
    device: str

    def to_dict(self) -> dict[str, Any]:
        """JSON types; ``predicted_gib``, ``available_gib`` and ``verdict`` are a contract of ``--dry-run --json``."""
        d = asdict(self)
        d["parts"] = {k: round(v, 3) for k, v in self.parts.items()}
        return {**d, "predicted_gib": round(self.predicted_gib, 2), "available_gib": round(self.available_gib, 2)}


def plan(
    config: RunConfig,
    lengths: Sequence[int] = (),
    *,
    packed: Sample | None = None,
    device: Device | None = None,
    coefficients: Coefficients | None = None,
) -> MemoryPlan:
    """Predict the peak memory of training ``config`` on rows of these lengths.

    Args:
        lengths: tokens of each row, prompt and completion; empty: every row is ``max_length`` long.
        packed: what the batches of these rows pack into (`engine.sample`); without it no prefix counts as shared.
        device: the GPU to plan for; default the one of this machine with the least room among ``num_gpus``, and in a
            process of several GPUs its own.
    """
    k = coefficients or Coefficients()
    gpus = [device] if device else hardware.devices()
    rank = os.environ.get("LOCAL_RANK", "")
    if device is None and rank.isdigit() and int(rank) < len(gpus):
        gpus = [device := gpus[int(rank)]]  # its own card: on a neighbour's, the neighbour's model would be "others"
    shape = shape_of(config)
    lengths = [min(n, config.max_length) for n in lengths] or [config.max_length]
    if not gpus:
        return _on_cpu(config, shape, lengths, packed, k)
    if config.num_gpus > len(gpus) and device is None:
        found = fit(config, shape, lengths, packed, min(g.available_gib for g in gpus), k, gpu=True)
        advice = f"num_gpus is {config.num_gpus}, but this machine has {len(gpus)} GPUs. Set num_gpus to {len(gpus)}."
        return _made(found, config, shape, "does not fit", advice, gpus[0].name)
    gpu = min(gpus[: config.num_gpus], key=lambda g: g.available_gib)
    found = fit(config, shape, lengths, packed, gpu.available_gib, k, gpu=True)
    verdict = verdict_of(found, k)
    divided = config.model_copy(update={"shard": True})
    if verdict == "does not fit" and config.shard == "auto" and is_sharded(divided, shape):
        config, found = divided, fit(divided, shape, lengths, packed, gpu.available_gib, k, gpu=True)
        verdict = verdict_of(found, k)
    advice = "" if verdict == "fits" else best_change(config, lengths, packed, gpu, found, k)
    return _made(found, config, shape, verdict, advice, gpu.name)


# ---- counting -------------------------------------------------------------------------------------------------------


def _made(found: Fit, c: RunConfig, s: Shape, verdict: str, advice: str, device: str) -> MemoryPlan:
    return MemoryPlan(
        predicted_gib=found.total,
        available_gib=found.available,
        verdict=verdict,
        advice=advice,
        parts=found.parts,
        layers=s.layers,
        checkpoint_layers=found.checkpoint,
        offload=found.offload,
        token_budget=found.tokens,
        sharded=is_sharded(c, s),
        model=f"{c.model}: {s.parameters / 1e9:.3g} billion parameters, {s.source}",
        device=device,
    )


# ---- advice ---------------------------------------------------------------------------------------------------------


def _on_cpu(c: RunConfig, s: Shape, lengths: Sequence[int], packed: Sample | None, k: Coefficients) -> MemoryPlan:
    available = hardware.memory_gib()[1]
    found = fit(c, s, lengths, packed, available, k, gpu=False)
    advice = ""
    if found.total > available:
        advice = (
            f"There is no GPU, and {found.total:.1f} GiB are needed but only {available:.1f} GiB of CPU memory are "
            "free. Use preset demo, or a machine with a GPU."
        )
    elif s.parameters > 1e9:
        advice = "There is no GPU, and a model of this size would take days. Use preset demo, or a machine with a GPU."
    return _made(found, c, s, "cpu", advice, "CPU")
