"""gpt-oss in the layout of its 4-bit checkpoints: loaded whole, exact, trained, merged into transformers' own."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from kto_core.errors import ModelError
from kto_core.models.experts import gpt_oss
from kto_core.models.load import load_base
from kto_core.models.model_gate import tensors_of
from kto_core.planning import counting
from kto_core.runs import folders
from kto_core.training import start as starting
from tests.support.training import make_data, resolved

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture(scope="module")
def tiny_oss(tiny_model, tmp_path_factory):
    """Two layers, four experts, with the tokenizer of the tiny model."""
    return make_oss(tmp_path_factory.mktemp("oss") / "model", tiny_model)


def make_oss(folder, tiny_model, **sizes):
    import shapes
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = AutoConfig.for_model(
        "gpt_oss",
        **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
           "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": len(tokenizer),
           "sliding_window": 8, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2,
           "pad_token_id": 2, "dtype": torch.bfloat16, **sizes},
    )  # fmt: skip
    shapes.write_gpt_oss(config, folder, "cpu")
    tokenizer.save_pretrained(folder)
    return folder


def load(folder):
    return load_base(resolved(folder, "none").config, for_training=False)


def test_experts_are_in_4_bits_and_everything_is_exact(tiny_oss):
    """Against transformers' own experts, router and eager attention on the dequantized weights."""
    model = load(tiny_oss)
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_projs is None and experts.banks["gate_up_proj"].packed.dtype == torch.uint8
    model = model.dequantize().float()
    ids = torch.arange(40)[None].repeat(2, 1) + torch.tensor([[5], [60]])
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0  # longer than the window; padded on the right
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask).logits
        answer = model.generate(input_ids=ids[:1], max_new_tokens=12, do_sample=False)
        gpt_oss.fuse(model)
        model.set_attn_implementation("eager")
        theirs = model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(answer, model.generate(input_ids=ids[:1], max_new_tokens=12, do_sample=False))
    assert type(model.model.layers[0].mlp.experts).__module__.startswith("transformers.")
    assert float(theirs.std()) > 0.05
    assert torch.allclose(ours[mask.bool()], theirs[mask.bool()], atol=1e-5)


def test_sinks_have_a_gradient_like_eager_attention(tiny_oss):
    model = load(tiny_oss).dequantize().float()
    found = []
    for attention in (gpt_oss.ATTENTION, "eager"):
        model.set_attn_implementation(attention)
        model.zero_grad()
        model(input_ids=torch.arange(30)[None] + 7).logits.square().mean().backward()
        found.append([model.model.layers[0].self_attn.sinks.grad, model.model.embed_tokens.weight.grad])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-7)


def test_it_trains_and_merges(tiny_oss, tmp_path):
    from kto_core.export.export import merge

    data = make_data(tmp_path / "rows.jsonl")
    made = folders.create(
        resolved(tiny_oss, data, engine="auto", max_steps=3, target_modules=["q_proj", "v_proj"], max_length=512)
    )
    starting.start(made, block=True)
    state = made.state()
    assert state.state == "finished", state.error
    assert any(entry["text"] == "Training engine: packed." for entry in state.logs)
    merged = Path(merge(made))
    names = tensors_of(merged)
    assert "model.layers.1.mlp.experts.gate_up_proj" in names and not any("projs.0" in n for n in names)
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())


def test_the_packed_engine_trains_it_as_trl_does(tiny_oss, tmp_path):
    """With TRL's pairs and z0 the losses of TRL's own step; recomputed layers too."""
    data, losses = make_data(tmp_path / "rows.jsonl"), {}
    for engine, checkpointing in (("trl", False), ("packed", False), ("packed", True)):
        settings = {"engine": engine, "kl_group": "microbatch", "learning_rate": 1e-3, "max_steps": 4,
                    "gradient_checkpointing": checkpointing}  # fmt: skip
        made = folders.create(resolved(tiny_oss, data, max_length=512, **settings))
        starting.start(made, block=True)
        state = made.state()
        assert state.state == "finished", state.error
        assert any("Training engine: packed" in entry["text"] for entry in state.logs) == (engine == "packed")
        losses[engine, checkpointing] = [m["loss"] for m in state.metrics if "loss" in m]
    trl = losses["trl", False]
    assert trl[0] == pytest.approx(0.5, abs=1e-5)  # the start; no loss of the routers, which are frozen, in it
    assert len(trl) == 4 and trl[-1] != pytest.approx(trl[0], rel=1e-3)
    for engine in (("packed", False), ("packed", True)):
        assert losses[engine] == pytest.approx(trl, rel=2e-3)


@pytest.mark.parametrize("gpu", [False, True])
def test_what_the_packed_engine_keeps_is_foretold(tiny_model, tmp_path, monkeypatch, gpu):
    """Experts in 4 bits, float32 activations, sizes that were not fitted. ``gpu``: one call for all segments."""
    from contextlib import nullcontext

    from kto_core.engine import limits
    from kto_core.engine.layers import attention, sinks
    from kto_core.engine.step import Engine
    from kto_core.models import shape
    from kto_core.models.load import add_adapter
    from kto_core.planning import memory
    from tests.engine import test_engine_sinks

    monkeypatch.setattr(attention, "_varlen_serves", lambda query, value: gpu)
    monkeypatch.setattr(attention, "_varlen_function", lambda: (None, {"window_size", "enable_gqa"}))
    monkeypatch.setattr(sinks, "serve", lambda *_: True)
    monkeypatch.setattr(sinks, "_forward", test_engine_sinks.forward)
    folder = make_oss(tmp_path / "oss", tiny_model, hidden_size=192, num_attention_heads=6, num_key_value_heads=2,
                      head_dim=64, intermediate_size=448, num_experts_per_tok=3)  # fmt: skip
    config = resolved(folder, "none", target_modules="all-linear", engine="packed", dtype="float32").config
    engine = Engine(add_adapter(load_base(config, for_training=True), config))
    measured, _ = limits.measure(engine, nullcontext)
    k = memory.Coefficients()
    counted = counting._token(config, shape.find(str(folder)), k, gpu)
    assert counted.layer / (k.packed_gpu if gpu else 1) == pytest.approx(measured.layer, rel=0.03)
    assert (counted.entry, counted.busy) == (measured.entry, measured.busy)


def test_the_plan_fits_the_preset_either_way():
    from kto_core.hardware.gpus import Device
    from kto_core.planning import memory

    card = Device(0, "RTX 3090", 24.0, 23.3, 0.0, (8, 6))
    for engine in ("auto", "trl", "packed"):
        c = resolved("unsloth/gpt-oss-20b-unsloth-bnb-4bit", "none", preset="20b", engine=engine).config
        plan = memory.plan(c, [370] * 2000 + [1828], device=card)
        assert plan.verdict == "fits" and plan.predicted_gib > 13, (engine, plan)


def test_weights_that_are_not_there_are_named(tiny_oss, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "half"
    shutil.copytree(tiny_oss, folder)
    file = folder / "model-00001.safetensors"
    kept = {k: v for k, v in load_file(file).items() if "input_layernorm" not in k}
    save_file(kept, file, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {k: v for k, v in content["weight_map"].items() if "layers.1.input_layernorm" not in k}
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"weights are missing from half \(model.layers.1.input_layernorm"):
        load(folder)


def test_mxfp4_is_refused_for_training(tiny_oss, tmp_path):
    folder = tmp_path / "mxfp4"
    shutil.copytree(tiny_oss, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="Use the bitsandbytes version"):
        load_base(resolved(folder, "none").config, for_training=True)


def test_4_bit_weights_without_their_scales_are_named(tiny_oss, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "scaleless"
    shutil.copytree(tiny_oss, folder)
    lost = "gate_up_projs.2.weight."
    file, index = folder / "model-00001.safetensors", folder / "model.safetensors.index.json"
    save_file({k: v for k, v in load_file(file).items() if lost not in k}, file, {"format": "pt"})
    content = json.loads(index.read_text())
    content["weight_map"] = {k: v for k, v in content["weight_map"].items() if "layers.1." not in k or lost not in k}
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"layers.1.mlp.experts.gate_up_projs.2.weight.quant_state"):
        load(folder)


def test_experts_that_would_stay_in_16_bits_are_refused(tiny_oss, tmp_path):
    """A checkpoint in transformers' own layout: loaded in 4 bits, only its attention would be."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny_oss)
    del config.quantization_config
    folder = tmp_path / "fused"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with pytest.raises(ModelError, match="cannot be quantized to 4-bit"):
        load_base(resolved(folder, "none", load_in_4bit=True).config, for_training=True)
    load_base(resolved(folder, "none", load_in_4bit=False).config, for_training=True)


def test_adapters_leave_experts_alone(tiny_oss):
    """As the memory plan counts them, with every engine: 768 experts with rank 128 would be 1.4 billion parameters."""
    from kto_core.models import shape, unsloth_load
    from kto_core.models.load import add_adapter

    config = resolved(tiny_oss, "none", target_modules="all-linear").config
    adapted = add_adapter(load_base(config, for_training=True), config)
    names = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert names and all(".self_attn." in n for n in names)
    assert unsloth_load.targets(config) == list(shape.ATTENTION)
    seven = [*shape.ATTENTION, *shape.FFN]
    assert unsloth_load.targets(config.model_copy(update={"target_modules": seven})) == list(shape.ATTENTION)


def test_gradients_reach_the_adapters_through_experts_in_4_bits(tiny_oss):
    """With every layer recomputed, which is what fits a 24 GiB card."""
    from kto_core.models.load import add_adapter

    config = resolved(tiny_oss, "none", target_modules=["q_proj", "o_proj"]).config
    model = add_adapter(load_base(config, for_training=True), config)
    model.enable_input_require_grads()
    found = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(input_ids=torch.arange(30)[None] + 7).logits.square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if "lora_B" in n})
    assert len(found[0]) == 4 and all(float(g.abs().max()) > 0 for g in found[0].values())
    for name, grad in found[0].items():
        assert torch.allclose(grad, found[1][name], rtol=1e-4, atol=1e-8)
