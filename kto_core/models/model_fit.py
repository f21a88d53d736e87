"""Do the weights in a folder fit its configuration? Told from the headers, before any weight is read."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kto_core.errors import ModelError

from .language.part import auto_class, decoder_of
from .language.targets import taken_for_experts
from .model_gate import PLAIN, tensors_of

_ADAPTER = re.compile(r"(^|\.)lora_")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
MORE_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")  # layers that only predict further ahead


def build(folder: Path, layout):
    """The configuration in ``folder`` and its causal language model without weights. ``layout``: see `require_fit`.

    Raises:
        ModelError: transformers makes no causal language model of it.
    """
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with layout(), torch.device("meta"):
            return config, auto_class(config).from_config(config, trust_remote_code=False)
    except Exception as e:  # configurations are checked by whatever code they reach
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)[:300]
        raise ModelError(f"No model can be built from the config.json of {folder.name}: {reason}") from e


@dataclass(frozen=True)
class Reach:
    """What of a language model's linear weights LoRA adapts: ``share``, of 1; ``most``: the share with all-linear,
    which leaves experts alone."""

    share: float
    most: float

    @property
    def sentence(self) -> str:
        said = f"LoRA adapters on {self.share:.0%} of the language model's linear weights."
        if self.share < self.most - 0.005:
            return f"{said} With target_modules all-linear it is {self.most:.0%}."
        return f"{said} Experts are not trained." if self.most < 0.995 else said


def reach(model) -> Reach:
    """Of a PeftModel with LoRA, its weights loaded or not. The output head, which never trains, is not counted."""
    import torch

    base = model.get_base_model()
    head, adapted, linear, experts = base.get_output_embeddings(), 0, 0, 0
    decoder, taken = decoder_of(base), taken_for_experts(base)
    inside = {id(m.base_layer) for m in decoder.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}
    for name, module in decoder.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head and not _ADAPTER.search(name):
            size = module.in_features * module.out_features  # 4-bit weights have another shape
            adapted += size if id(module) in inside else 0
            if id(module) not in inside and ("experts" in name.split(".") or name.rpartition(".")[2] in taken):
                experts += size
            else:
                linear += size
        elif not isinstance(module, torch.nn.modules.conv._ConvNd):  # experts in one tensor, or out of sight in 4 bits
            experts += sum(p.numel() for p in module.parameters(recurse=False) if p.ndim == 3)
            experts += sum(math.prod(size) for size in getattr(module, "sizes", {}).values())
    total = max(1, linear + experts)
    return Reach(adapted / total, linear / total)


def require_fit(folder: Path, layout=contextlib.nullcontext):
    """Compare names and shapes with a model built from the configuration without memory.

    transformers renames and joins some tensors on loading: only names that stand on both sides are compared.

    Args:
        layout: the context in which the model's classes are those of the checkpoint (`experts.gpt_oss.layout`).

    Returns:
        The model that was built.

    Raises:
        ModelError: no model can be built, a shape differs, or the files hold layers that the configuration leaves out.
    """
    config, model = build(folder, layout)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: (kind, size) for name, (_, kind, size) in tensors_of(folder).items()}
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    prefix = model.base_model_prefix + "."
    for name, (dtype, shape) in sorted(found.items()):
        name = name if name in wanted or prefix + name not in wanted else prefix + name
        if name in wanted:
            if dtype in PLAIN and _sizes(shape) != _sizes(wanted[name]):
                raise ModelError(
                    f"The weights of {folder.name} do not fit its config.json: {name[:100]} has the shape {shape}, "
                    f"but {wanted[name]} is expected. Download the model again, or choose another."
                )
        elif any(one in wanted and one in found for one in _first_of(name)) and not (
            any(p.search(name) for p in ignored) or _predicts_ahead(name, config)
        ):
            raise ModelError(
                f"The files of {folder.name} contain weights that its config.json leaves out ({name[:100]}): it "
                "describes fewer layers than there are. Download the model again, or choose another."
            )
    return model


def _sizes(shape: tuple[int, ...]) -> list[int]:
    """Sizes in any order: some tensors are transposed on loading."""
    return sorted(n for n in shape if n != 1)


def _first_of(name: str) -> Iterator[str]:
    """The names with 0 in place of one of the numbers: the same weight of the first layer, or of the first expert."""
    for number in NUMBER.finditer(name):
        yield f"{name[: number.start()]}0{name[number.end() :]}"


def _predicts_ahead(name: str, config) -> bool:
    text = config.get_text_config()
    more = sum(n for key in MORE_LAYERS if isinstance(n := getattr(text, key, 0), int))
    layers, number = getattr(text, "num_hidden_layers", 0), NUMBER.search(name)
    return number is not None and layers <= int(number[0]) < layers + more


def unused(names) -> str:
    """A sentence about weights of the files that have no place in the loaded model; "" if there are none."""
    names = sorted(names)
    if not names:
        return ""
    return f"{len(names)} weights of the files are not used ({', '.join(names[:3])}{'…' if len(names) > 3 else ''})."
