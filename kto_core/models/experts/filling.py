"""The weights of experts that are held in 4 bits, read from a checkpoint piece by piece: never whole in 16 bits.

A checkpoint has them apart, an expert three linear layers, in 16 bits or in bitsandbytes' 4, or all of a layer in two
tensors. transformers' own table of names tells which; what else it would do to them is not done here and refused.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kto_core.errors import Cancelled, ModelError

from .bank import Bank
from .held import WEIGHTS, held, why_not

SCALES = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(?:nf4|fp4))$")
NUMBER = re.compile(r"\.experts\.(\d+)\.")
Header = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass
class Piece:
    """Where a piece of a bank lies: tensor ``name``, of which ``number`` where all experts are in one, ``turned`` or
    not; ``scales``: the tensors that bitsandbytes has beside it."""

    name: str
    number: int | None = None
    turned: bool = False
    scales: dict[str, str] = field(default_factory=dict)


@dataclass
class Source:
    """A bank's pieces, by (expert, part), and how many parts an expert has."""

    module: str
    weight: str
    shape: tuple[int, int, int]
    parts: int
    pieces: dict[tuple[int, int], Piece] = field(default_factory=dict)


def sources(model, headers: Header, folder: str) -> list[Source]:
    """The banks of ``model`` (built within `held.layout`) and where ``headers`` have their pieces.

    Args:
        headers: name -> (dtype, shape) of each tensor of the checkpoint. folder: its name, for messages.

    Raises:
        ModelError: a piece is missing, has another shape, or is stored in a way that is not known here.
    """
    found: dict[str, Source] = {}
    for name, module in held(model).items():
        for weight in WEIGHTS:
            found[f"{name}.{weight}"] = Source(name, weight, module.sizes[weight], 1)
    names = {SCALES.sub("", name) for name in headers if SCALES.search(name) and NUMBER.search(name)}
    if not found and (strange := sorted(names - model.state_dict().keys())):
        raise ModelError(
            f"The experts of {folder} are in 4 bits, and {_reason(model)}, so they cannot be read ({strange[0][:90]}). "
            "Use a 16-bit checkpoint with load_in_4bit false, or choose another model."
        )
    if not found:
        return []
    rename = _renamer(model, found)
    beside: dict[str, dict[str, str]] = {}
    for name in headers:
        if match := SCALES.search(name):
            beside.setdefault(name[: match.start()], {})[match[1]] = name
    for name, (dtype, shape) in headers.items():
        if SCALES.search(name):
            continue
        target, position, parts, known = rename(name)
        if target not in found:
            continue
        if not known:
            raise ModelError(
                f"The experts of {folder} are stored in a way that cannot be read in 4 bits ({name[:100]}). Set "
                "load_in_4bit to false, or choose another model."
            )
        _note(found[target], name, dtype, shape, position, parts, beside.get(name, {}), folder)
    for source in found.values():
        wanted = source.shape[0] * source.parts
        if len(source.pieces) != wanted:
            raise ModelError(
                f"{wanted - len(source.pieces)} of {wanted} weights of experts are missing from {folder} "
                f"({source.module}.{source.weight}). The download is incomplete, or the format is not supported. "
                "Download it again, or choose another model."
            )
    return list(found.values())


def _reason(model) -> str:
    """Why a model's experts are not held in 4 bits."""
    fused = next((m for m in model.modules() if hasattr(m, "_apply_gate")), None)
    return (why_not(fused) if fused is not None else "") or "its experts are of a kind that is not known here"


def _renamer(model, found: dict[str, Source]) -> Callable[[str], tuple[str, int, int, bool]]:
    """(name in the model, place among an expert's parts, their number, whether nothing else is to be done) of a
    checkpoint's tensor."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        Transpose,
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    names = dict.fromkeys([*model.state_dict(), *found], 0)
    prefix = model.base_model_prefix

    def rename(name: str) -> tuple[str, int, int, bool]:
        target, pattern = rename_source_key(name, renamings, converters, prefix, names)
        if pattern is None or target not in found:
            plain, _ = rename_source_key(name, renamings, [], prefix, names)
            return (plain, 0, 1, True) if plain in found else (target, 0, 1, True)
        converter = next(c for c in converters if pattern in c.source_patterns)
        kinds = [type(op) for op in converter.operations]
        known = kinds in ([MergeModulelist, Concatenate], [MergeModulelist], [Transpose])
        known = known and not any(getattr(op, "dim", None) not in (None, 0, 1) for op in converter.operations)
        return target, converter.source_patterns.index(pattern), len(converter.source_patterns), known

    return rename


def _note(
    source: Source,
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    position: int,
    parts: int,
    scales: dict[str, str],
    folder: str,
) -> None:
    experts, outputs, inputs = source.shape
    fused = len(shape) == 3 and not scales
    if fused:
        # gate and up are quantized apart, as where they lie apart; a square one is not told from its transposed
        parts = 2 if source.weight == WEIGHTS[0] else 1
        if tuple(shape) not in ((experts, outputs, inputs), (experts, inputs, outputs)):
            raise _unfit(folder, name, shape)
        turned = tuple(shape) != (experts, outputs, inputs)
        for expert in range(experts):
            for part in range(parts):
                source.pieces[expert, part] = Piece(name, expert, turned)
        source.parts = parts
        return
    number = NUMBER.search(name)
    size = outputs // parts * inputs
    if number is None or int(number[1]) >= experts or (not scales and tuple(shape) != (outputs // parts, inputs)):
        raise _unfit(folder, name, shape)
    if scales and (dtype != "U8" or shape[0] * 2 != size):
        raise _unfit(folder, name, shape)
    source.parts = parts
    source.pieces[int(number[1]), position] = Piece(name, scales=scales)


def _unfit(folder: str, name: str, shape) -> ModelError:
    return ModelError(
        f"The weights of {folder} do not fit its config.json: {name[:100]} has the shape {tuple(shape)}. Download the "
        "model again, or choose another."
    )


def fill(
    model,
    found: list[Source],
    folder: Path,
    files: Mapping[str, str],
    *,
    dtype: torch.dtype,
    device,
    quant_type: str = "nf4",
    double: bool = True,
    progress: Callable[[float], None] = lambda share: None,
    cancel: threading.Event | None = None,
) -> None:
    """Bring the weights of ``found`` (see `sources`) into ``model``, on ``device``.

    Args:
        files: name of a tensor -> file in ``folder``. quant_type, double: for weights that are not in 4 bits yet.
        progress: takes the share that is done.

    Raises:
        ModelError: experts of one layer are quantized in different ways.
        Cancelled: ``cancel`` was set.
    """
    from safetensors import safe_open

    opened: dict[str, Any] = {}

    def tensors(name: str):
        file = files[name]
        if file not in opened:
            opened[file] = safe_open(folder / file, framework="pt", device="cpu")
        return opened[file]

    for i, source in enumerate(found):
        if cancel is not None and cancel.is_set():
            raise Cancelled("Loading was cancelled.")
        progress(i / len(found))
        bank: Bank | None = None
        for (expert, part), piece in sorted(source.pieces.items()):
            data, state = _read(tensors, piece, source, part, device)
            if bank is None:
                how = (state.blocksize, state.quant_type, state.nested) if state else (64, quant_type, double)
                bank = Bank(*source.shape, source.parts, dtype=dtype, device=device, blocksize=how[0],
                            quant_type=how[1], nested=how[2])  # fmt: skip
            try:
                bank.put_quantized(expert, part, data, state) if state else bank.put(expert, part, data)
            except ValueError as e:
                raise ModelError(f"{source.module}: {e}. Choose another checkpoint of this model.") from e
        model.get_submodule(source.module).banks[source.weight] = bank


def _read(tensors, piece: Piece, source: Source, part: int, device) -> tuple[torch.Tensor, Any]:
    """A piece's data on ``device``, and bitsandbytes' state of it or None."""
    if piece.scales:
        from bitsandbytes.functional import QuantState

        data = tensors(piece.name).get_tensor(piece.name).to(device)
        state = {key: tensors(name).get_tensor(name) for key, name in piece.scales.items()}
        return data, QuantState.from_dict(state, device=torch.device(device))
    if piece.number is None:
        return tensors(piece.name).get_tensor(piece.name).to(device), None
    whole = tensors(piece.name).get_slice(piece.name)[piece.number : piece.number + 1][0].to(device)
    whole = whole.t() if piece.turned else whole
    size = source.shape[1] // source.parts
    return whole[part * size : (part + 1) * size], None
