"""Which architectures the packed engine serves, as far as a configuration tells."""

from __future__ import annotations

from kto_core.models.language.part import class_of, functions_of

# kinds of layers, and the functions of a modeling file that they go along a sequence by; `layers.recurrent` knows these
ATTENTION = {"full_attention", "sliding_attention"}
ALONG = {"linear_attention": {"causal_conv1d_fn", "torch_chunk_gated_delta_rule"}, "conv": {"causal_conv1d_fn"}}
# mixtures of experts that are served, by the type of their language model: a token's experts do not depend on its
# neighbours. Those that the engine does not refuse for another reason are checked by tests of all families
MIXTURES = {
    "afmoe", "aria_text", "axk1", "cohere2_moe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "gemma4_text", "glm4_moe", "glm4_moe_lite", "gpt_oss", "granitemoe", "granitemoe_swa",
    "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "jetmoe", "laguna", "lfm2_moe", "mellum",
    "mimo_v2_flash", "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe",
    "qwen3_next", "qwen3_omni_moe_text", "qwen3_vl_moe_text", "solar_open",
}  # fmt: skip
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # their number, by any name


def is_mixture(config) -> bool:
    """Whether a language model's transformers config has experts, of which a token takes some."""
    return any((getattr(config, key, 0) or 0) > 1 for key in EXPERTS)


def recurrent_kinds(hf_config) -> set[str]:
    """Kinds of layers of this transformers config that go along the sequence in a way that the packed engine knows."""
    config = hf_config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or []) & ALONG.keys()
    return {kind for kind in kinds if functions_of(config) >= ALONG[kind]}


def available(hf_config, max_length: int | None = None) -> tuple[bool, str]:
    """Whether the packed engine serves a model with this transformers config, and if not, why in one sentence.

    Args:
        hf_config: a transformers PretrainedConfig. max_length: longest row in tokens, where it is known.
    """
    config, name = hf_config, hf_config.model_type
    if getattr(config, "is_encoder_decoder", False):
        return False, f"{name} is an encoder-decoder, and the packed engine supports decoder-only models."
    model_class = class_of(config)
    if model_class is None:
        return False, f"transformers has no causal language model for {name}."
    config = config.get_text_config()
    along = recurrent_kinds(config)
    kinds = set(getattr(config, "layer_types", None) or []) - ATTENTION - along
    if kinds or name in ("mamba", "mamba2", "rwkv", "recurrent_gemma"):
        kind = ", ".join(sorted(kinds)) or "recurrent layers"
        kind = kind.replace("_", " ").replace("linear attention", "linear attention other than Gated DeltaNet")
        return False, f"{name} has {kind}, which the packed engine does not support."
    if is_mixture(config) and config.model_type not in MIXTURES:
        return False, f"{name} is a mixture of experts of a kind that the packed engine has not been checked with."
    if getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision"):  # text stays causal there
        return False, f"{name} uses bidirectional attention, which the packed engine does not support."
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    for r in ropes:
        key = "original_max_position_embeddings"
        limit = r.get(key) or getattr(config, key, None) or config.max_position_embeddings
        # a prompt is also followed by another row's completion: up to twice max_length
        if r.get("rope_type") in ("dynamic", "longrope") and (max_length is None or 2 * max_length > limit):
            return False, (
                f"{name} changes its position encoding beyond {limit} tokens, so rows in one pass would affect each "
                f"other. Set max_length to {limit // 2} or less to use the packed engine."
            )
    if not ropes and not along:  # what goes along the sequence tells positions, too
        return False, f"{name} has no rotary position embeddings, which the packed engine needs."
    if not along and not getattr(model_class, "_supports_attention_backend", False):
        return False, f"{name} has its own attention implementation, which the packed engine cannot replace."
    return True, ""
