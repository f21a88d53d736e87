"""What must be right before weights are loaded: libraries, GPU, disk. Each problem is one sentence with its remedy."""

from __future__ import annotations

import importlib.util
import math
import netrc
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConfigError, DiskError, HardwareError, KTOError, ModelError

if TYPE_CHECKING:
    from .config import RunConfig
    from .model_info import ModelFacts

CPU_LIMIT = 1.6e9  # parameters; more would take days without a GPU
RESERVE = 200 * 2**20  # bytes left free for logs and everybody else


def check_libraries(config: RunConfig) -> None:
    """W&B and Unsloth, if they are asked for.

    Raises:
        ConfigError: a package or a key is missing.
        HardwareError: Unsloth without a GPU.
    """
    from .hardware import devices

    if config.report_to == "wandb":
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError("report_to: Weights & Biases is not installed. Run `pip install wandb`, or leave it out.")
        if not _wandb_key() and os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun"):
            raise ConfigError("report_to: Weights & Biases has no key. Run `wandb login`, or set WANDB_API_KEY.")
    if config.engine == "unsloth":
        if not devices():
            raise HardwareError("Unsloth needs an NVIDIA GPU, and there is none. Choose engine `auto` or `trl`.")
        if importlib.util.find_spec("unsloth") is None:
            raise ConfigError(
                "engine: Unsloth is not installed. Run `pip install -r requirements-unsloth.txt`, or choose `auto`."
            )
        if config.adapter:
            raise ConfigError("adapter: Unsloth cannot go on from an adapter here. Choose engine `auto` or `trl`.")


def _wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def check_hardware(config: RunConfig, facts: ModelFacts) -> None:
    """A GPU where the model needs one.

    Raises:
        HardwareError: the model is too large for a CPU, or asks for a format that CPUs do not train in.
        ModelError: the model's window is shorter than ``max_length``.
    """
    from .hardware import devices

    found = devices()
    cpus = not found and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")  # accelerate's own setting
    if config.num_gpus > max(1, len(found)) and not cpus:
        raise HardwareError(f"num_gpus is {config.num_gpus}, this machine shows {len(found)} GPUs. Lower num_gpus.")
    if not found:
        _require_small(config.model, facts.parameters)
    if not found and config.dtype == "float16":
        raise HardwareError("float16 cannot be trained in on a CPU. Choose dtype `auto`, `bfloat16` or `float32`.")
    if config.max_length > facts.max_position_embeddings:
        raise ModelError(
            f"max_length {config.max_length} is more than {config.model} can read. "
            f"Set max_length to at most {facts.max_position_embeddings}."
        )


def check_size(config: RunConfig) -> None:
    """The same for a model that is not on this machine, before anything is fetched: by its name.

    Raises:
        HardwareError: the model is too large for a CPU, and there is no GPU.
    """
    from .hardware import devices
    from .model_shape import find

    shape = find(config.model)
    if shape is not None and not devices():
        _require_small(config.model, shape.parameters)


def refusal(config: RunConfig, facts: ModelFacts | None = None) -> str:
    """Why a run would be refused on this machine, as far as can be told without loading anything; "" if it would not.

    ``facts``: of the model, where they are known.
    """
    from .model_files import require_adapter

    try:
        check_libraries(config)
        check_size(config)
        if config.adapter:
            require_adapter(Path(config.adapter))
        if facts is not None:
            check_hardware(config, facts)
    except KTOError as e:
        return str(e)
    return ""


def _require_small(name: str, parameters: int) -> None:
    if parameters > CPU_LIMIT:
        raise HardwareError(
            f"{name} has about {parameters / 1e9:.1f} billion parameters and there is no NVIDIA GPU here. "
            "Choose the preset `demo`, a model of up to 1.5 billion parameters, or a machine with a GPU."
        )


def lora_parameters(config: RunConfig, facts: ModelFacts) -> int:
    """Parameters of the adapter, from the shapes of the usual projections."""
    h, q, kv, i = facts.hidden, facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim, facts.intermediate
    shapes = {
        "q_proj": h + q, "k_proj": h + kv, "v_proj": h + kv, "o_proj": q + h,
        "gate_proj": h + i, "up_proj": h + i, "down_proj": i + h,
    }  # fmt: skip
    targets = config.target_modules
    if isinstance(targets, str):
        targets = list(shapes)
    return facts.layers * config.r * sum(shapes.get(t.split(".")[-1], 2 * h) for t in targets)


def check_disk(config: RunConfig, facts: ModelFacts, run_dir: Path, steps: int) -> None:
    """Room for the checkpoints that will lie there at once, one being written, and the adapter.

    Raises:
        DiskError: not enough, with the numbers; or the folder cannot be written.
    """
    weights = 4 * lora_parameters(config, facts)  # fp32
    state = weights // 2 if "8bit" in config.optim else 2 * weights  # AdamW's two moments
    tokenizer = 15 * 2**20
    saves = max(1, math.ceil(steps / config.save_steps))
    kept = min(config.save_total_limit, saves) + (1 if saves > config.save_total_limit else 0)
    needed = kept * (weights + state + tokenizer) + weights + tokenizer + RESERVE
    there = sum(p.stat().st_size for p in run_dir.rglob("*") if p.is_file())  # a resumed run's own checkpoints
    try:
        free = shutil.disk_usage(run_dir).free
    except OSError as e:
        raise DiskError(
            f"The run's folder {run_dir} cannot be read ({e.strerror}). Choose another --output-dir."
        ) from e
    if not os.access(run_dir, os.W_OK):
        raise DiskError(f"The run's folder {run_dir} cannot be written. Choose another --output-dir.")
    if free + there < needed:
        raise DiskError(
            f"{kept} checkpoints and the adapter need {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free in "
            f"{run_dir}. Free some space, lower save_total_limit, or choose another --output-dir."
        )
