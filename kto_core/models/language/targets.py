"""Which linear layers LoRA adapts: those of the language model, in every family."""

from __future__ import annotations

import re

from kto_core.errors import ConfigError

from .part import decoder_name, is_wrapper

ROUTER = re.compile(r"(^|.*\.)(gate|router|shared_expert_gate)(\..*)?")  # of a mixture of experts


def linear_layers(causal) -> list[str]:
    """Names of the linear layers that ``all-linear`` adapts: PEFT's, of the language model only, without experts,
    their routers, layers whose names PEFT takes for experts', and what fused kernels read past an adapter (the output
    projection of Mamba layers).
    """
    import torch

    head, within = causal.get_output_embeddings(), decoder_name(causal)
    start, modules = f"{within}." if within else "", dict(causal.named_modules())
    mixture = any("experts" in name.split(".") for name in modules)
    found, taken = [], taken_for_experts(causal)
    for name, module in modules.items():
        if not isinstance(module, torch.nn.Linear) or module is head or not name.startswith(start):
            continue
        inside = name.removeprefix(start)
        parent, _, last = name.rpartition(".")
        if "experts" in inside.split(".") or last in taken or (mixture and ROUTER.fullmatch(inside)):
            continue
        if last == "out_proj" and "Mamba" in type(modules[parent]).__name__:
            continue
        found.append(name)
    return found


def taken_for_experts(causal) -> set[str]:
    """Names that PEFT reads as those of fused experts and their router in a mixture of this type, of shared experts
    and layers without experts too: it would train the experts instead."""
    from peft.utils import transformers_weight_conversion as table

    kind = getattr(table, "_MODEL_TO_CONVERSION_PATTERN", {}).get(causal.config.model_type)
    return set(getattr(table, "_MOE_TARGET_MODULE_MAPPING", {}).get(kind, ()))


def given(causal, targets: list[str] | str) -> list[str] | str:
    """What PEFT is given as ``target_modules`` for these.

    Raises:
        ConfigError: experts are among them.
    """
    taken = taken_for_experts(causal)
    if isinstance(targets, str):
        return suffixes(causal) if taken else targets
    experts = [t for t in targets if t.rpartition(".")[2] in taken or "experts" in t.split(".")]
    if experts:
        raise ConfigError(
            f"target_modules: experts cannot be trained ({', '.join(experts)}). Set it to all-linear, or name "
            "layers of the attention."
        )
    return targets


def excluded(causal, targets: list[str] | str) -> str | None:
    """PEFT's ``exclude_modules`` for these ``target_modules``: a pattern of what they would match beyond
    `linear_layers`; None for nothing. Names that are listed choose experts, too, but nothing beside the language model.
    """
    import torch

    patterns = []
    if is_wrapper(causal.config):
        patterns.append(rf"(?!{re.escape(decoder_name(causal))}\.).*")
    if isinstance(targets, str):
        within = decoder_name(causal)
        wanted = set(linear_layers(causal))
        left = [
            name
            for name, module in causal.named_modules()
            if isinstance(module, torch.nn.Linear) and name not in wanted and name.startswith(f"{within}.")
        ]
        patterns += _patterns(left, wanted)
    return "|".join(patterns) or None


def suffixes(causal) -> list[str]:
    """The last parts of the names of `linear_layers`, for libraries that take these only."""
    return sorted({name.rpartition(".")[2] for name in linear_layers(causal)})


def _patterns(left: list[str], wanted: set[str]) -> list[str]:
    """Patterns that match the names ``left`` in every layer, and none that is ``wanted``."""
    found = set()
    for name in left:
        pattern = re.sub(r"\d+", r"\\d+", re.escape(name))
        found.add(re.escape(name) if any(re.fullmatch(pattern, other) for other in wanted) else pattern)
    return sorted(found)
