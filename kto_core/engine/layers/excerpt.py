"""A small copy of a model in float32: one decoder layer of each kind, and a part of the vocabulary.

What the packed passes do differently from a model shows in it beyond doubt, where the noise of half precision and 4
bits in a whole model would hide it.
"""

from __future__ import annotations

import copy

import torch

from kto_core.hardware.out_of_memory import is_out_of_memory
from kto_core.models.experts.bank import Bank

from . import lean, recurrent, sharding

LEAST, MOST = 2, 4  # layers
ROWS = 512  # of the vocabulary, beside the tokens that are asked for
NARROW = (torch.bfloat16, torch.float16)


def sizes(layers: list) -> int:
    """Bytes of the copy's layers."""
    return 4 * sum(_parameters(module) for i in kinds(layers) for module in layers[i].modules())


def kinds(layers: list) -> list[int]:
    """Numbers of the first layer of each kind, `LEAST` to `MOST` of them."""
    first: dict[str, int] = {}
    for i, layer in enumerate(layers):
        first.setdefault(_kind(layer), i)
    chosen = sorted(first.values())[:MOST]
    chosen += [i for i in range(len(layers)) if i not in chosen][: max(0, LEAST - len(chosen))]
    return sorted(chosen)


def copied(engine, ids: torch.Tensor, device: torch.device):
    """The copy, in train mode on ``device``, and its own ids of the tokens ``ids``. None where a layer's weights are
    divided over processes or in a format that is not known here, or a model of fewer layers does not run.

    Args:
        engine: the `step.Engine` of the model. ids: int64 ``[n]``.
    """
    causal, layers = engine.causal, engine.layers
    modules = [m for i in kinds(layers) for m in layers[i].modules()]
    if any(sharding.is_divided(layer) for layer in layers) or not all(map(_known, modules)):
        return None
    vocabulary = causal.get_input_embeddings().weight.shape[0]
    spread = torch.linspace(0, vocabulary - 1, min(ROWS, vocabulary)).long()
    rows, places = torch.unique(torch.cat([ids.cpu(), spread]), return_inverse=True)
    memo: dict[int, object] = {id(engine): engine}  # what is not copied as it is; layers know their engine
    for i, layer in enumerate(layers):
        if i not in kinds(layers):
            memo[id(layer)] = torch.nn.Identity()
    for module in modules:
        if type(module).__name__ == "Linear4bit":
            memo[id(module)] = _dense(module, device)
        elif isinstance(module, Bank) and module.packed.device == device:
            memo[id(module)] = module  # frozen, and multiplies in the format of what comes
    tables = [m for m in engine.decoder.modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings > rows[-1]]
    ends = [*tables, causal.get_output_embeddings()]
    for tensor in (t for end in ends for t in (end.weight, getattr(end, "bias", None)) if t is not None):
        part = tensor.detach()[rows.to(tensor.device)]
        memo[id(tensor)] = torch.nn.Parameter(part, requires_grad=False)  # tied ones stay tied
    small = copy.deepcopy(causal, memo)
    _shorten(small, causal, layers)
    small._apply(lambda t: t.to(device, torch.float32 if t.dtype in NARROW else t.dtype))
    own = places[: len(ids)].to(device)
    with lean.use(recurrent.reference_forwards(engine.recurrent)):
        return (small.train(), own) if _runs(small, own) else None


@torch.no_grad()
def _runs(small, ids: torch.Tensor) -> bool:
    """Whether the model's own forward takes fewer layers: not where layers share weights or keys with others."""
    try:
        with torch.autocast(ids.device.type, enabled=False):
            small(input_ids=ids[None, :2], use_cache=False)
    except (RuntimeError, KeyError, IndexError, AttributeError, TypeError) as e:
        if is_out_of_memory(e):
            raise
        return False
    return True


def _kind(layer) -> str:
    """All that a layer's modules keep as plain values, their number aside."""
    plain = (bool, int, float, str)
    return repr(
        [
            (name, type(m).__name__, sorted((k, v) for k, v in vars(m).items() if _says(k) and isinstance(v, plain)))
            for name, m in layer.named_modules()
        ]
    )


def _says(name: str) -> bool:
    return name not in ("layer_idx", "training") and not name.startswith("_")


def _parameters(module) -> int:
    if type(module).__name__ == "Linear4bit":
        return module.in_features * module.out_features
    return sum(p.numel() for p in module.parameters(recurse=False))


def _known(module) -> bool:
    if type(module).__name__ == "Linear4bit":
        return lean.quant_state(module) is not None
    return all(p.dtype.is_floating_point and p.dtype.itemsize > 1 for p in module.parameters(recurse=False))


def _dense(module, device) -> torch.nn.Linear:
    weight = lean.dense(module, torch.float32).view(module.out_features, module.in_features).to(device)
    plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        plain.bias = torch.nn.Parameter(module.bias.detach().to(device, torch.float32), requires_grad=False)
    return plain


def _shorten(small, causal, layers: list) -> None:
    """Take the layers out that were not copied, and make the configuration say so."""
    chosen = kinds(layers)
    path = next(name for name, m in causal.named_modules() if isinstance(m, torch.nn.ModuleList) and layers[0] in m)
    parent, _, name = path.rpartition(".")
    kept = torch.nn.ModuleList([small.get_submodule(path)[i] for i in chosen])
    setattr(small.get_submodule(parent), name, kept)
    for number, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                vars(module)["layer_idx"] = number
    for config in {id(c): c for m in small.modules() if (c := getattr(m, "config", None)) is not None}.values():
        for key, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == len(layers):
                vars(config)[key] = [value[i] for i in chosen]
        vars(config)["num_hidden_layers"] = len(chosen)
