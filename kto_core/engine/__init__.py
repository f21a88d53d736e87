"""The packed KTO engine: TRL's KTO loss without padding, and without computing a shared token twice.

``available(hf_config)`` says whether it serves an architecture; ``PackedKTOTrainer`` trains; ``cache_size()`` and
``clear_cache()`` look after the reference log-probs on disk. Nothing heavy is imported until it is used.
"""

from __future__ import annotations

from .reference import cache_size, clear_cache

MIXTURES = ("gpt_oss",)  # mixtures of experts that are served: a token's experts do not depend on its neighbours

__all__ = ["PackedKTOTrainer", "available", "cache_size", "clear_cache"]


def __getattr__(name: str):
    if name == "PackedKTOTrainer":
        from .trainer import PackedKTOTrainer

        return PackedKTOTrainer
    raise AttributeError(name)


def available(hf_config, max_length: int | None = None) -> tuple[bool, str]:
    """Whether the packed engine serves a model with this transformers config, and if not, why in one sentence.

    Args:
        hf_config: a transformers PretrainedConfig. max_length: longest row in tokens, where it is known.
    """
    config, name = hf_config, hf_config.model_type
    if getattr(config, "is_encoder_decoder", False):
        return False, f"{name} is an encoder-decoder, and the packed engine serves decoders only."
    if config.get_text_config() is not config:
        return False, f"{name} also takes images or sound, and the packed engine serves text decoders only."
    experts = ("num_local_experts", "num_experts", "n_routed_experts")
    if any((getattr(config, key, 0) or 0) > 1 for key in experts) and name not in MIXTURES:
        return False, f"{name} is a mixture of experts, and of those the packed engine serves gpt-oss only."
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds or name in ("mamba", "mamba2", "rwkv", "recurrent_gemma"):
        kind = ", ".join(sorted(kinds)) or "recurrent layers"
        return False, f"{name} has {kind.replace('_', ' ')}, which cannot be packed as a tree."
    if getattr(config, "use_bidirectional_attention", False):
        return False, f"{name} looks at later tokens, which cannot be packed as a tree."
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    for r in ropes:
        key = "original_max_position_embeddings"
        limit = r.get(key) or getattr(config, key, None) or config.max_position_embeddings
        # a prompt is also followed by another row's completion: up to twice max_length
        if r.get("rope_type") in ("dynamic", "longrope") and (max_length is None or 2 * max_length > limit):
            return False, (
                f"{name} changes its position encoding beyond {limit} tokens, so that rows of one pass would influence "
                f"each other; set max_length to {limit // 2} or less to use the packed engine."
            )
    if not ropes:
        return False, f"{name} has no rotary position encoding, and the packed engine serves decoders that have."
    try:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        return False, f"transformers has no causal language model for {name}."
    if not getattr(model_class, "_supports_attention_backend", False):
        return False, f"{name} brings an attention of its own, which the packed engine cannot replace."
    return True, ""
