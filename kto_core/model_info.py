"""A base model: where it is, what it is. Facts come from ``config.json`` and file headers: planning needs no torch."""

from __future__ import annotations

import json
import struct
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from .demo_model import demo_model_dir
from .errors import ModelError
from .jobs import Progress, no_progress
from .model_files import cached_folder, download, hub_config, hub_exists, tensor_header

DEMO = "demo"  # the model name of the embedded SmolLM2-135M-Instruct
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # where the same weights live; written into adapters


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
