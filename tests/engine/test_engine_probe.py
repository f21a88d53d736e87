"""The comparison before the first step: in half precision, too, it accepts what is right and refuses what is not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import get_peft_model

from kto_core.engine import probe
from kto_core.engine.layers import attention, excerpt
from kto_core.engine.layers.loss import Head
from kto_core.engine.step import Engine
from kto_core.errors import NotServed
from tests.support import oracle

PROMPT = np.random.default_rng(0).integers(3, 300, 30).astype(np.int32)


def engine_of(architecture="qwen2", dtype=torch.bfloat16, **extra):
    model = oracle.base_model(architecture, **extra)
    for name, p in model.named_parameters():
        if p.ndim == 2 and "embed" not in name:
            p.data *= 6  # random weights of the usual size attend to everything alike
    return Engine(get_peft_model(model.to(dtype), oracle.lora()))


@pytest.mark.parametrize("architecture", oracle.SERVED)
def test_the_right_pass_is_accepted_in_half_precision(architecture):
    probe.check_head_and_attention(engine_of(architecture), PROMPT)


def scaled_attention(monkeypatch):
    true = attention.attend
    monkeypatch.setattr(attention, "attend", lambda q, *rest: true(1.5 * q, *rest))


def scaled_logits(monkeypatch):
    true = Head.of.__func__
    monkeypatch.setattr(Head, "of", classmethod(lambda cls, m: replace(true(cls, m), scale=1.1)))


def late_branches(monkeypatch):
    true = Engine.forward

    def forward(self, ids, positions, run):
        return true(self, ids, np.where(positions < probe.TOKENS, positions, positions + 40), run)

    monkeypatch.setattr(Engine, "forward", forward)


def noise(monkeypatch):
    """Of a kind that nothing is known of, in train mode only."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    true = Qwen2MLP.forward

    def forward(self, x):
        return true(self, x) * (1 + 0.1 * self.training * torch.rand(1, dtype=x.dtype))

    monkeypatch.setattr(Qwen2MLP, "forward", forward)


@pytest.mark.parametrize("fault", [scaled_attention, scaled_logits, late_branches, noise])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_wrong_pass_is_refused(monkeypatch, fault, dtype):
    engine = engine_of(dtype=dtype)
    fault(monkeypatch)
    with pytest.raises(NotServed, match="does not reproduce"):
        probe.check_head_and_attention(engine, PROMPT)


def test_the_copy_is_small_and_has_a_layer_of_each_kind():
    kinds = ["sliding_attention"] * 4 + ["full_attention"]
    settings = {"num_hidden_layers": 5, "layer_types": kinds, "vocab_size": 5000, "tie_word_embeddings": True}
    engine = engine_of("gemma3", **settings)
    ids = torch.tensor([7, 4321, 7])
    small, own = excerpt.copied(engine, ids, torch.device("cpu"))
    config = small.config
    assert (config.num_hidden_layers, config.layer_types) == (2, ["sliding_attention", "full_attention"])
    assert excerpt.kinds(engine.layers) == [0, 4] and len(engine.layers) == 5
    assert engine.causal.config.layer_types == kinds and small.training
    head, table = small.get_output_embeddings().weight, small.get_input_embeddings().weight
    assert head is table and len(table) <= excerpt.ROWS + 2
    assert torch.equal(table[own], engine.causal.get_input_embeddings().weight[ids].float())
    assert {p.dtype for p in small.parameters()} == {torch.float32}


def test_weights_in_four_bits_are_copied_as_what_they_are():
    from bitsandbytes.nn import Linear4bit

    model = oracle.base_model("qwen2").to(torch.bfloat16)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    packed = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None,
                                        compute_dtype=torch.bfloat16, quant_type="nf4")  # fmt: skip
                    packed.load_state_dict(linear.state_dict())
                    setattr(parent, name, packed.to("cpu"))
    engine = Engine(get_peft_model(model, oracle.lora()))
    small, _ = excerpt.copied(engine, torch.tensor([3]), torch.device("cpu"))
    ours, theirs = small.model.layers[1].mlp.down_proj.base_layer, model.model.layers[1].mlp.down_proj.base_layer
    x = torch.randn(3, ours.in_features)
    assert type(ours) is torch.nn.Linear
    assert torch.allclose(ours(x), theirs(x.bfloat16()).float(), atol=0.05 * float(ours(x).std()))
    probe.check_head_and_attention(engine, PROMPT)
