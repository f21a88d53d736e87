"""What must be right before weights are loaded: libraries, GPU, disk. Each problem is one sentence with its remedy."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kto_core import reporting
from kto_core.errors import ConfigError, DiskError, HardwareError, KTOError, ModelError

if TYPE_CHECKING:
    from kto_core.config.run_config import RunConfig
    from kto_core.hardware.gpus import Device
    from kto_core.models.facts import ModelFacts

CPU_LIMIT = 1.6e9  # parameters; more would take days without a GPU
RESERVE = 200 * 2**20  # bytes left free for logs and everybody else


def check_libraries(config: RunConfig, cards: Sequence[Device] | None = None) -> None:
    """What ``report_to`` names, and Unsloth, if they are asked for.

    Args:
        cards: the GPUs to check for; None: those of this machine.

    Raises:
        ConfigError: a package or a key is missing.
        HardwareError: Unsloth without a GPU.
    """
    from kto_core.hardware.gpus import devices

    reporting.check(config)
    if config.engine == "unsloth":
        if not (devices() if cards is None else cards):
            raise HardwareError("Unsloth needs an NVIDIA GPU, and there is none. Choose engine `auto` or `trl`.")
        if importlib.util.find_spec("unsloth") is None:
            raise ConfigError(
                "engine: Unsloth is not installed. Run `pip install -r requirements-unsloth.txt`, or choose `auto`."
            )
        if config.adapter:
            raise ConfigError(
                "adapter: continuing from an adapter does not work with Unsloth. Choose engine `auto` or `trl`."
            )


def check_hardware(config: RunConfig, facts: ModelFacts, cards: Sequence[Device] | None = None) -> None:
    """A GPU where the model needs one. ``cards``: see `check_libraries`.

    Raises:
        HardwareError: the model is too large for a CPU, or asks for a format that CPUs do not train in.
        ModelError: the model's window is shorter than ``max_length``.
    """
    from kto_core.hardware.gpus import devices

    found = devices() if cards is None else cards
    cpus = not found and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")  # accelerate's own setting
    if config.num_gpus > max(1, len(found)) and not cpus:
        raise HardwareError(f"num_gpus is {config.num_gpus}, but this machine has {len(found)} GPUs. Lower num_gpus.")
    if not found:
        _require_small(config.model, facts.parameters)
    if not found and config.dtype == "float16":
        raise HardwareError("float16 training does not work on a CPU. Choose dtype `auto`, `bfloat16` or `float32`.")
    if config.max_length > facts.max_position_embeddings:
        raise ModelError(
            f"max_length {config.max_length} exceeds the context length of {config.model}. Set max_length to at most "
            f"{facts.max_position_embeddings}."
        )


def check_size(config: RunConfig, cards: Sequence[Device] | None = None) -> None:
    """The same for a model that is not on this machine, before anything is fetched: by its name.

    Raises:
        HardwareError: the model is too large for a CPU, and there is no GPU.
    """
    from kto_core.hardware.gpus import devices
    from kto_core.models.shape import find

    shape = find(config.model)
    if shape is not None and not (devices() if cards is None else cards):
        _require_small(config.model, shape.parameters)


def check_length(config: RunConfig) -> None:
    """``max_length`` against the model's own configuration, where it lies on this machine.

    For settings that were just made; a run that goes on is as it was, wherever its model has moved since.

    Raises:
        ConfigError: the model's positions end before.
    """
    from kto_core.models.shape import find

    shape = find(config.model)
    limit = shape.max_position_embeddings if shape and shape.exact else None
    if limit and config.max_length > limit:
        raise ConfigError(
            f"max_length: must be 16 to {limit}, the context length of {config.model}, not {config.max_length}."
        )


def refusal(config: RunConfig, facts: ModelFacts | None = None, cards: Sequence[Device] | None = None) -> str:
    """Why a run would be refused on this machine, as far as can be told without loading anything; "" if it would not.

    ``facts``: of the model, where they are known. ``cards``: see `check_libraries`.
    """
    from kto_core.models.adapter_gate import require_adapter

    try:
        check_libraries(config, cards)
        check_size(config, cards)
        if config.adapter:
            require_adapter(Path(config.adapter), config.model)
        if facts is not None:
            check_hardware(config, facts, cards)
    except KTOError as e:
        return str(e)
    return ""


def _require_small(name: str, parameters: int) -> None:
    if parameters > CPU_LIMIT:
        raise HardwareError(
            f"{name} has about {parameters / 1e9:.1f} billion parameters and this machine has no NVIDIA GPU. Choose "
            "the preset `demo`, a model of up to 1.5 billion parameters, or a machine with a GPU."
        )


def check_disk(config: RunConfig, facts: ModelFacts, run_dir: Path, steps: int) -> None:
    """Room for the checkpoints that will lie there at once, one being written, and the adapter.

    Raises:
        DiskError: not enough, with the numbers; or the folder cannot be written.
    """
    weights = 4 * facts.shape.lora_parameters(config.target_modules, config.r)  # fp32
    state = weights // 2 if "8bit" in config.optim else 2 * weights  # AdamW's two moments
    tokenizer = 15 * 2**20
    saves = max(1, math.ceil(steps / config.save_steps))
    kept = min(config.save_total_limit, saves) + (1 if saves > config.save_total_limit else 0)
    needed = kept * (weights + state + tokenizer) + weights + tokenizer + RESERVE
    there = sum(p.stat().st_size for p in run_dir.rglob("*") if p.is_file())  # a resumed run's own checkpoints
    try:
        free = shutil.disk_usage(run_dir).free
    except OSError as e:
        raise DiskError(f"The run folder {run_dir} is unreadable ({e.strerror}). Choose another --output-dir.") from e
    if not os.access(run_dir, os.W_OK):
        raise DiskError(f"The run folder {run_dir} is not writable. Choose another --output-dir.")
    if free + there < needed:
        raise DiskError(
            f"{kept} checkpoints and the adapter need {needed / 2**30:.2f} GiB, but only {free / 2**30:.2f} GiB are "
            f"free in {run_dir}. Free up disk space, lower save_total_limit, or choose another --output-dir."
        )
