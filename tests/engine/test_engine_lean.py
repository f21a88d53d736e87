"""The leaner layers give what the layers they stand for give, keep less, and leave alone what they do not know."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from kto_core.engine.layers import gated, lean
from kto_core.engine.step import Engine
from kto_core.models.language.part import decoder_of
from tests.support import oracle


def per_layer(decoder, inputs):
    """Of Gemma 4, which looks its second embeddings up by ids that these inputs have not."""
    width = getattr(decoder.config, "hidden_size_per_layer_input", None)
    if not width:
        return {}
    layers = decoder.config.num_hidden_layers
    return {"per_layer_inputs": torch.ones(*inputs.shape[:2], layers, width, dtype=inputs.dtype)}


def gradients(model, x, forwards):
    model.zero_grad()
    inputs = x.clone().requires_grad_()
    with lean.use(forwards):
        out = model(inputs_embeds=inputs, **per_layer(model, inputs)).last_hidden_state
    (out * torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.detach(), inputs.grad, found


@pytest.mark.parametrize("architecture", oracle.SERVED)
def test_same_outputs_and_gradients(architecture):
    model = oracle.tuned_model(architecture)
    decoder = decoder_of(model.get_base_model())
    x = torch.randn(1, 9, decoder.config.hidden_size, dtype=next(decoder.parameters()).dtype)
    forwards = lean.lean_forwards(decoder)
    out, grad, found = gradients(decoder, x, forwards)
    plain_out, plain_grad, plain = gradients(decoder, x, [])
    assert torch.allclose(out, plain_out, rtol=1e-5, atol=1e-6)
    assert torch.allclose(grad, plain_grad, rtol=1e-4, atol=1e-5)
    assert found.keys() == plain.keys() and oracle.worst(found, plain) < 1e-5
    kinds = {f.func for _, _, f in forwards}
    assert lean._projection in kinds
    if architecture in ("llama", "mistral", "qwen2", "qwen3"):
        assert kinds == {lean._projection, lean._swiglu, lean._rms_norm, lean._rope}
    if architecture in ("qwen3_5", "olmo_hybrid"):
        assert gated.gated_norm in kinds


@pytest.mark.parametrize("held", [1, 2**24])
def test_a_gated_norm_keeps_its_inputs_only(monkeypatch, held):
    """Some rows at a time, or all at once."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated

    monkeypatch.setitem(gated.HELD, "cpu", held)
    theirs = Qwen3_5RMSNormGated(8).requires_grad_(False)
    theirs.weight.data.normal_()
    x, gate, wanted = (torch.randn(11, 8) for _ in range(3))
    inputs, kept = (x.requires_grad_(), gate.requires_grad_()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = gated.gated_norm(theirs.weight, theirs.variance_epsilon, *inputs)
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), gate.data_ptr()]
    assert torch.allclose(out, theirs(*inputs), rtol=1e-6)
    ours = torch.autograd.grad(out, inputs, wanted)
    for a, b in zip(ours, torch.autograd.grad(theirs(*inputs), inputs, wanted), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_adapters_off_means_the_base_model():
    model = oracle.tuned_model()
    engine = Engine(model)
    x = torch.arange(5, 15)[None]
    decoder = engine.decoder
    with torch.no_grad(), model.disable_adapter():
        plain = decoder(x).last_hidden_state
        with lean.use(engine.lean):
            assert torch.allclose(decoder(x).last_hidden_state, plain, rtol=1e-5, atol=1e-6)
    with torch.no_grad(), lean.use(engine.lean):
        assert not torch.allclose(decoder(x).last_hidden_state, plain, rtol=1e-3)


def test_less_is_kept_for_the_backward():
    model = oracle.tuned_model().float()
    decoder = decoder_of(model.get_base_model())
    kept = []
    for forwards in ([], lean.lean_forwards(decoder)):
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {}

        def pack(t, own=own, storages=storages):
            if t.untyped_storage().data_ptr() not in own:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with lean.use(forwards), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = decoder(torch.arange(5, 69)[None])
        kept.append(sum(s.nbytes() for s in storages.values()))
        del out
    assert kept[1] < 0.85 * kept[0]


def test_a_layer_computed_again_ends_before_its_largest_product(monkeypatch):
    model = oracle.tuned_model()
    engine = Engine(model, checkpoint_layers=99)
    decoder, count = engine.decoder, {}
    names = {id(m): n.split(".")[-2] for n, m in decoder.named_modules() if n.endswith("base_layer")}
    real = lean.dense

    def counted(base, dtype):
        count[names[id(base)]] = count.get(names[id(base)], 0) + 1
        return real(base, dtype)

    monkeypatch.setattr(lean, "dense", counted)
    decoder.train()
    with lean.use(engine.lean):
        x = decoder.embed_tokens(torch.arange(5, 15)[None]).requires_grad_()
        decoder(inputs_embeds=x, use_cache=False).last_hidden_state.sum().backward()
    layers = len(decoder.layers)
    assert count["down_proj"] == 2 * layers  # forward, backward
    assert count["up_proj"] == count["q_proj"] == 3 * layers  # and once more in between


@pytest.mark.parametrize("change", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_other_adapters_keep_their_own_forward(change):
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **change)
    model = get_peft_model(oracle.base_model(), config)
    forwards = lean.lean_forwards(model.get_base_model().model)
    assert {f.func for _, _, f in forwards} <= {lean._rms_norm, lean._rope}


def test_a_module_that_only_looks_alike_keeps_its_own_forward():
    model = oracle.tuned_model()
    decoder = decoder_of(model.get_base_model())

    class Louder(type(decoder.layers[0].mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    for layer in decoder.layers:
        layer.mlp.__class__ = Louder
    forwards = lean.lean_forwards(decoder)
    assert not any(f.func is lean._swiglu for _, _, f in forwards)
    assert any(m is decoder.layers[0].mlp.down_proj for m, _, _ in forwards)  # its projections still are leaner


def test_forwards_come_back_also_after_an_error():
    model = oracle.tuned_model()
    decoder = decoder_of(model.get_base_model())
    forwards = lean.lean_forwards(decoder)
    with pytest.raises(ValueError), lean.use(forwards):
        with lean.use(forwards):
            pass
        assert "forward" in forwards[0][0].__dict__
        raise ValueError
    assert not any("forward" in m.__dict__ for m in decoder.modules())


def test_four_bit_weights_and_autocast():
    """The weight is taken out of its 4 bits in the forward and in the backward; adapters stay fp32."""
    bnb = pytest.importorskip("bitsandbytes")
    from peft.tuners.lora import LoraModel

    torch.manual_seed(0)
    host = torch.nn.Module()
    host.proj = bnb.nn.Linear4bit(128, 64, bias=True, compute_dtype=torch.bfloat16, quant_type="nf4")
    plain = torch.nn.Linear(128, 64)
    host.proj.load_state_dict(plain.state_dict())
    host.proj.to("cpu")
    host.forward = lambda x: host.proj(x)
    assert host.proj.weight.quant_state is not None
    model = LoraModel(host, LoraConfig(r=4, target_modules=["proj"], init_lora_weights=False), "default")
    layer = model.model.proj
    for part in (layer.lora_A, layer.lora_B):
        part.float()  # as training keeps them
    forwards = lean.lean_forwards(model)
    assert [m for m, _, _ in forwards] == [layer]
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    results = []
    for used in (forwards, []):
        model.zero_grad()
        inputs = x.clone().requires_grad_()
        with lean.use(used), torch.autocast("cpu", torch.bfloat16):
            out = layer(inputs)
        out.float().square().sum().backward()
        results.append([out.float(), inputs.grad.float(), *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert [t.dtype for t in results[0]] == [torch.float32] * 4
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_a_measured_model_can_be_freed():
    """The graph of the measured passes must not hold the model: a run's memory has to come back."""
    import gc
    import weakref
    from contextlib import nullcontext

    from kto_core.engine import limits

    model = oracle.tuned_model()
    weights = [weakref.ref(p) for p in model.parameters()]
    limits.measure(Engine(model), nullcontext)
    del model
    gc.collect()
    assert not any(w() is not None for w in weights)
