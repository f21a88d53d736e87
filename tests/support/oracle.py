"""KTO by its formulas, in float64, one row at a time and one token at a time: what the engine is checked against.

Written from the papers (KTO, arXiv 2402.01306; APO, arXiv 2408.06266). Its formulas use nothing from the code under
test; the small models below are made as a run makes them.
"""

import math

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from kto_core.models.language.towers import leave_out_towers

from . import recurrence


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def kto(policy, reference, labels, z0, beta, desirable, undesirable):
    """Mean loss and its derivative by each row's log pi(y|x)."""
    losses, slopes = [], []
    for logp, ref, label in zip(policy, reference, labels, strict=True):
        r = logp - ref
        weight, sign = (desirable, 1) if label else (undesirable, -1)
        value = sigmoid(beta * sign * (r - z0))
        losses.append(weight * (1 - value))
        slopes.append(-weight * beta * sign * value * (1 - value))
    n = len(losses)
    return sum(losses) / n, [s / n for s in slopes]


def z0(kl, kl_reference) -> float:
    return max(0.0, sum(a - b for a, b in zip(kl, kl_reference, strict=True)) / len(kl))


def logp(model, prompt, completion) -> torch.Tensor:
    """Sum over the completion's tokens of log p(token | everything before it); the model's own plain forward."""
    device = next(model.parameters()).device
    ids = torch.tensor(np.concatenate([prompt, completion]).astype(np.int64), device=device)[None]
    table = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].double(), -1)
    return sum(table[len(prompt) - 1 + t, int(token)] for t, token in enumerate(completion))


def step(model, prompts, completions, borrowed, labels, beta=0.1, desirable=1.0, undesirable=1.0, kl=True):
    """Loss, z0, log-probs and the gradient of every trainable parameter; the reference is the base model."""
    with recurrence.exact(model):
        return _step(model, prompts, completions, borrowed, labels, beta, desirable, undesirable, kl)


def _step(model, prompts, completions, borrowed, labels, beta, desirable, undesirable, kl):
    with torch.no_grad(), model.disable_adapter():
        reference = [float(logp(model, p, y)) for p, y in zip(prompts, completions, strict=True)]
        kl_reference = [float(logp(model, p, y)) for p, y in zip(prompts, borrowed, strict=True)]
    with torch.no_grad():
        kl_policy = [float(logp(model, p, y)) for p, y in zip(prompts, borrowed, strict=True)]
    zero = z0(kl_policy, kl_reference) if kl else 0.0
    model.zero_grad(set_to_none=True)
    rows = [logp(model, p, y) for p, y in zip(prompts, completions, strict=True)]
    loss, slopes = kto([float(r.detach()) for r in rows], reference, labels, zero, beta, desirable, undesirable)
    sum(slope * row for slope, row in zip(slopes, rows, strict=True)).backward()
    return {
        "loss": loss,
        "z0": zero,
        "logps": torch.stack(rows).detach(),
        "reference": torch.tensor(reference, dtype=torch.float64),
        "kl_reference": torch.tensor(kl_reference, dtype=torch.float64),
        "gradients": gradients(model),
    }


def gradients(model) -> dict[str, torch.Tensor]:
    """Gradients by name; they are taken off the model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def worst(ours: dict, theirs: dict) -> float:
    """Largest relative difference of any tensor; both have the same tensors."""
    assert ours.keys() == theirs.keys() and ours
    return max(float((ours[k] - theirs[k]).norm() / theirs[k].norm().clamp(min=1e-30)) for k in theirs)


# ---- small models and rows -------------------------------------------------------------------------------------------

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_QWEN_ROPE = {
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5
    }
}  # fmt: skip
RECURRENT = {  # layers that go along the sequence
    "qwen3_5": ("qwen3_5_text", _DELTA | _QWEN_ROPE),
    "olmo_hybrid": ("olmo_hybrid", _DELTA),
    "olmo_hybrid without rotary embeddings": ("olmo_hybrid", _DELTA | {"rope_parameters": {"rope_theta": None}}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}),
}
ARCHITECTURES = {
    "llama": ("llama", {}),
    "llama with rope scaling": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral with a window": ("mistral", {"sliding_window": 9}),
    "qwen2": ("qwen2", {}),
    "qwen2 with a window": ("qwen2", {"use_sliding_window": True, **SLIDING}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {**SLIDING, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", SLIDING),
    "phi3": ("phi3", {}),
    "granite": ("granite", {"logits_scaling": 3.0}),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 1.07}),
    "cohere": ("cohere", {"logit_scale": 0.4}),
    "olmo2": ("olmo2", {}),
    "gpt_oss": ("gpt_oss", {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}),
    **RECURRENT,
}
# models that also take images: type, settings of the language model, settings of the rest
_TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_QWEN_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
_QWEN2_TOWER = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
_GEMMA4 = {
    **SLIDING,
    "global_head_dim": 32,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
_PER_LAYER = {"vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8}


def _sections(*sizes):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sizes)}}


WRAPPERS = {
    "gemma3 with images": ("gemma3", SLIDING, {"vision_config": _TOWER, "mm_tokens_per_image": 4}),
    "gemma4": ("gemma4", _GEMMA4 | _PER_LAYER | {"num_kv_shared_layers": 0}, {"vision_config": _TOWER}),
    "gemma4 with shared keys": (
        "gemma4",
        {
            **_GEMMA4, **_PER_LAYER, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        {"vision_config": _TOWER},
    ),
    "gemma4 unified": ("gemma4_unified", _GEMMA4, {"vision_config": _TOWER | {"mm_embed_dim": 32}}),
    "mistral3": ("mistral3", {}, {"vision_config": _TOWER | {"head_dim": 16}}),
    "ministral3": ("mistral3", {"model_type": "ministral3"}, {"vision_config": _TOWER | {"head_dim": 16}}),
    "qwen2_vl": ("qwen2_vl", _sections(2, 3, 3), {"vision_config": _QWEN2_TOWER}),
    "qwen2.5_vl": ("qwen2_5_vl", _sections(2, 3, 3), {"vision_config": _QWEN_TOWER}),
    "qwen3_vl": ("qwen3_vl", _sections(3, 3, 2), {"vision_config": _QWEN_TOWER | {"deepstack_visual_indexes": [0]}}),
    "qwen3.5 with images": ("qwen3_5", _DELTA | _QWEN_ROPE, {"vision_config": _QWEN_TOWER}),
    "internvl": ("internvl", {}, {"vision_config": _TOWER | {"image_size": [28, 28], "patch_size": [14, 14]}}),
}  # fmt: skip
SERVED = [*ARCHITECTURES, *WRAPPERS]


def config_of(architecture, **extra):
    """transformers' config of a small model; ``extra``: settings of its language model."""
    if architecture in ARCHITECTURES:
        model_type, settings = ARCHITECTURES[architecture]
        return AutoConfig.for_model(model_type, **{**SIZES, **settings, **extra})
    model_type, settings, rest = WRAPPERS[architecture]
    inner = AutoConfig.for_model(model_type).get_text_config().model_type
    return AutoConfig.for_model(model_type, text_config={"model_type": inner, **SIZES, **settings, **extra}, **rest)


def base_model(architecture="llama", **extra):
    """A small model with random weights; of one that takes images what the product keeps of it."""
    config = config_of(architecture, **extra)
    torch.manual_seed(0)
    if architecture in WRAPPERS:
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
        leave_out_towers(model)
        return model
    settings = ARCHITECTURES[architecture][1]
    # "eager" is each architecture's own, complete attention (SDPA leaves out Gemma 2's softcap)
    experts = {"experts_implementation": "eager"} if "num_local_experts" in settings else {}  # the others lack float64
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", **experts)


def lora(**extra):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | extra)


def tuned_model(architecture="llama", dtype=torch.float64):
    """A small model whose adapter is not zero."""
    model = get_peft_model(base_model(architecture).to(dtype), lora())
    recurrence.remember(model)
    fill_adapter(model)
    return model.to(dtype)


def fill_adapter(model, seed=1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)


def random_rows(n, seed=0, system=20):
    """Prompts with a shared start (two of them equal), completions of 1 to 19 tokens, labels of both kinds."""
    rng = np.random.default_rng(seed)

    def ids(length):
        return rng.integers(3, 300, length).astype(np.int32)

    start = ids(system)
    prompts = [np.concatenate([start, ids(rng.integers(3, 15))]) for _ in range(n)]
    if n > 3:
        prompts[3] = prompts[1]
    completions = [ids(rng.integers(2, 20)) for _ in range(n)]
    completions[0] = ids(1)
    return prompts, completions, [bool(i % 3) for i in range(n)]
