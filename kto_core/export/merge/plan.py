"""Which tensors of a base's files a merge writes, and which of them the adapter changes.

Names are those of the base's files, so a wrapper keeps its other parts and a mixture its experts as they lie there.
Which weight a layer of the adapter changes is told by PEFT, put on a model without weights, and by transformers' own
table of names.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kto_core.errors import ModelError, first_line
from kto_core.guards import bounded
from kto_core.models.facts import ModelFacts, model_facts

from . import tensor_files
from .rounding import layer_name, target_of
from .tensor_files import FLOATING, Entry
from .whole import Tell, no_layers

MORE = (  # of an adapter: more than two matrices a layer
    "use_dora", "modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias", "layer_replication",
)  # fmt: skip


def loaded_whole(facts: ModelFacts) -> bool:
    """Whether it is plain that a merge has to load this model: its experts are put together anew, or nobody here can
    take single weights out of its quantization."""
    return facts.model_type == "gpt_oss" or facts.quantized not in ("", "bitsandbytes")


@dataclass
class Plan:
    """A merge that was found possible. ``tensors``: entry as it will be -> how it is made of the base's files."""

    base: Path
    model: Any
    layers: dict[str, Any]  # name of a tensor of the base -> (its layer's name, PEFT's layer)
    tensors: list[Entry]
    scales: dict[str, dict[str, str]]  # name of a 4-bit tensor -> bitsandbytes' tensors beside it
    shapes: dict[str, tuple[int, ...]]  # of 4-bit tensors, in the model
    read: tensor_files.Reader
    own: Any  # torch.dtype the base has in memory
    dtype: Any  # torch.dtype of the merged model


def plan(base: Path, adapter: str, tell: Tell) -> Plan | None:
    """How to merge tensor by tensor; None where the model has to be loaded whole: experts that are put together anew
    (gpt-oss, MXFP4), 8-bit weights, adapters with more than LoRA's two matrices, and layers whose weight is made of
    several tensors.

    Raises:
        ModelError: base or adapter cannot be read, do not fit together, or weights are missing.
    """
    from peft.tuners.lora import Embedding, Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    from kto_core.models import load as models
    from kto_core.models.experts.filling import SCALES
    from kto_core.models.model_fit import require_fit
    from kto_core.models.model_gate import tensors_of

    facts = model_facts(str(base))
    if loaded_whole(facts):
        return None
    tell(0.02, "Reading the base model's files…")
    there = tensors_of(base)
    if any(name.endswith((".SCB", ".weight_format")) for name in there):
        return None
    model = require_fit(base)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    targets, scales = _targets(model, there, SCALES)
    if targets is None:
        return None

    tell(0.03, "Loading the adapter…")
    settings = bounded.read_dict(Path(adapter) / "adapter_config.json")
    if any(settings.get(key) for key in MORE) or settings.get("bias", "none") != "none":
        return None
    if isinstance(settings.get("init_lora_weights"), str) and settings["init_lora_weights"] != "gaussian":
        return None  # PEFT may compute with the base's weights
    _without_memory(model)
    tuned = models.load_adapter(model, adapter)
    by_target = {target: name for name, target in targets.items()}
    layers: dict[str, Any] = {}
    for name, layer in tuned.named_modules():
        if not isinstance(layer, BaseTunerLayer) or not layer.active_adapters:
            continue
        source = by_target.get(f"{layer_name(name)}.weight")
        if type(layer) not in (Linear, Embedding) or source is None:
            return None
        if source not in scales and there[source][2] != shapes[targets[source]]:
            return None
        layers[source] = (layer_name(name), layer)
    if not layers:
        raise no_layers()

    read = tensor_files.Reader(base, {name: file for name, (file, _, _) in there.items()})
    own_dtype, dtype = _dtypes(model.config, there, targets, scales, read, tell)
    kind = "F16" if str(dtype) == "torch.float16" else "BF16"
    packed = {name: _shape_of(name, scales[name], read) for name in scales if name in targets}
    order = sorted(targets, key=lambda n: (there[n][0], tensor_files.natural(n)))
    tensors = [
        Entry(n, kind if n in packed or there[n][1] in FLOATING else there[n][1], packed.get(n, there[n][2]))
        for n in order
    ]
    return Plan(base, model, layers, tensors, scales, packed, read, own_dtype, dtype)


def _without_memory(model) -> None:
    """Put a model without weights on the CPU, where PEFT then puts the adapter: each weight is one 0, seen often."""
    import torch

    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            seen = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
            setattr(module, name, torch.nn.Parameter(seen, requires_grad=False))


def _targets(model, there: dict, scales_of) -> tuple[dict[str, str] | None, dict[str, dict[str, str]]]:
    """(tensor of the base -> its name in the model, for all that is kept; 4-bit tensor -> what lies beside it).

    A tensor that transformers joins with others is kept too, and its name there is that of what it becomes a part of,
    with a mark that no layer has. (None, …): weights of the model that are nowhere.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    names = model.state_dict()
    scales: dict[str, dict[str, str]] = {}
    for name in there:
        if match := scales_of.search(name):
            scales.setdefault(name[: match.start()], {})[match[1]] = name
    beside = {other for parts in scales.values() for other in parts.values()}
    kept: dict[str, str] = {}
    covered: set[str] = set()
    for name in there:
        if name in beside:
            continue
        plain, _ = rename_source_key(name, renamings, [], model.base_model_prefix, names)
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, names)
        if pattern is not None:
            found = {target, *_also(converters, pattern, target)} & names.keys()
            if found:
                kept[name] = f"{name} of {target}"
                covered |= found
                continue
        if plain in names:
            kept[name] = plain
            covered.add(plain)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for name, target in list(kept.items()):
        if tied.get(target) in covered and tied[target] != target:
            del kept[name]  # a copy of what is there under its other name
    if any(name not in covered and tied.get(name) not in covered for name, _ in model.named_parameters()):
        return None, scales
    return kept, scales


def _also(converters, pattern: str, target: str) -> set[str]:
    """The other weights that a conversion makes of the same tensors."""
    converter = next(c for c in converters if pattern in c.source_patterns)
    patterns = [p for p in converter.target_patterns if "\\" not in p]
    mine = next((p for p in patterns if p in target), None)
    return {target.replace(mine, other) for other in patterns} if mine else set()


def _shape_of(name: str, parts: dict[str, str], read) -> tuple[int, ...]:
    """The shape of a 4-bit tensor out of its 4 bits."""
    return tuple(_state(name, parts, read)["shape"])


def _state(name: str, parts: dict[str, str], read) -> dict:
    """What bitsandbytes notes of a 4-bit tensor: its shape and dtype, among others."""
    key = next((k for k in parts if k.startswith("quant_state.")), None)
    try:
        return json.loads(bytes(read(parts[key or ""]).tolist()))
    except (KeyError, ValueError, TypeError) as e:
        raise ModelError(
            f"The 4-bit weight {name[:100]} cannot be read ({first_line(e)}). Download the model again."
        ) from e


def _dtypes(config, there: dict, targets: dict, scales: dict, read, tell: Tell):
    """The dtype that transformers gives the base, and that of the merged model; see `rounding.target_of`."""
    import torch

    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    own = getattr(config, "dtype", None)
    if own is None:
        files: dict[str, list[str]] = {}
        for file, kind, _ in there.values():
            if kind in FLOATING:
                files.setdefault(file, []).append(kind)
        own = kinds[files[min(files)][0]] if files else torch.float32
    count: Counter = Counter()
    packed = None
    for name in targets:
        _, kind, shape = there[name]
        entry = Entry(name, kind, shape)
        if name in scales:
            packed = packed or getattr(torch, _state(name, scales[name], read)["dtype"])
            count[packed] += 2 * entry.size
        elif kind in FLOATING:
            count[own] += entry.numbers
    most = count.most_common(1)[0][0]
    greatest = 0.0
    if most == torch.float32:
        plain = [n for n in targets if n not in scales and there[n][1] in FLOATING]
        for i, name in enumerate(plain):
            tell(0.04 + 0.16 * i / len(plain), f"Reading the base model: weight {i + 1:,} of {len(plain):,}")
            greatest = max(greatest, greatest_of(read(name)))
    return own, target_of(most, greatest)


def greatest_of(tensor) -> float:
    """Its greatest magnitude; NaN where it has one. No copy is made."""
    if not tensor.numel():
        return 0.0
    low, high = tensor.aminmax()
    return float("nan") if low != low or high != high else max(-float(low), float(high))
