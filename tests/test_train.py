"""Training: events, token ids, precision, stop, resume, errors. A few steps of the demo model, many of a tiny one."""

import gc
import importlib.util
import json
import shutil
import threading

import pytest
from training import events, make_data, make_tiny, metrics, resolved, state, wait

from kto_core import checkpoints
from kto_core.errors import DataError, DiskError
from kto_core.train import dry_run, train


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, demo_model):
    return make_tiny(tmp_path_factory.mktemp("tiny"), demo_model)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "rows.jsonl")


def run(model, data, folder, **overrides):
    train(resolved(model, data, **overrides).config, folder)
    return state(folder)


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


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
    from kto_core import dataset, template
    from kto_core import trainer as trainers
    from kto_core.model import load_tokenizer

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
    from kto_core.trainer import kl_partners

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
    assert (ended.used["engine"], ended.used["began_from"]) == (engine, {"folder": "adapter"})  # of no run.create
    assert ended.metrics[0]["loss"] == pytest.approx(0.5, abs=1e-6)  # a reference without the adapter would differ
    assert not list((tmp_path / "second").rglob("ref"))
    old, new = weights(tmp_path / "first" / "adapter"), weights(tmp_path / "second" / "adapter")
    assert old.keys() == new.keys() and not all(old[k].equal(new[k]) for k in old)


# ---- stop and resume -------------------------------------------------------------------------------------------------


def stop_after(folder, step):
    """In a thread: ask for a stop as soon as a metric of ``step`` is there."""

    def body():
        wait(lambda: state(folder).step >= step)
        (folder / "stop").touch()

    thread = threading.Thread(target=body)
    thread.start()
    return thread


def test_reference_scores_of_another_model_are_noticed(tiny, data, tmp_path, monkeypatch):
    """At the start the policy is the reference; a broken cache, or weights that were not, would spoil every reward."""
    import sqlite3

    monkeypatch.setenv("KTO_STUDIO_CACHE", str(tmp_path / "cache"))
    said = {}
    for name, error in (("new", None), ("kept", 0), ("wrong", 6)):
        if error is not None:
            with sqlite3.connect(tmp_path / "cache" / "reference" / "logps.sqlite") as db:
                assert db.execute("UPDATE logps SET value = value + ?", (error,)).rowcount
        train(resolved(tiny, data, engine="packed", max_steps=2).config, tmp_path / name)
        said[name] = [e["text"] for e in events(tmp_path / name) if "not the reference's" in e.get("text", "")]
    assert not said["new"] and not said["kept"]
    assert len(said["wrong"]) == 1 and "a row's differ by 6.0" in said["wrong"][0]


@pytest.mark.parametrize("engine", ["trl", "packed"])
def test_resumed_metrics_equal_the_uninterrupted_run(tiny, data, tmp_path, engine):
    # many epochs, metrics averaged over three steps, stops at whatever step it comes to: all must be equal
    overrides = {"num_train_epochs": 8, "logging_steps": 3, "save_steps": 4, "test_size": 0.2, "eval_steps": 5}
    overrides["engine"] = engine
    whole = run(tiny, data, tmp_path / "whole", **overrides)
    assert whole.state == "finished" and whole.step >= 40
    stops = 0
    for asked in (3, 9):
        thread = stop_after(tmp_path / "parts", asked)
        ended = run(tiny, data, tmp_path / "parts", **overrides)
        thread.join()
        stops += ended.state == "stopped"
        saved = checkpoints.find_all(tmp_path / "parts" / "checkpoints")
        assert f"step {checkpoints.step_of(saved[-1])}" in ended.message or ended.state == "finished"
    assert stops == 2, "it was over before it could be stopped"
    ended = run(tiny, data, tmp_path / "parts", **overrides)
    assert ended.state == "finished"
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    a, b = weights(tmp_path / "whole" / "adapter"), weights(tmp_path / "parts" / "adapter")
    assert all(a[k].equal(b[k]) for k in a)


def test_broken_checkpoints_are_skipped(tiny, data, tmp_path):
    overrides = {"max_steps": 6, "save_steps": 1, "save_total_limit": 6, "lr_scheduler_type": "constant"}
    run(tiny, data, tmp_path, **overrides)
    root = tmp_path / "checkpoints"
    before = metrics(tmp_path)
    (root / "checkpoint-6" / "manifest.json").unlink()  # not written to its end
    (root / "checkpoint-5" / "optimizer.pt").write_bytes(b"")  # cut
    file = root / "checkpoint-4" / "adapter_model.safetensors"  # damaged, of the same length
    file.write_bytes(file.read_bytes()[:-4] + b"junk")
    (root / "saving.part").mkdir()
    ended = run(tiny, data, tmp_path, **overrides)
    assert ended.state == "finished", ended.error
    said = " ".join(e["text"] for e in ended.logs)
    assert "checkpoint-6 is not used: it was not written to its end" in said
    assert "checkpoint-5 is not used: optimizer.pt is damaged" in said
    assert "checkpoint-4 is not used: adapter_model.safetensors is damaged" in said
    assert next(e for e in events(tmp_path) if "resumed_from" in e)["resumed_from"] == 3
    assert metrics(tmp_path) == before
    assert not (root / "saving.part").exists()


def test_other_data_cannot_be_resumed(tiny, tmp_path):
    data = make_data(tmp_path / "rows.jsonl")
    run(tiny, data, tmp_path / "run", max_steps=2)
    make_data(data, rows=30)
    ended = run(tiny, data, tmp_path / "run", max_steps=4)
    assert ended.state == "failed" and "not what this run began with" in ended.error


def test_checkpoints_are_limited_and_a_full_disk_keeps_the_old_ones(tiny, data, tmp_path, monkeypatch):
    real = checkpoints.seal

    def full(folder):
        if folder.name == "checkpoint-4":
            raise OSError(28, "No space left on device")
        real(folder)

    monkeypatch.setattr(checkpoints, "seal", full)
    ended = run(tiny, data, tmp_path, max_steps=6, save_steps=1, save_total_limit=2)
    assert ended.state == "failed" and "disk is full" in ended.error and "checkpoint 4" in ended.error
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["checkpoint-2", "checkpoint-3"]
    assert checkpoints.newest_whole(tmp_path / "checkpoints")[0].name == "checkpoint-3"


@pytest.mark.parametrize("engine", ["trl", "packed"])
def test_memory_comes_back(tiny, data, tmp_path, engine):
    import torch

    def alive():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    run(tiny, data, tmp_path / "a", max_steps=1, engine=engine)
    before = alive()
    ended = run(tiny, data, tmp_path / "b", max_steps=2, engine=engine)
    assert ended.state == "finished", ended.error
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b", "label": true}\n')
    run(tiny, tmp_path / "bad.jsonl", tmp_path / "c", max_steps=1)
    assert alive() <= before


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_the_8_bit_optimizers_manager_lets_go(tiny, data, tmp_path):
    """With 8-bit optimizers transformers registers the embedding there, which would keep it."""
    import torch
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    manager.register_module_override(torch.nn.Embedding(4, 4), "weight", {"optim_bits": 32})
    assert manager.module_weight_config_triple
    run(tiny, data, tmp_path, max_steps=1)
    assert not manager.module_weight_config_triple and not manager.pid2config


def test_not_a_number_ends_the_run(tiny, data, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    ended = run(broken, data, tmp_path / "run", max_steps=3)
    assert ended.state == "failed" and "not a number" in ended.error and "learning rate" in ended.error
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"max_length": 30}, "max_length 30"),
        ({"engine": "unsloth"}, "NVIDIA GPU"),
        ({"model": "unsloth/mistral-7b-instruct-v0.3-bnb-4bit"}, "no NVIDIA GPU"),
        ({"target_modules": "nothing_proj"}, "all-linear"),
        ({"adapter": "nowhere"}, "no adapter"),
        ({"report_to": "wandb"}, "Weights & Biases"),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_a_mistake_is_one_clear_sentence(tiny, data, tmp_path, overrides, words, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if "report_to" in overrides and importlib.util.find_spec("wandb"):
        monkeypatch.setenv("HOME", str(tmp_path))
    config = resolved(tiny, data).config.model_copy(update={"max_steps": 1, **overrides})
    if isinstance(config.target_modules, str) and config.target_modules != "all-linear":
        config = config.model_copy(update={"target_modules": [config.target_modules]})
    train(config, tmp_path / "run")
    ended = state(tmp_path / "run")
    assert ended.state == "failed"
    assert words in ended.error and "Traceback" not in ended.error and "Unexpected" not in ended.error
    assert ended.message == ended.error


def test_a_bug_is_named_and_kept(tiny, data, tmp_path, monkeypatch):
    from kto_core import train as module

    monkeypatch.setattr(module, "precompute_pays", lambda *a: 1 / 0)
    ended = run(tiny, data, tmp_path, max_steps=1)
    assert ended.state == "failed" and "ZeroDivisionError" in ended.error and "train.log" in ended.error
    assert "Traceback" in (tmp_path / "train.log").read_text()


def test_disk_is_checked_before(tiny, data, tmp_path, monkeypatch):
    from kto_core import train_checks

    monkeypatch.setattr(train_checks.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10, 9, 2**20))
    ended = run(tiny, data, tmp_path, max_steps=1)
    assert ended.state == "failed" and "GiB are free" in ended.error
    with pytest.raises(DiskError, match="save_total_limit"):
        from kto_core.model_info import model_facts

        train_checks.check_disk(resolved(tiny, data).config, model_facts(str(tiny)), tmp_path, 10)


def test_adapter_size_is_foretold(tiny, data, tmp_path):
    from kto_core.model_info import model_facts
    from kto_core.train_checks import lora_parameters

    config = resolved(tiny, data, max_steps=1)
    train(config.config, tmp_path)
    counted = sum(t.numel() for t in weights(tmp_path / "adapter").values())
    assert lora_parameters(config.config, model_facts(str(tiny))) == counted


def test_a_long_run_keeps_its_checkpoints_light(tiny, data, tmp_path, monkeypatch):
    """trainer_state.json has the last entries; the events and the evaluation at the end miss none."""
    from kto_core import callbacks

    monkeypatch.setattr(callbacks, "LOGGED", 3)
    train(resolved(tiny, data, max_steps=8, logging_steps=1, save_steps=8, test_size=0.2).config, tmp_path)
    found = state(tmp_path)
    assert [m["step"] for m in found.metrics if "loss" in m] == list(range(1, 9))
    assert sum("eval_loss" in m for m in found.metrics) == 1
    (saved,) = tmp_path.glob("checkpoints/checkpoint-8/trainer_state.json")
    assert len(json.loads(saved.read_text())["log_history"]) <= 3 + 1


def test_stuck_loss_is_explained_once():
    from kto_core.callbacks import StuckLoss

    facts = {"learning_rate": 5e-7, "labels": [True] * 20 + [False] * 20, "micro_batch": 4, "mean_weight": 1.0}
    stuck = StuckLoss(facts)
    said = [stuck.look(step, {"loss": 0.5001, "rewards/margins": 1e-6}) for step in range(1, 40)]
    assert not any(said[:19]) and sum(map(bool, said)) == 1
    text = said[19]
    assert "5e-07" in text and "100% of the batches hold one label" in text and "hardly moved" in text

    moving = StuckLoss({**facts, "learning_rate": 1e-4})
    assert not any(moving.look(s, {"loss": 0.5 - 0.001 * s}) for s in range(1, 40))


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
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = shutil.copytree(tiny, tmp_path / "nemotron")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "nemotron", **sizes, num_key_value_heads=2, head_dim=16, max_position_embeddings=512, bos_token_id=1,
        eos_token_id=2, pad_token_id=2, vocab_size=len(AutoTokenizer.from_pretrained(folder)),
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    settings = {"max_steps": 2, "target_modules": "all-linear"}
    ended = run(folder, data, tmp_path / "auto", engine="auto", **settings)
    assert ended.state == "finished", ended.error
    said = " ".join(e["text"] for e in ended.logs)
    assert "TRL's own step" in said and "cannot run this model" in said
    assert (ended.used["engine"], ended.used["kl_group"]) == ("trl", "microbatch")
    assert run(folder, data, tmp_path / "packed", engine="packed", **settings).state == "failed"


@pytest.mark.parametrize("asked,layers", [(True, 2), (False, 0)])
def test_gradient_checkpointing_is_the_packed_engines_too(tiny, data, tmp_path, monkeypatch, asked, layers):
    from kto_core.engine.step import Engine

    seen = set()
    true = Engine.run
    monkeypatch.setattr(Engine, "run", lambda self, *a, **k: seen.add(self.checkpoint_layers) or true(self, *a, **k))
    ended = run(tiny, data, tmp_path, engine="packed", max_steps=1, gradient_checkpointing=asked)
    assert ended.state == "finished" and seen == {layers}, ended.error
