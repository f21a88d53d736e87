"""Training: events, token ids, precision, stop, resume, errors. A few steps of the demo model, many of a tiny one."""

import json
import shutil

import pytest

from kto_core.errors import DataError
from kto_core.models.shape import ATTENTION, FFN
from kto_core.planning.dry_run import dry_run
from kto_core.training.train import train
from tests.support.trained import run, weights
from tests.support.training import events, make_other, metrics, resolved, state

# ---- what a run tells and leaves -------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["trl", "packed"])
def test_evaluating_changes_nothing_of_what_four_bits_learn(tiny, data, tmp_path, engine):
    """In eval mode bitsandbytes repacks weights for some CPUs, and a product with those passes no gradient on."""
    settings = {"engine": engine, "load_in_4bit": True, "test_size": 0.25, "max_steps": 4}
    for steps in (1, 100):
        ended = run(tiny, data, tmp_path / str(steps), **settings, eval_steps=steps)
        assert ended.state == "finished", ended.error
    often, once = (weights(tmp_path / str(steps) / "adapter") for steps in (1, 100))
    assert all(tensor.equal(once[name]) for name, tensor in often.items())


def test_demo_model_trains(demo_model, data, tmp_path):
    import torch

    overrides = {"max_steps": 3, "learning_rate": 2e-4, "gradient_accumulation_steps": 1, "save_steps": 2}
    ended = run("demo", data, tmp_path, **overrides)
    assert (ended.state, ended.step, ended.total_steps) == ("finished", 3, 3), ended.error
    found = events(tmp_path)
    order = [e["state"] for e in found if e["kind"] == "status"]
    assert order[0] == "preparing" and order[-1] == "finished" and "training" in order
    assert found[-1]["kind"] == "status"
    assert (ended.used["engine"], ended.used["kl_group"]) == ("trl", "microbatch") and "began_from" not in ended.used
    assert ended.used["optim"] == ("adamw_8bit" if torch.cuda.is_available() else "adamw_torch")
    first, last = ended.metrics[0], ended.metrics[-1]
    names = "loss kl rewards/chosen rewards/rejected rewards/margins logps/chosen learning_rate grad_norm epoch eta"
    assert set(names.split()) | {"tokens_per_second", "examples_per_second"} <= set(first)
    assert first["loss"] == pytest.approx(0.5, abs=1e-6) and first["kl"] == 0
    assert last["loss"] < 0.4999 and last["rewards/margins"] > 0
    assert [c["path"] for c in ended.checkpoints] == ["checkpoints/checkpoint-2", "checkpoints/checkpoint-3"]
    assert all((tmp_path / c["path"]).is_dir() for c in ended.checkpoints)

    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert not list(tmp_path.rglob("ref")) and not list(tmp_path.rglob("*.part"))
    facts = json.loads((tmp_path / "dataset.json").read_text())
    assert facts["train"]["rows"] == 24 and facts["report"]["kept"] == 24 and len(facts["sha256"]) == 64


def test_token_ids_and_pairs_are_ours(tiny, data, tmp_path, monkeypatch):
    from kto_core.data import dataset
    from kto_core.data.rendering import template
    from kto_core.models.load import load_tokenizer
    from kto_core.training import trainer as trainers

    seen = {}
    monkeypatch.setattr(trainers._Studio, "restore_meters", None)

    def catch(base):
        class Caught(trainers._Studio, base):
            def training_step(self, model, inputs, *args, **kwargs):
                seen.setdefault("batches", []).append({k: v.tolist() for k, v in inputs.items()})
                seen["columns"] = self.train_dataset.to_dict()
                return super().training_step(model, inputs, *args, **kwargs)

        return Caught

    monkeypatch.setattr(trainers, "studio_class", catch)
    assert run(tiny, data, tmp_path, max_steps=2).state == "finished"

    tokenizer = load_tokenizer(str(tiny))
    rows = dataset.spread(list(dataset.load(str(data)).rows), 2, 3407)
    encoded = [template.encode(r, tokenizer, 256) for r in rows]
    assert seen["columns"]["prompt_ids"] == [list(e.prompt_ids) for e in encoded]
    assert seen["columns"]["completion_ids"] == [list(e.completion_ids) for e in encoded]
    assert seen["columns"]["label"] == [r.label for r in rows]
    assert all(c[-1] == tokenizer.eos_token_id for c in seen["columns"]["completion_ids"])
    for n, batch in enumerate(seen["batches"]):  # two rows: each gets the other's completion
        a, b = encoded[2 * n], encoded[2 * n + 1]
        wanted = [[*a.prompt_ids, *b.completion_ids], [*b.prompt_ids, *a.completion_ids]]
        got = [ids[: sum(mask)] for ids, mask in zip(batch["KL_input_ids"], batch["KL_attention_mask"], strict=True)]
        assert got == wanted
        assert sorted(batch["label"]) == [False, True]


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9])
def test_kl_partner_is_never_the_row_itself(rows):
    from kto_core.training.trainer import kl_partners

    partners = kl_partners(rows, 4)
    assert len(partners) == rows
    assert rows == 1 or all(p != i for i, p in enumerate(partners))
    whole = rows - rows % 4
    assert sorted(partners[:whole]) == list(range(whole))  # the same multiset of completions, group by group


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("four_bit", [True, False])
def test_adapters_stay_fp32_and_every_tensor_moves(tiny, data, tmp_path, four_bit):
    overrides = {"max_steps": 4, "save_steps": 1, "save_total_limit": 4, "load_in_4bit": four_bit}
    ended = run(tiny, data, tmp_path, **overrides)
    assert ended.state == "finished", ended.error
    before, after = weights(tmp_path / "checkpoints" / "checkpoint-1"), weights(tmp_path / "adapter")
    assert len(after) == 2 * 7 * 2  # A and B of seven projections in two layers
    for name, tensor in after.items():
        assert str(tensor.dtype) == "torch.float32", name
        assert not tensor.equal(before[name]), f"{name} did not move"
    moved = (after["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] -
             before["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]) != 0  # fmt: skip
    assert moved.float().mean() > 0.99  # in bf16 most small steps round to nothing


def test_bf16_and_fp32_in_one_process(tiny, data, tmp_path):
    for dtype in ("bfloat16", "float32"):
        ended = run(tiny, data, tmp_path / dtype, max_steps=2, dtype=dtype)
        assert ended.state == "finished", ended.error
        assert all(str(t.dtype) == "torch.float32" for t in weights(tmp_path / dtype / "adapter").values())


def test_precomputed_reference_gives_the_same_metrics(tiny, data, tmp_path):
    for value in (True, False):
        run(tiny, data, tmp_path / str(value), max_steps=4, precompute_ref_log_probs=value, test_size=0.2, eval_steps=2)
    a, b = metrics(tmp_path / "True"), metrics(tmp_path / "False")
    assert len(a) == len(b) == 6
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name] == pytest.approx(y[name], abs=2e-5), name


@pytest.mark.parametrize("engine", ["trl", "packed"])
def test_pretrained_adapter_is_its_own_reference(tiny, data, tmp_path, engine):
    run(tiny, data, tmp_path / "first", max_steps=4)
    overrides = {"max_steps": 3, "save_steps": 1, "engine": engine, "adapter": str(tmp_path / "first" / "adapter")}
    ended = run(tiny, data, tmp_path / "second", **overrides)
    assert ended.state == "finished", ended.error
    assert (ended.used["engine"], ended.used["began_from"]) == (engine, {"folder": "adapter"})  # of no folders.create
    assert ended.metrics[0]["loss"] == pytest.approx(0.5, abs=1e-6)  # a reference without the adapter would differ
    assert not list((tmp_path / "second").rglob("ref"))
    old, new = weights(tmp_path / "first" / "adapter"), weights(tmp_path / "second" / "adapter")
    assert old.keys() == new.keys() and not all(old[k].equal(new[k]) for k in old)


# ---- the dry run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_train_epochs": 2},
        {"max_steps": 2},
        {"gradient_accumulation_steps": 5},
        {"gradient_accumulation_steps": 5, "engine": "packed"},
    ],
)
def test_dry_run_counts_the_steps_that_are_made(tiny, data, tmp_path, overrides):
    config = resolved(tiny, data, test_size=0.1, **overrides).config
    without = shutil.copytree(tiny, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    found = dry_run(config.model_copy(update={"model": str(without)}))
    train(config, tmp_path / "run")
    assert found["steps"] == state(tmp_path / "run").step == state(tmp_path / "run").total_steps
    assert found["config"]["per_device_train_batch_size"] == 2 and found["config"]["lora_alpha"] == 8
    assert found["data"]["kept"] == 24 and found["data"]["truncated"] == 0
    assert {"predicted_gib", "available_gib", "verdict"} <= set(found["memory"])
    json.dumps(found)


def test_dry_run_needs_data(tiny):
    with pytest.raises(DataError, match="--data"):
        dry_run(resolved(tiny, "").config)


# ---- what auto and the packed engine make of a setting -------------------------------------------------------------


def test_auto_takes_trl_where_packed_finds_out_late(tiny, demo_model, data, tmp_path):
    """Nemotron's attention does not hand on the pass's keyword: only running it shows that it cannot be packed."""
    folder = make_other(tmp_path / "nemotron", tiny, "nemotron")
    settings = {"max_steps": 2, "target_modules": "all-linear"}
    ended = run(folder, data, tmp_path / "auto", engine="auto", **settings)
    assert ended.state == "finished", ended.error
    said = " ".join(e["text"] for e in ended.logs)
    assert "TRL's training step" in said and "cannot run this model" in said
    assert (ended.used["engine"], ended.used["kl_group"]) == ("trl", "microbatch")
    assert run(folder, data, tmp_path / "packed", engine="packed", **settings).state == "failed"


@pytest.mark.parametrize("asked,layers", [(True, 2), (False, 0)])
def test_gradient_checkpointing_is_the_packed_engines_too(tiny, data, tmp_path, monkeypatch, asked, layers):
    from kto_core.engine.step import Engine

    seen = set()
    true = Engine.run
    monkeypatch.setattr(
        Engine, "run", lambda self, *a, **k: seen.add(self.limits.checkpoint_layers) or true(self, *a, **k)
    )
    ended = run(tiny, data, tmp_path, engine="packed", max_steps=1, gradient_checkpointing=asked)
    assert ended.state == "finished" and seen == {layers}, ended.error


@pytest.mark.parametrize("model_type", ["seed_oss", "starcoder2"])
@pytest.mark.parametrize("engine", ["packed", "trl"])
def test_dropout_that_is_a_number_of_a_module_is_off(tiny, data, tmp_path, model_type, engine):
    """Both call the function of dropout: with it on, the first loss was 0.8, and the kept reference log-probs noise."""
    rates = dict.fromkeys(("residual_dropout", "attention_dropout", "embedding_dropout"), 0.3)
    folder = make_other(tmp_path / model_type, tiny, model_type, **rates)
    targets = ["q_proj", "v_proj"]
    ended = run(folder, data, tmp_path / "run", engine=engine, max_steps=1, target_modules=targets)
    assert ended.state == "finished" and ended.used["engine"] == engine, ended.error
    assert ended.metrics[0]["loss"] == pytest.approx(0.5, abs=1e-4)
    assert ended.metrics[0]["rewards/chosen"] == pytest.approx(0, abs=1e-3)


def test_four_bits_in_half_precision_pass_the_comparison(tiny, data, tmp_path, monkeypatch):
    """As on a GPU: the float32 copy of the loaded model is made and agrees."""
    from kto_core.engine.layers import excerpt

    made, true = [], excerpt.copied
    monkeypatch.setattr(excerpt, "copied", lambda *a: made.append(true(*a)) or made[-1])
    ended = run(tiny, data, tmp_path, engine="packed", max_steps=1, load_in_4bit=True, dtype="bfloat16")
    assert ended.state == "finished" and made and made[0] is not None, ended.error


# ---- what the adapter reaches, and what cannot be loaded ------------------------------------------------------------


def test_plan_and_log_say_what_share_of_the_weights_trains(tiny, data, tmp_path):
    """Phi-3 holds q, k, v in one layer and gate, up in another, which the usual names miss without a word."""
    folder = make_other(tmp_path / "phi3", tiny, "phi3")
    seven = {"target_modules": [*ATTENTION, *FFN]}
    plan = dry_run(resolved(folder, data, **seven).config)
    attention, ffn = 64 * 64, 128 * 64  # o_proj, down_proj; beside qkv_proj of twice and gate_up_proj of twice the size
    expected = (attention + ffn) / (attention + 64 * (64 + 2 * 32) + 3 * ffn)
    assert plan["adapter"]["share"] == pytest.approx(expected, abs=1e-3) and not plan["problem"]
    assert "With target_modules all-linear it is 100%." in plan["adapter"]["says"]
    ended = run(folder, data, tmp_path / "run", max_steps=1, **seven)
    assert plan["adapter"]["says"] in [e["text"] for e in ended.logs], ended.error

    whole = dry_run(resolved(folder, data).config)
    assert whole["adapter"] == {"share": 1.0, "says": "LoRA adapters on 100% of the language model's linear weights."}


def test_a_dry_run_refuses_what_the_run_refuses(tiny, data, tmp_path):
    """A Q-Former's text model is no causal language model to transformers, whatever its config.json says of sizes."""
    from transformers import AutoConfig

    folder = shutil.copytree(tiny, tmp_path / "wrapper")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}  # fmt: skip
    AutoConfig.for_model("clip_text_model", **sizes).save_pretrained(folder)
    for settings in ({"model": folder}, {"model": tiny, "target_modules": ["nothing_proj"]}):
        plan = dry_run(resolved(data=data, **settings).config)
        ended = run(data=data, folder=tmp_path / settings["model"].name, max_steps=1, **settings)
        assert ended.state == "failed" and plan["problem"] == ended.error
        assert plan["adapter"] == {"share": None, "says": ""}
