"""What a merge makes of its base and its adapter: rounding, 4-bit bases, the tokenizer's files; what it refuses."""

import json
import shutil
from pathlib import Path

import pytest

from kto_core.errors import ExportError
from kto_core.export import merging
from kto_core.export.merge import rounding
from tests.support.exporting import make_run


def merge_here(base: Path, run, part: Path, monkeypatch) -> dict:
    """The child's work, in this process."""
    monkeypatch.setattr(merging, "tell", lambda *_: None)
    part.mkdir()
    return merging.merge(str(base), str(run.adapter), str(part), "owner/base", {})


def weights(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def delta(run, name: str):
    """scale · B·A of one layer of the adapter."""
    from safetensors.torch import load_file

    tensors = load_file(run.adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"].float() for x in "AB")
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    return config["lora_alpha"] / config["r"] * (b @ a)


def test_small_steps_survive_a_bf16_base(tmp_path, tiny_model, monkeypatch):
    """The change is a tenth of bf16's resolution: rounding to nearest would lose nearly all of it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    run = make_run(tmp_path / "run", base, str(base), scale=3e-5)
    facts = merge_here(base, run, tmp_path / "part", monkeypatch)
    assert facts["dtype"] == "bfloat16" and 0.8 < facts["kept"] < 1.2

    name = "model.layers.0.self_attn.q_proj"
    before, after = weights(base)[f"{name}.weight"].float(), weights(tmp_path / "part")[f"{name}.weight"].float()
    wanted = delta(run, name)

    def kept(result):
        return float(((result - before) * wanted).sum() / (wanted * wanted).sum())

    assert 0.7 < kept(after) < 1.3
    assert kept((before + wanted).bfloat16().float()) < 0.6  # what rounding to nearest keeps
    untouched = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(weights(base)[untouched], weights(tmp_path / "part")[untouched])


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_stochastic_rounding_is_right_on_average_and_leaves_the_grid_alone(kind):
    import torch

    dtype, generator = getattr(torch, kind), torch.Generator().manual_seed(0)
    grid = torch.cat([torch.randn(5000), torch.randn(5000) * 1e-6, torch.zeros(10)]).to(dtype)
    assert torch.equal(rounding.round_to(grid.float(), dtype, generator), grid)
    values = torch.tensor([0.1, -0.017, 3.3e-6, -1e-3, 100.07]).repeat_interleave(40_000)
    rounded = rounding.round_to(values, dtype, generator).float()
    step = (values.to(dtype).float() - values).abs().amax() + values.abs() * 2.0**-7
    assert bool(((rounded - values).abs() <= step).all())
    mean = rounded.view(5, -1).mean(1)
    spread = rounded.view(5, -1).std(1) / 200
    assert bool(((mean - values.view(5, -1)[:, 0]).abs() <= 5 * spread + 1e-12).all())


def test_a_4_bit_base_is_dequantized_not_rounded_again(tmp_path, tiny_model, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    base = tmp_path / "base-bnb-4bit"
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
    quantized = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=how, dtype=torch.bfloat16,
                                                     device_map={"": "cpu"})  # fmt: skip
    quantized.save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    assert "quantization_config" in json.loads((base / "config.json").read_text())
    run = make_run(tmp_path / "run", base, str(base), base_dir=tiny_model)
    facts = merge_here(base, run, tmp_path / "part", monkeypatch)

    config = json.loads((tmp_path / "part" / "config.json").read_text())
    assert "quantization_config" not in config and facts["dtype"] == "bfloat16" and facts["kept"] > 0.8
    name = "model.layers.1.mlp.down_proj"
    plain = AutoModelForCausalLM.from_pretrained(base, device_map={"": "cpu"}).dequantize()
    expected = plain.get_submodule(name).weight.float() + delta(run, name)
    found = weights(tmp_path / "part")[f"{name}.weight"].float()
    assert bool(((found - expected).abs() <= expected.abs() * 2.0**-7 + 1e-8).all())
    assert len(found.unique()) > 100  # a 4-bit row would have 16 values a block


def test_the_sentencepiece_file_comes_along(tmp_path, tiny_model, monkeypatch):
    """transformers does not save it, and the converter reads it."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "tokenizer.model").write_bytes(b"pieces")
    run = make_run(tmp_path / "run", tiny_model, str(tiny_model))
    merge_here(base, run, tmp_path / "part", monkeypatch)
    assert (tmp_path / "part" / "tokenizer.model").read_bytes() == b"pieces"


def test_weights_that_are_not_finite_are_refused(tmp_path, tiny_model, monkeypatch):
    run = make_run(tmp_path / "run", tiny_model, str(tiny_model), scale=float("inf"))
    with pytest.raises(ExportError, match="training diverged"):
        merge_here(tiny_model, run, tmp_path / "part", monkeypatch)


def test_an_adapter_of_another_model_is_refused(tmp_path, tiny_model, monkeypatch):
    from kto_core.errors import ModelError

    run = make_run(tmp_path / "run", tiny_model, str(tiny_model))
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    (run.adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    with pytest.raises(ModelError):
        merge_here(tiny_model, run, tmp_path / "part", monkeypatch)
