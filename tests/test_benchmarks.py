"""The parts of benchmarks/ that need no GPU: what they count, search, draw and write."""

import json
import sys
from pathlib import Path

import pytest
import torch
from training import resolved

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 2}  # fmt: skip


@pytest.mark.parametrize(("model_type", "tied"), [("mistral", False), ("qwen2", True)])
def test_a_4_bit_shape_loads_through_the_products_path(tiny_model, tmp_path, monkeypatch, model_type, tied):
    """Every linear layer in 4 bits, the head not; no weight missing; a forward that is not all zeros."""
    import shapes

    from kto_core.model import load_base
    from kto_core.model_info import model_facts

    sizes = [TINY[f] for f in shapes.FIELDS[:5]]
    monkeypatch.setitem(shapes.SHAPES, "tiny", (model_type, *sizes, 100, tied))
    folder = shapes.make("tiny", tmp_path / "tiny", tiny_model, "cpu", nf4=True)
    assert sorted(p.name for p in folder.glob("*.safetensors")) == [
        "model-00000.safetensors", "model-00001.safetensors", "model-ends.safetensors",
    ]  # fmt: skip
    assert model_facts(str(folder)).quantized == "bitsandbytes"
    model = load_base(resolved(folder, "none").config, for_training=True)
    kinds = {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert kinds.pop("lm_head") == "Linear" and set(kinds.values()) == {"Linear4bit"} and len(kinds) == 14
    state = model.model.layers[1].mlp.down_proj.weight.quant_state
    assert state.quant_type == "nf4" and state.nested and tuple(state.shape) == (64, 128)
    assert bool(model.model.layers[0].input_layernorm.weight.eq(1).all())
    logits = model(input_ids=torch.arange(20)[None]).logits
    assert logits.isfinite().all() and float(logits.detach().std()) > 0.01
    assert (folder / "tokenizer_config.json").exists()


def test_a_4_bit_shape_trains(tiny_model, tmp_path, monkeypatch):
    import shapes
    from training import make_data

    from kto_core import run

    monkeypatch.setitem(shapes.SHAPES, "tiny", ("llama", *[TINY[f] for f in shapes.FIELDS[:5]], 100, False))
    folder = shapes.make("tiny", tmp_path / "tiny", tiny_model, "cpu", nf4=True)
    data = make_data(tmp_path / "rows.jsonl")
    made = run.create(resolved(folder, data, engine="packed", max_steps=2, dtype="bfloat16"))  # as on a GPU
    run.start(made, block=True)
    assert made.state().state == "finished", made.state().error


def test_a_shape_in_bf16_has_no_4_bit_weights(tiny_model, tmp_path, monkeypatch):
    import shapes

    monkeypatch.setitem(shapes.SHAPES, "tiny", ("llama", *[TINY[f] for f in shapes.FIELDS[:5]], 100, True))
    folder = shapes.make("tiny", tmp_path / "tiny", tiny_model, "cpu")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
