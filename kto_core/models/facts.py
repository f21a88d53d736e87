"""A base model: where it is, what it is. Facts come from ``config.json`` and file headers: planning needs no torch."""

from __future__ import annotations

import math
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from kto_core.errors import ModelError
from kto_core.jobs import Progress, no_progress
from kto_core.paths import cache_dir

from .demo_model import FOLDER, demo_model_dir
from .hub_files import cached_folder, download, hub_config, hub_exists
from .model_gate import opened, read_object, tensor_header, weight_names
from .shape import Shape, decoder_part, from_config

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
        raise ModelError("No model is selected. Enter a Hub id, a folder, or `demo`.")
    if name == DEMO:
        return str(demo_model_dir(progress, cancel))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"The folder {name} has no config.json, so it is not a model. Choose the folder that contains "
                "config.json."
            )
        return str(folder)
    if not cached_folder(name):
        hub_exists(name)
    return name


def local_folder(name: str, progress: Progress = no_progress, cancel: threading.Event | None = None) -> Path:
    """Folder with the weights of ``name``; fetched from the Hub into its cache if they are not there yet.

    What libraries are given: it has passed `model_gate.opened`.

    Raises:
        ModelError, DiskError, Cancelled: see `resolve_model`, `model_files.download` and `model_gate.opened`.
    """
    where = resolve_model(name, progress, cancel)
    if Path(where).is_dir():
        return opened(Path(where))
    return opened(cached_folder(where) or download(where, progress, cancel))


def tokenizer_folder(name: str, progress: Progress = no_progress, cancel: threading.Event | None = None) -> Path:
    """Folder with the tokenizer of ``name``, fetched if need be; its weights need not be there. Raises like
    `local_folder`.
    """
    where = resolve_model(name, progress, cancel)
    if Path(where).is_dir():
        return opened(Path(where), weights=False)
    return opened(cached_folder(where) or download(where, progress, cancel, weights=False), weights=False)


def weights_at_hand(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of each tensor of a model that is on this machine; empty for others."""
    path = Path(name).expanduser()
    made = cache_dir() / "demo" / FOLDER
    folder = made if name == DEMO else path if path.is_dir() else cached_folder(name)
    if folder is None or not folder.is_dir():
        return {}
    return {n: entry for file in weight_names(folder) for n, entry in tensor_header(folder / file).items()}


def public_name(name: str) -> str:
    """The name under which others find the same base model: what an adapter says it belongs to."""
    return DEMO_HUB_ID if name == DEMO else name


# ---- what it is -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model is. ``architecture``: its class in transformers; ``quantized``: the method, or "" for plain weights;
    ``parameters``: by its files where they are here and plain, else by its sizes."""

    name: str
    architecture: str
    model_type: str
    quantized: str
    shape: Shape
    parameters: int

    @property
    def max_position_embeddings(self) -> int:
        """Tokens of its context; what old models have where it does not say."""
        return self.shape.max_position_embeddings or 2048

    def to_dict(self) -> dict:
        return asdict(self)


def model_facts(name: str) -> ModelFacts:
    """Facts of ``name`` from its ``config.json`` (for a Hub id that one file is fetched); weights are not read.

    Raises:
        ModelError: the model cannot be found or is not a decoder that can be trained here.
    """
    where = resolve_model(name)
    folder = Path(where) if Path(where).is_dir() else cached_folder(where)
    raw = read_object(folder / "config.json" if folder else hub_config(where))
    shape, model_type = from_config(raw, name), str(raw.get("model_type", ""))
    quantized = str((raw.get("quantization_config") or {}).get("quant_method", ""))
    counted = 0 if quantized or not folder else _count_in_files(folder)
    return ModelFacts(
        name=name,
        architecture=str(next(iter(raw.get("architectures") or ()), "unknown")),
        model_type=model_type,
        quantized=quantized,
        shape=shape,
        parameters=counted or shape.parameters + _biases(shape, model_type, decoder_part(raw, name)),
    )


def _count_in_files(folder: Path) -> int:
    """Parameters from the headers of the safetensors files; 0 without them."""
    try:
        headers = [tensor_header(folder / name) for name in weight_names(folder)]
    except ModelError:
        return 0
    return sum(math.prod(shape) for header in headers for _, shape in header.values())


def _biases(s: Shape, model_type: str, text: dict) -> int:
    """Of the attention, where they are configured; Qwen2 always has them."""
    if not text.get("attention_bias") and model_type != "qwen2":
        return 0
    return s.layers * ((s.heads + 2 * s.kv_heads) * s.head_dim + (s.hidden if text.get("attention_bias") else 0))
