"""Small random mixtures of experts as checkpoints, sizes in whole blocks of 64 weights."""

import json
import shutil
from pathlib import Path

import torch

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024, "pad_token_id": 2, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
GROUPS = {"n_routed_experts": 6, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
KINDS = {
    "qwen3_moe": {**EXPERTS, "num_experts": 6, "norm_topk_prob": True},
    "qwen2_moe": {**EXPERTS, "num_experts": 6, "shared_expert_intermediate_size": 64},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 64},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 64},
    "granitemoe": {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 64},
    "ernie4_5_moe": {
        **EXPERTS, "moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
    },
    "glm4_moe": {**EXPERTS, **GROUPS, "first_k_dense_replace": 1},
    "glm4_moe_lite": {**EXPERTS, **GROUPS, **LATENT},
    "deepseek_v2": {**EXPERTS, **GROUPS, **LATENT, "first_k_dense_replace": 1},
    "deepseek_v3": {**EXPERTS, **GROUPS, **LATENT, "first_k_dense_replace": 1},
    "gemma4_text": {
        "enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 64,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 9,
        "vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 0, "global_head_dim": 32,
    },
}  # fmt: skip


def config_of(kind: str, vocabulary: int = 300):
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **{**SIZES, "vocab_size": vocabulary, "dtype": torch.bfloat16, **KINDS[kind]})


def make_mixture(folder: Path, tiny: Path, kind: str, *, nf4: bool = False) -> Path:
    """A checkpoint with the tokenizer of ``tiny``, in bf16 as transformers saves it, or in 4 bits (Qwen's names)."""
    import shapes
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = config_of(kind, max(300, len(tokenizer)))
    torch.manual_seed(0)
    if nf4:
        shapes.write_nf4(config, folder, "cpu")
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for name, p in model.named_parameters():
            if "experts" in name or "gate.weight" in name:
                p.data.normal_(0, 0.1)  # experts that tokens tell apart
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def copied(folder: Path, to: Path, **changes) -> Path:
    """The same checkpoint with other settings in its config.json."""
    shutil.copytree(folder, to)
    path = to / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return to
