"""Training that is stopped, goes on, or goes wrong."""

import gc
import importlib.util
import json
import shutil
import threading
import time

import pytest

from kto_core import files
from kto_core.errors import DiskError
from kto_core.runs import checkpoints
from kto_core.training.train import train
from tests.support.trained import run, weights
from tests.support.training import events, make_data, make_tiny, metrics, resolved, state, wait


def stop_after(folder, step):
    """In a thread: ask for a stop as soon as a metric of ``step`` is there."""

    def body():
        wait(lambda: state(folder).step >= step)
        (folder / "stop").touch()

    thread = threading.Thread(target=body)
    thread.start()
    return thread


# ---- stop and resume -------------------------------------------------------------------------------------------------


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
        said[name] = [
            e["text"]
            for e in events(tmp_path / name)
            if "policy's log-probs differ from the reference's" in e.get("text", "")
        ]
    assert not said["new"] and not said["kept"]
    assert len(said["wrong"]) == 1 and "from the reference's by 6.0" in said["wrong"][0]


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
    assert "Skipping checkpoint-6: it is incomplete" in said
    assert "Skipping checkpoint-5: optimizer.pt is damaged" in said
    assert "Skipping checkpoint-4: adapter_model.safetensors is damaged" in said
    assert next(e for e in events(tmp_path) if "resumed_from" in e)["resumed_from"] == 3
    assert metrics(tmp_path) == before
    assert not (root / "saving.part").exists()


def test_other_data_cannot_be_resumed(tiny, tmp_path):
    data = make_data(tmp_path / "rows.jsonl")
    run(tiny, data, tmp_path / "run", max_steps=2)
    make_data(data, rows=30)
    ended = run(tiny, data, tmp_path / "run", max_steps=4)
    assert ended.state == "failed" and "has changed since this run started" in ended.error


def test_a_run_keeps_the_date_it_began_with(data, demo_model, tmp_path):
    """A template that writes the time: what is trained is the same tomorrow, here a second later."""
    model = make_tiny(tmp_path / "dated", demo_model)
    frame = "{{ '[' + m.role + '] ' + m.content + eos_token }}"
    asking = "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
    now = "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}"
    template = now + "{% for m in messages %}" + frame + "{% endfor %}" + asking
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert run(model, data, tmp_path / "run", max_steps=1, save_steps=1).state == "finished"
    before = json.loads((tmp_path / "run" / "dataset.json").read_text())
    began = state(tmp_path / "run").started
    wait(lambda: time.time() > began + 1.1)
    ended = run(model, data, tmp_path / "run", max_steps=2, save_steps=1)
    assert ended.state == "finished" and ended.step == 2, ended.error
    assert json.loads((tmp_path / "run" / "dataset.json").read_text())["order_sha256"] == before["order_sha256"]
    assert any("writes the date into every prompt" in e.get("text", "") for e in events(tmp_path / "run"))
    other = run(model, data, tmp_path / "other", max_steps=1)
    assert other.state == "finished"
    assert json.loads((tmp_path / "other" / "dataset.json").read_text())["order_sha256"] != before["order_sha256"]


def test_checkpoints_are_limited_and_a_full_disk_keeps_the_old_ones(tiny, data, tmp_path, monkeypatch):
    real = files.seal

    def full(folder, **how):
        if folder.name == "checkpoint-4":
            raise OSError(28, "No space left on device")
        real(folder, **how)

    monkeypatch.setattr(files, "seal", full)
    ended = run(tiny, data, tmp_path, max_steps=6, save_steps=1, save_total_limit=2)
    assert ended.state == "failed" and "disk is full" in ended.error and "checkpoint 4" in ended.error
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["checkpoint-2", "checkpoint-3"]
    assert checkpoints.newest_whole(tmp_path / "checkpoints")[0].name == "checkpoint-3"


@pytest.mark.parametrize("engine", ["trl", "packed"])
def test_memory_comes_back(tiny, data, tmp_path, engine):
    import torch

    def alive():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())  # isinstance asks the object

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
    assert ended.state == "failed" and "NaN at the first step" in ended.error
    assert "not the learning rate" in ended.error and "weights" in ended.error
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"max_length": 30}, "max_length 30"),
        ({"engine": "unsloth"}, "NVIDIA GPU"),
        ({"model": "unsloth/mistral-7b-instruct-v0.3-bnb-4bit"}, "no NVIDIA GPU"),
        ({"target_modules": "nothing_proj"}, "all-linear"),
        ({"adapter": "nowhere"}, "does not contain an adapter"),
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
    from kto_core.planning import choices

    monkeypatch.setattr(choices, "precompute_pays", lambda *a: 1 / 0)
    ended = run(tiny, data, tmp_path, max_steps=1)
    assert ended.state == "failed" and "ZeroDivisionError" in ended.error and "train.log" in ended.error
    assert "Traceback" in (tmp_path / "train.log").read_text()


def test_disk_is_checked_before(tiny, data, tmp_path, monkeypatch):
    from kto_core.planning import checks

    monkeypatch.setattr(checks.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10, 9, 2**20))
    ended = run(tiny, data, tmp_path, max_steps=1)
    assert ended.state == "failed" and "GiB are free" in ended.error
    with pytest.raises(DiskError, match="save_total_limit"):
        from kto_core.models.facts import model_facts

        checks.check_disk(resolved(tiny, data).config, model_facts(str(tiny)), tmp_path, 10)


def test_adapter_size_is_foretold(tiny, data, tmp_path):
    from kto_core.models.facts import model_facts

    config = resolved(tiny, data, max_steps=1)
    train(config.config, tmp_path)
    counted = sum(t.numel() for t in weights(tmp_path / "adapter").values())
    shape = model_facts(str(tiny)).shape
    assert shape.lora_parameters(config.config.target_modules, config.config.r) == counted


def test_a_long_run_keeps_its_checkpoints_light(tiny, data, tmp_path, monkeypatch):
    """trainer_state.json has the last entries; the events and the evaluation at the end miss none."""
    from kto_core.training import callbacks

    monkeypatch.setattr(callbacks, "LOGGED", 3)
    train(resolved(tiny, data, max_steps=8, logging_steps=1, save_steps=8, test_size=0.2).config, tmp_path)
    found = state(tmp_path)
    assert [m["step"] for m in found.metrics if "loss" in m] == list(range(1, 9))
    assert sum("eval_loss" in m for m in found.metrics) == 1
    (saved,) = tmp_path.glob("checkpoints/checkpoint-8/trainer_state.json")
    assert len(json.loads(saved.read_text())["log_history"]) <= 3 + 1


@pytest.mark.parametrize(
    ("rate", "kind", "words"), [(1e-9, "little", "almost nothing"), (0.05, "worse", "from before training")]
)
def test_a_run_says_what_its_rate_did(tiny, data, tmp_path, rate, kind, words):
    from kto_core.health.about import About
    from kto_core.health.rules import findings

    settings = {"max_steps": 12, "learning_rate": rate, "test_size": 0.2}
    ended = run(tiny, data, tmp_path, **settings)
    found = {f.kind: f for f in findings(ended, About.of(resolved(tiny, data, **settings).config, {}))}
    assert words in found[kind].sentence and "set it to auto" in found[kind].change
    said = [e["text"] for e in ended.logs if e["level"] == "warning" and words in e["text"]]
    assert len(said) == 1, "once in the log, by the first steps or by the rules"


def test_a_loss_that_is_nan_at_once_is_not_the_rates_fault():
    from kto_core.training.callbacks import not_finite

    assert "not the learning rate" in str(not_finite(1)) and "Lower the learning rate" in str(not_finite(2))
