"""The memory plan of models whose layers go along the sequence: counted as what they are."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from kto_core.engine import limits
from kto_core.engine.step import Engine
from kto_core.hardware.gpus import GIB
from kto_core.models.shape import from_config
from kto_core.planning import counting, memory
from tests.support.memory import CARD, LENGTHS, resolve

PUBLISHED = {
    "qwen3_5_text": {},
    "olmo_hybrid": {},
    "lfm2": {"num_hidden_layers": 6, "layer_types": ["conv", "conv", "full_attention"] * 2},
}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 64, "linear_value_head_dim": 48}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_weights_and_adapters_are_those_of_the_model(kind):
    config = AutoConfig.for_model(kind, **PUBLISHED[kind])
    shape = from_config(config.to_dict(), kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        total = sum(p.numel() for p in model.parameters())
        adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
        names = {n.split(".lora_")[0].rpartition(".")[2] for n, p in adapted.named_parameters() if p.requires_grad}
        adapters = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        some = ["q_proj", "out_proj", "o_proj"]
        fewer = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=8, target_modules=some))
    assert shape.lora_parameters("all-linear", 8) == adapters
    assert {n for n, _ in shape.recurrent.linears} <= names and "conv1d" not in names and "conv" not in names
    if kind != "lfm2":  # its attention layers have other names than the usual
        assert shape.lora_parameters(some, 8) == sum(p.numel() for p in fewer.parameters() if p.requires_grad)
    assert shape.parameters == pytest.approx(total, rel=1e-3)


def test_a_config_without_a_list_of_layers_counts_the_same():
    config = AutoConfig.for_model("qwen3_5_text").to_dict()
    whole = from_config(config, "x")
    config |= {"full_attention_interval": 4}
    del config["layer_types"]
    assert from_config(config, "x") == whole and whole.recurrent.layers == 24 and whole.attending == 8
    old = AutoConfig.for_model("lfm2").to_dict() | {"full_attn_idxs": [2, 5, 8]}
    del old["layer_types"]
    assert from_config(old, "x").recurrent.layers == 29


@pytest.mark.parametrize("kind, settings", [("qwen3_5_text", DELTA), ("olmo_hybrid", DELTA), ("lfm2", {})])
def test_bytes_of_a_token_are_what_the_engine_measures(kind, settings):
    """At a size that was not fitted, with layers of both kinds."""
    layers = ["conv" if kind == "lfm2" else "linear_attention", "full_attention"]
    sizes = {"hidden_size": 384, "intermediate_size": 896, "num_attention_heads": 6, "num_key_value_heads": 2}
    sizes |= {} if kind == "lfm2" else {"head_dim": 64}
    for wide, dtype in enumerate((torch.bfloat16, torch.float32)):
        config = AutoConfig.for_model(
            kind, **sizes, **settings, num_hidden_layers=2, layer_types=layers, vocab_size=200, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
        for p in model.parameters():
            p.data = p.data.float() if p.requires_grad else p.data
        autocast = nullcontext if wide else partial(torch.autocast, "cpu", torch.bfloat16)
        measured = limits.measure(Engine(model), autocast, prompt=100)[0]
        shape, k = from_config(config.to_dict(), kind), memory.Coefficients()
        c = resolve(dtype="float32" if wide else "bfloat16")
        counted = counting._token(c, shape, k, False, 100)
        assert counted.layer == pytest.approx(measured.layer, rel=0.1)
        assert counted.store == pytest.approx(measured.store, rel=0.02)


def test_qwen_of_nine_billion_parameters_on_24_gib(monkeypatch):
    shape = from_config(AutoConfig.for_model("qwen3_5").to_dict(), "Qwen3.5-9B")
    monkeypatch.setattr(counting, "shape_of", lambda c: shape)
    monkeypatch.setattr(memory, "shape_of", lambda c: shape)
    plan = memory.plan(resolve(), LENGTHS, device=CARD)
    assert plan.verdict == "fits" and plan.parts["recurrent layers"] == 1
    assert plan.parts["weights"] == pytest.approx((shape.linear_parameters * 4.127 / 8 + 2.04e9 * 2) / GIB, rel=0.01)
    trl = memory.plan(resolve(engine="trl"), LENGTHS, device=CARD)
    assert "recurrent layers" not in trl.parts
