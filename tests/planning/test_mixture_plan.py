"""What the memory plan says of mixtures of experts in 4 bits."""

import pytest
import torch

from kto_core.engine.step import Engine
from kto_core.models.load import load_base
from tests.support import mixtures
from tests.support.mixtures import make_mixture
from tests.support.training import resolved


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_packed_engine_keeps_is_foretold(dtype, tmp_path, tiny_model, monkeypatch):
    """A mixture of sizes that were not fitted, as many experts as the plan's constants are for."""
    from contextlib import nullcontext
    from functools import partial

    from kto_core.engine import limits
    from kto_core.models import shape
    from kto_core.models.load import add_adapter
    from kto_core.planning import counting, memory

    sizes = {"num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 192, "num_attention_heads": 8, "head_dim": 32,
             "moe_intermediate_size": 128, "num_hidden_layers": 2}  # fmt: skip
    monkeypatch.setitem(mixtures.KINDS, "qwen3_moe", mixtures.KINDS["qwen3_moe"] | sizes)
    folder = make_mixture(tmp_path / "model", tiny_model, "qwen3_moe")
    config = resolved(
        folder, "none", load_in_4bit=True, target_modules="all-linear", engine="packed", dtype=dtype
    ).config
    engine = Engine(add_adapter(load_base(config, for_training=True), config))
    autocast = nullcontext if dtype == "float32" else partial(torch.autocast, "cpu", torch.bfloat16)
    measured, _ = limits.measure(engine, autocast)
    counted = counting._token(config, shape.find(str(folder)), memory.Coefficients(), False)
    assert counted.layer == pytest.approx(measured.layer, rel=0.05)
    assert (counted.entry, counted.busy) == (measured.entry, measured.busy)


@pytest.mark.parametrize("kind", [k for k in mixtures.KINDS if k not in ("granitemoe", "gemma4_text")])
def test_a_mixture_is_counted_whole(kind):
    """Shared experts, layers without experts and latent attention too: within norms, routers and biases."""
    from transformers import AutoModelForCausalLM

    from kto_core.models.shape import from_config

    config = mixtures.config_of(kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    assert from_config(config.to_dict(), kind).parameters == pytest.approx(total, rel=0.02)


def test_the_plan_counts_experts_in_4_bits():
    from kto_core.hardware import gpus
    from kto_core.planning import memory

    c = resolved("unsloth/Qwen3-30B-A3B-bnb-4bit", "none", preset="30b-a3b", engine="auto", load_in_4bit=True).config
    parts = memory.plan(c, [2048] * 64, device=gpus.imagined(24)).parts
    assert 15 < parts["weights"] < 16 and parts["dequantized layer"] == 0.125
    whole = memory.plan(c.model_copy(update={"model": "Qwen/Qwen3-30B-A3B", "load_in_4bit": False}), [2048] * 64,
                        device=gpus.imagined(24))  # fmt: skip
    assert whole.verdict == "does not fit" and whole.parts["weights"] > 50
