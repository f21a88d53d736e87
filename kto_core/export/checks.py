"""Before an export begins: disk and memory have room (refusals have numbers)."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from kto_core.errors import DiskError, HardwareError
from kto_core.models.facts import ModelFacts, model_facts
from kto_core.models.model_gate import tensor_header

from .merge.plan import loaded_whole

RESERVE = 100e6  # bytes left free
LIBRARIES = 1e9  # bytes that torch, transformers and PEFT take
COPIES = 20  # bytes a number of the weight that is merged


def require_disk(folder: Path, needed: float, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed + RESERVE > free:
        raise DiskError(
            f"Not enough disk space. {what}: {(needed + RESERVE) / 1e9:.1f} GB; free in {folder}: {free / 1e9:.1f} "
            "GB. Free up disk space, or choose fewer files."
        )


def require_memory(base: Path, adapter: Path, facts: ModelFacts) -> None:
    """Before a merge: what it needs at least, tensor by tensor unless it is plain that the model has to be loaded."""
    if loaded_whole(facts):
        require_memory_whole(base)
    else:
        _require(LIBRARIES + shard_need(adapter))


def shard_need(adapter: Path) -> float:
    """Bytes that a merge tensor by tensor takes beside the libraries: the adapter in fp32, and for the largest weight
    it changes the old one, its fp32 copies in PEFT, their product and the new one. Files that are read are mapped, and
    given back when memory is short."""
    found = tensor_header(adapter / "adapter_model.safetensors")
    own = sum(4.0 * math.prod(shape) for _, shape in found.values())
    largest = 0
    for name, (_, shape) in found.items():
        other = found.get(name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B"))
        if "_A" in name and other and len(shape) == len(other[1]) == 2:
            largest = max(largest, other[1][0] * shape[1])
    return own + COPIES * largest


def require_memory_whole(base: Path) -> None:
    """The merge holds the whole model, in the dtype of its files, and a converted copy of it for a moment."""
    facts = model_facts(str(base))
    own = json.loads((base / "config.json").read_text(encoding="utf-8"))
    full = (own.get("dtype") or own.get("torch_dtype")) == "float32"
    per_weight = 6.0 if full else 2.7 if facts.quantized else 2.2
    _require(facts.parameters * per_weight + LIBRARIES)


def _require(needed: float) -> None:
    import psutil

    free = psutil.virtual_memory().available
    if needed > free:
        raise HardwareError(
            f"The merge needs about {needed / 1e9:.1f} GB of CPU memory, but only {free / 1e9:.1f} GB are free. "
            "Close other programs, or merge on a machine with more memory."
        )
