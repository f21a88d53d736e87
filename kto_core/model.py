"""Base model, tokenizer, adapter: found, described, loaded. Knows nothing of data sets, losses or runs.

Safetensors only; code that ships with a model is never run. Facts come from ``config.json`` and file headers, so that
planning needs no torch.
"""

from __future__ import annotations

import contextlib
import json
import struct
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import demo_model
from .errors import ConfigError, HardwareError, ModelError
from .jobs import Progress, no_progress
from .libraries import transformers_ready
from .model_files import cached_folder, download, hub_config, hub_exists, tensor_header

if TYPE_CHECKING:
    from .config import RunConfig

DEMO = "demo"  # the model name of the embedded SmolLM2-135M-Instruct
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # where the same weights live; written into adapters
EXPERTS = r".*\.experts\..*"  # their modules, whatever the architecture calls them

demo_model_dir = demo_model.demo_model_dir

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') + 'TURN_END' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# ---- where it is ----------------------------------------------------------------------------------------------------


def resolve_model(name: str, progress: Progress = no_progress, cancel: threading.Event | None = None) -> str:
    """The folder or Hub id to use for a model name; no weights are downloaded (but ``demo`` is made if need be).

    Args:
        name: ``demo``, a folder with ``config.json``, or a Hub id (``owner/name``).

    Raises:
        ModelError: it is not there, gated, or the Hub cannot be reached and it is not in the cache.
    """
    name = name.strip()
    if not name:
        raise ModelError("No model is chosen. Name a Hub id, a folder, or `demo`.")
    if name == DEMO:
        return str(demo_model_dir(progress, cancel))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"The folder {name} has no config.json, so it is no model. Choose the folder that has it.")
        return str(folder)
    if not cached_folder(name):
        hub_exists(name)
    return name


def local_folder(name: str, progress: Progress = no_progress, cancel: threading.Event | None = None) -> Path:
    """Folder with the weights of ``name``; fetched from the Hub into its cache if they are not there yet.

    Raises:
        ModelError, DiskError, Cancelled: see `resolve_model` and `model_files.download`.
    """
    where = resolve_model(name, progress, cancel)
    if Path(where).is_dir():
        return Path(where)
    return cached_folder(where) or download(where, progress, cancel)


def public_name(name: str) -> str:
    """The name under which others find the same base model: what an adapter says it belongs to."""
    return DEMO_HUB_ID if name == DEMO else name


# ---- what it is -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Numbers of a decoder, from its configuration. ``quantized`` is the method, or "" for plain weights."""

    name: str
    architecture: str
    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_position_embeddings: int
    tied: bool
    experts: int
    quantized: str
    parameters: int

    def to_dict(self) -> dict:
        return asdict(self)


def model_facts(name: str) -> ModelFacts:
    """Facts of ``name`` from its ``config.json`` (for a Hub id that one file is fetched); weights are not read.

    Raises:
        ModelError: the model cannot be found or is not a decoder that can be trained here.
    """
    where = resolve_model(name)
    folder = Path(where) if Path(where).is_dir() else cached_folder(where)
    try:
        raw = json.loads((folder / "config.json" if folder else hub_config(where)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ModelError(f"The config.json of {name} cannot be read ({e}). Fetch the model again.") from e
    text = raw.get("text_config") or raw  # models that also see images keep the decoder's numbers inside

    def number(*keys: str, default: int | None = None) -> int:
        for key in keys:
            if isinstance(text.get(key), int):
                return text[key]
        if default is None:
            raise ModelError(f"{name} is no text decoder that can be trained here: its config.json lacks {keys[0]}.")
        return default

    layers, hidden = number("num_hidden_layers", "n_layer"), number("hidden_size", "n_embd")
    heads = number("num_attention_heads", "n_head")
    experts = number("num_local_experts", "num_experts", "n_routed_experts", default=0)
    facts = ModelFacts(
        name=name,
        architecture=(raw.get("architectures") or ["unknown"])[0],
        model_type=str(raw.get("model_type", "")),
        layers=layers,
        hidden=hidden,
        intermediate=number(
            *(("moe_intermediate_size",) if experts else ()), "intermediate_size", "n_inner", default=4 * hidden
        ),
        heads=heads,
        kv_heads=number("num_key_value_heads", default=heads),
        head_dim=number("head_dim", default=hidden // heads),
        vocabulary=number("vocab_size"),
        max_position_embeddings=number("max_position_embeddings", "n_positions", default=2048),
        tied=bool(text.get("tie_word_embeddings", raw.get("tie_word_embeddings", True))),
        experts=experts,
        quantized=str((raw.get("quantization_config") or {}).get("quant_method", "")),
        parameters=0,
    )
    count = (not facts.quantized and folder and _count_in_files(folder)) or _count_from_shapes(facts, text)
    return ModelFacts(**{**facts.to_dict(), "parameters": count})


def _count_in_files(folder: Path) -> int:
    """Parameters from the headers of the safetensors files; 0 without them."""
    total = 0
    for file in folder.glob("model*.safetensors"):
        try:
            header = tensor_header(file)
        except (OSError, ValueError, struct.error, MemoryError):
            return 0
        for tensor, entry in header.items():
            if tensor != "__metadata__":
                size = 1
                for n in entry["shape"]:
                    size *= n
                total += size
    return total


def _count_from_shapes(m: ModelFacts, text: dict) -> int:
    """Parameters of a gated decoder (Llama, Qwen, Mistral, Gemma, gpt-oss families); biases where configured."""
    q, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    attention = m.hidden * (2 * q + 2 * kv)
    if text.get("attention_bias") or m.model_type == "qwen2":
        attention += q + 2 * kv + (m.hidden if text.get("attention_bias") else 0)
    mlp = 3 * m.hidden * m.intermediate
    if m.experts:
        mlp = m.experts * (mlp + m.hidden)  # and the router
    embeddings = m.vocabulary * m.hidden * (1 if m.tied else 2)
    return embeddings + m.layers * (attention + mlp + 2 * m.hidden) + m.hidden


# ---- loading --------------------------------------------------------------------------------------------------------


def load_tokenizer(name: str):
    """Tokenizer of ``name`` with a pad token and a chat template (ChatML where the model brings none).

    Raises:
        ModelError: there is none, or it would need code of its own.
    """
    transformers_ready()
    from transformers import AutoTokenizer

    where = resolve_model(name)
    folder = where if Path(where).is_dir() else (cached_folder(where) or where)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as e:  # tokenizers raises bare Exception for broken files
        raise ModelError(
            f"The tokenizer of {name} does not load ({_first_line(e)}). Fetch it again or choose another."
        ) from e
    if tokenizer.eos_token is None:
        raise ModelError(f"The tokenizer of {name} has no end-of-text token: answers could never end. Choose another.")
    if not tokenizer.chat_template:
        known = "<|im_end|>" in tokenizer.get_vocab()
        if known:  # otherwise turns end with the model's own end token: one it knows beats text that looks like one
            tokenizer.eos_token = "<|im_end|>"
        tokenizer.chat_template = CHATML.replace("TURN_END", tokenizer.eos_token)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def training_dtype(config: RunConfig):
    """torch.dtype for weights and activations: bf16 where the card has it, else fp16; fp32 on a CPU."""
    import torch

    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_base(
    config: RunConfig, *, for_training: bool, progress: Progress = no_progress, cancel: threading.Event | None = None
):
    """The base model of ``config``, on the GPU if there is one, without an adapter.

    4-bit (NF4 or as configured, double quantization) when ``config.load_in_4bit``, or as the checkpoint is quantized.

    Raises:
        ModelError: it cannot be found or loaded.
        HardwareError: it does not fit into the GPU's memory.
    """
    import os

    import torch

    from . import gpt_oss
    from .hardware import GIB, keep_to_limit

    transformers_ready()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging as transformers_logging

    keep_to_limit()

    folder = local_folder(config.model, progress, cancel)
    dtype = training_dtype(config)
    facts = model_facts(str(folder))
    quantized = facts.quantized
    if quantized == "mxfp4" and for_training:
        raise ModelError(
            f"{config.model} is stored in MXFP4, which cannot be trained as it is and takes four times the memory "
            "unpacked. Choose its bitsandbytes sibling, for gpt-oss-20b unsloth/gpt-oss-20b-unsloth-bnb-4bit."
        )
    in_16_bits = facts.experts and config.load_in_4bit and not quantized and for_training
    if in_16_bits and (fused := gpt_oss.fused_experts(folder)):
        raise ModelError(
            f"The experts of {config.model} ({fused / 1e9:.1f} billion parameters) cannot be put into 4 bits "
            f"on loading; in 16 bits they take {2 * fused / GIB:.0f} GiB. Choose a checkpoint with them in 4 bits "
            "(for gpt-oss-20b unsloth/gpt-oss-20b-unsloth-bnb-4bit), or set load_in_4bit to false."
        )
    gpu = torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpu else "cpu"
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

    progress(None, f"Loading {config.model}…")
    transformers_logging.disable_progress_bar()
    try:
        model = load_whole(AutoModelForCausalLM, folder, **kwargs)
    except torch.cuda.OutOfMemoryError as e:
        raise HardwareError(
            f"{config.model} does not fit into the GPU's free memory. Unload the chat model, close what else uses the "
            "card, or choose a smaller preset."
        ) from e
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as e:
        raise ModelError(f"{config.model} cannot be loaded: {_first_line(e)}") from e
    except Exception as e:  # safetensors_rust.SafetensorError derives from Exception only
        if "afetensor" not in type(e).__name__:
            raise
        raise ModelError(
            f"A weight file of {config.model} is broken ({_first_line(e)}). Delete it and fetch it again."
        ) from e
    if quantized and dtype == torch.float16:  # the checkpoint asks for bf16, which this card would emulate
        for module in model.modules():
            if getattr(module, "compute_dtype", None) == torch.bfloat16:
                module.compute_dtype = dtype
    model.config.use_cache = not for_training
    model.config._name_or_path = model.name_or_path = public_name(config.model)
    model.train(for_training)
    return model


def load_whole(kind, folder: Path, **kwargs):
    """``kind.from_pretrained``, with every weight of the model in the checkpoint."""
    from . import gpt_oss

    ours = model_facts(str(folder)).model_type == "gpt_oss"
    if ours:
        gpt_oss.register()
    for attention in (gpt_oss.ATTENTION,) if ours else ("sdpa", "eager"):
        try:
            with gpt_oss.layout(folder) if ours else contextlib.nullcontext():
                model, info = kind.from_pretrained(
                    folder, attn_implementation=attention, output_loading_info=True, **kwargs
                )
            break
        except ValueError as e:
            if attention == "eager" or "scaled_dot_product_attention" not in str(e):
                raise
    missing = sorted(info["missing_keys"])
    for name, module in model.named_modules():  # 4-bit weights say nothing without their scales
        if type(module).__name__ == "Linear4bit" and getattr(module.weight, "quant_state", None) is None:
            missing.append(f"{name}.weight.quant_state")
    if missing:
        raise ModelError(
            f"{len(missing)} weights are not in the files of {folder.name} ({', '.join(missing[:3])}…); they would be "
            "random numbers. The download is not whole, or the files are of another format: fetch it again, or choose "
            "another."
        )
    return model


def lora_config(config: RunConfig):
    """PEFT's LoraConfig of a run. ``all-linear`` leaves experts alone, which are thousands of linear layers.

    Raises:
        ConfigError: ``lm_head`` is a target (log-probabilities are computed from its weight: it would never train).
    """
    from peft import LoraConfig, TaskType

    targets = config.target_modules
    names = [targets] if isinstance(targets, str) else list(targets)
    if any(name.split(".")[-1] == "lm_head" for name in names):
        raise ConfigError("target_modules: `lm_head` cannot be adapted with KTO, it would never be trained. Remove it.")
    return LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else names,
        exclude_modules=EXPERTS if targets == "all-linear" and model_facts(config.model).experts else None,
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

    lora = lora_config(config)
    set_seed(config.seed)
    try:
        return get_peft_model(model, lora, autocast_adapter_dtype=True)
    except ValueError as e:
        raise ModelError(f"The adapter does not fit this model: {_first_line(e)}. Check target_modules.") from e


def load_adapter(model, folder: str | Path, *, trainable: bool = False):
    """The adapter in ``folder`` on ``model`` (fp32 weights). Returns the PeftModel.

    Raises:
        ModelError: the folder has no safetensors adapter, or one of another base model.
    """
    from peft import PeftModel

    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"{folder} has no adapter (adapter_config.json and adapter_model.safetensors). Choose a finished run."
        )
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except Exception as e:  # shapes (RuntimeError), targets (ValueError), a cut file (SafetensorError)
        raise ModelError(f"The adapter in {folder} does not load on this base model: {_first_line(e)}") from e


def free_memory() -> None:
    """Give memory back after a model was dropped: the GPU's cache, and what the C library keeps of the CPU's."""
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


def _first_line(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).strip().splitlines() if line.strip()]
    return (lines[0] if lines else type(e).__name__)[:300]
