"""Base model, tokenizer, adapter: loaded, and given back. Knows nothing of data sets, losses or runs.

Safetensors only; code that ships with a model is never run.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from kto_core.errors import ConfigError, KTOError, ModelError, first_line
from kto_core.guards.libraries import transformers_ready
from kto_core.hardware.out_of_memory import at_loading, is_out_of_memory
from kto_core.jobs import Progress, no_progress

from . import adapter_gate, model_gate, trial
from .facts import DEMO, local_folder, model_facts, public_name, resolve_model, tokenizer_folder
from .hub_files import cached_folder
from .language.targets import excluded, given
from .tokenizer import open_tokenizer
from .whole import bare, load_whole, require_trainable

if TYPE_CHECKING:
    from kto_core.config.run_config import RunConfig


def load_tokenizer(name: str, progress: Progress = no_progress, cancel: threading.Event | None = None):
    """Tokenizer of ``name`` with a pad token and a chat template (ChatML where the model brings none).

    One that this machine has not seen yet is tried in a child process first (`model_trial`).

    Raises:
        ModelError: there is none, it would need code of its own, or it takes more time or memory than any should.
        Cancelled: ``cancel`` was set.
    """
    folder = tokenizer_folder(name, progress, cancel)
    if name != DEMO:  # ours is made here, from a file whose hash is known
        trial.require_harmless(folder, progress, cancel)
    return open_tokenizer(folder, name)


def training_dtype(config: RunConfig):
    """torch.dtype for weights and activations: bf16 where the card has it, else fp16; fp32 on a CPU."""
    import torch

    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def training_device():
    """torch.device of this process: its GPU, else the CPU."""
    import os

    import torch

    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


def load_base(
    config: RunConfig,
    *,
    for_training: bool,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
    in_main_memory: bool = False,
):
    """The base model of ``config``, on the GPU if there is one, without an adapter.

    4-bit (NF4 or as configured, double quantization) when ``config.load_in_4bit``, or as the checkpoint is quantized.

    Args:
        in_main_memory: not on the GPU: the model is to be divided over several (`engine.sharding`).

    Raises:
        ModelError: it cannot be found or loaded.
        HardwareError: it does not fit into the GPU's memory.
    """
    import torch

    from kto_core.hardware.gpus import prepare

    from .experts import gpt_oss
    from .language.towers import leave_out_towers

    transformers_ready()
    from transformers import BitsAndBytesConfig
    from transformers.utils import logging as transformers_logging

    prepare()

    folder = local_folder(config.model, progress, cancel)
    dtype = training_dtype(config)
    quantized = model_facts(str(folder)).quantized
    if for_training:
        require_trainable(config, folder)
    gpu = torch.cuda.is_available()
    device = "cpu" if in_main_memory else str(training_device())
    kwargs = {"dtype": dtype, "device_map": {"": device}, "use_safetensors": True, "trust_remote_code": False}
    if config.load_in_4bit and not quantized:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    elif not gpu and not quantized:
        kwargs.pop("device_map")  # plain weights on the CPU need no dispatch

    for sentence in remarks(config.model):
        progress(None, sentence)
    progress(None, f"Loading {config.model}…")
    transformers_logging.disable_progress_bar()
    try:
        model = load_whole(folder, progress=progress, cancel=cancel, **kwargs)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as e:
        if is_out_of_memory(e):
            raise at_loading(config.model) from e
        raise ModelError(f"{config.model} cannot be loaded: {first_line(e)}") from e
    except Exception as e:  # safetensors_rust.SafetensorError derives from Exception only
        if "afetensor" not in type(e).__name__:
            raise
        raise ModelError(
            f"A weight file of {config.model} is damaged ({first_line(e)}). Delete it and download it again."
        ) from e
    if quantized and dtype != torch.bfloat16:  # the checkpoint asks for bf16: emulated on old cards, coarse in fp32
        for module in model.modules():
            if getattr(module, "compute_dtype", None) == torch.bfloat16:
                module.compute_dtype = dtype
    if not in_main_memory:  # what is divided stays as it is
        gpt_oss.into_banks(model)
    if for_training:
        keep_weights_trainable(model)
    leave_out_towers(model)
    model.config.use_cache = not for_training
    model.config._name_or_path = model.name_or_path = public_name(config.model)
    model.train(for_training)
    return model


def without_weights(config: RunConfig, folder: Path):
    """The model of ``config``, with a fresh adapter unless it begins from one, on torch's device ``meta``: no memory.

    Args:
        folder: with its config.json.

    Raises:
        ModelError: as `load_base`, as far as can be told without weights.
        ConfigError: it has none of the ``target_modules``, or ``lm_head`` is one.
    """
    import torch

    transformers_ready()
    from peft import get_peft_model

    require_trainable(config, folder)
    model = bare(folder)
    if config.adapter:
        return model
    with clear_errors(config), torch.device("meta"):
        return get_peft_model(model, lora_config(config, model))


@contextlib.contextmanager
def clear_errors(config: RunConfig):
    """PEFT's complaint about targets that the model does not have, as the user's mistake it is."""
    try:
        yield
    except ValueError as e:
        if "arget modules" not in str(e) and "target_modules" not in str(e):
            raise
        raise ConfigError(
            f"target_modules: {config.model} has no modules named {config.target_modules}. Try all-linear."
        ) from e


def keep_weights_trainable(model) -> None:
    """bitsandbytes repacks 4-bit weights on some CPUs at the first pass in eval mode, and the repacked ones pass no
    gradient on. Undo it and prevent it."""
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        weight = module.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack

            weight.data, weight.quant_state = unpack(weight.data, weight.quant_state)


def remarks(name: str) -> list[str]:
    """What is said of a model before it is loaded: keys of its files that choose code, and are therefore not used."""
    where = resolve_model(name)
    folder = Path(where) if Path(where).is_dir() else cached_folder(where)
    found = model_gate.dropped(folder) if folder else []
    return [f"Not used of {name}, because it chooses code: {', '.join(found)}."] if found else []


def lora_config(config: RunConfig, model):
    """PEFT's LoraConfig of a run, for layers of ``model``'s language model (`language.targets`).

    Raises:
        ConfigError: ``lm_head`` is a target (log-probabilities are computed from its weight: it would never train), or
            experts are.
    """
    from peft import LoraConfig, TaskType

    targets = config.target_modules
    names = [targets] if isinstance(targets, str) else list(targets)
    if any(name.split(".")[-1] == "lm_head" for name in names):
        raise ConfigError("target_modules: `lm_head` cannot be trained with KTO. Remove it.")
    return LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=given(model, targets if isinstance(targets, str) else names),
        exclude_modules=excluded(model, targets),
        bias="none",
        task_type=TaskType.CAUSAL_LM,
    )


def add_adapter(model, config: RunConfig):
    """A fresh LoRA adapter on ``model``, seeded, its weights in fp32. Returns the PeftModel.

    Raises:
        ConfigError: ``lm_head`` is a target.
        ModelError: no target module exists in this model.
    """
    from peft import get_peft_model
    from transformers import set_seed

    lora = lora_config(config, model)
    set_seed(config.seed)
    try:
        return get_peft_model(model, lora, autocast_adapter_dtype=True)
    except ValueError as e:
        raise ModelError(f"The adapter does not fit this model: {first_line(e)}. Check target_modules.") from e


def load_adapter(model, folder: str | Path, *, trainable: bool = False):
    """The adapter in ``folder`` on ``model`` (fp32 weights). Returns the PeftModel.

    Raises:
        ModelError: the folder has no safetensors adapter, or one of another base model.
    """
    from peft import PeftModel

    folder = Path(folder)
    adapter_gate.require_adapter(folder, str(getattr(model, "name_or_path", "")))
    try:
        return PeftModel.from_pretrained(model, str(adapter_gate.opened(folder)), is_trainable=trainable)
    except KTOError:
        raise
    except Exception as e:  # shapes (RuntimeError), targets (ValueError), a cut file (SafetensorError)
        raise ModelError(f"The adapter in {folder} cannot be loaded on this base model: {first_line(e)}") from e


def free_memory() -> None:
    """Give memory back after a model was dropped: the GPU's cache, and main memory that torch and C keep."""
    import ctypes
    import gc
    import sys

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
        clear_workspaces = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
        with contextlib.suppress(RuntimeError):  # a device in error has nothing to give
            clear_workspaces()  # cuBLAS keeps one for every thread and stream that has multiplied
            torch.cuda.empty_cache()
            getattr(torch.accelerator, "empty_host_cache", lambda: None)()  # page-locked; not in every torch
