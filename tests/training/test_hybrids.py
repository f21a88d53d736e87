"""Hybrids of attention and layers that go along the sequence, from a folder to a merged model."""

import pytest

from kto_core.config import resolving
from kto_core.export import merging
from kto_core.planning.dry_run import dry_run
from kto_core.runs.events import fold, read
from tests.support.training import make_data, make_other, resolved

DELTA = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
KINDS = {
    "olmo_hybrid": (DELTA, {"a_proj", "b_proj", "g_proj"}),
    "qwen3_5_text": (DELTA, {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"}),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, {"in_proj", "out_proj"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hybrid_is_planned_trained_and_merged(kind, tiny_model, tmp_path, monkeypatch):
    from safetensors import safe_open

    from kto_core.training.train import train

    settings, projections = KINDS[kind]
    folder, place = make_other(tmp_path / "model", tiny_model, kind, **settings), tmp_path / "run"
    place.mkdir()
    data = make_data(tmp_path / "data.jsonl")
    found = resolved(folder, data, engine="auto", max_steps=2, learning_rate=0.01)
    plan = dry_run(found.config)
    assert plan["engine"]["name"] == "packed" and plan["adapter"]["share"] == 1 and not plan["problem"]
    resolving.save_config(found, place / "config.yaml")
    train(found.config, place)
    ended = fold(read(place / "events.jsonl")[0])
    assert ended.state == "finished", ended.error
    assert ended.used["engine"] == "packed" and ended.metrics[0]["loss"] == pytest.approx(0.5, abs=1e-4)
    with safe_open(place / "adapter" / "adapter_model.safetensors", "pt") as adapter:
        adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in adapter.keys()}  # noqa: SIM118
    assert projections <= adapted and not any("conv" in name for name in adapted)

    monkeypatch.setattr(merging, "tell", lambda *_: None)
    part = tmp_path / "merged"
    part.mkdir()
    facts = merging.merge(str(folder), str(place / "adapter"), str(part), "owner/base", {})
    assert facts["layers"] > 2 * len(projections)
