"""``report_to``: what is missing is said before the start; a tracker gets the run's metrics, held-out rows' too."""

import importlib
import importlib.util
import sys

import pytest

from kto_core import reporting
from kto_core.config import resolving
from kto_core.errors import ConfigError
from kto_core.training.train import train
from tests.support import trackers
from tests.support.training import resolved, state

NAMES = list(reporting.TITLES)


@pytest.fixture
def only_fakes(monkeypatch):
    """No tracker is found but those that a test puts there; none stays imported."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "TENSORBOARD_LOGGING_DIR", "WANDB_PROJECT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    for name in [n for n in sys.modules if n.split(".")[0] in ("wandb", "trackio", "tensorboardX")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_installed_is_named_before_the_start(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ConfigError) as e:
        reporting.check(resolving.resolve("demo", {"report_to": name}).config)
    (sentence,) = e.value.problems
    assert f"pip install {name}" in sentence and reporting.TITLES[name] in sentence and "none" in sentence


def test_wandb_without_a_key_is_refused(only_fakes, tmp_path, monkeypatch):
    trackers.put("wandb", tmp_path / "fake", monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = resolving.resolve("demo", {"report_to": "wandb"}).config
    with pytest.raises(ConfigError, match="wandb login"):
        reporting.check(config)
    monkeypatch.setenv("WANDB_MODE", "offline")
    reporting.check(config)


def test_nothing_is_sent_by_default():
    for preset in ("demo", "7b"):
        config = resolving.resolve(preset).config
        assert config.report_to == "none" and reporting.arguments(config) == {"report_to": []}
        reporting.check(config)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine", ["trl", "packed"])
def test_a_tracker_gets_the_metrics_of_training_and_of_held_out_rows(
    only_fakes, tiny, data, tmp_path, monkeypatch, name, engine
):
    module = trackers.put(name, tmp_path / "fake", monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = {"max_steps": 3, "eval_steps": 2, "test_size": 0.2, "verdict": False, "run_name": "mine"}
    run_dir = tmp_path / "run"
    train(resolved(tiny, data, report_to=name, wandb_project="ours", engine=engine, **settings).config, run_dir)
    ended, told = state(run_dir), importlib.import_module(module)
    assert ended.state == "finished", ended.error
    for prefix, tracked in (("", "train/"), ("eval_", "eval/")):
        for metric in ("loss", "rewards/margins", "kl"):
            sent = [(m["train/global_step"], m[tracked + metric]) for m in told.logged if tracked + metric in m]
            own = ended.series(prefix + metric)
            assert sent == own and len(own) == (3 if not prefix else 2), metric
    assert told.finished, "nothing stays open"
    if name == "tensorboard":
        assert {b["log_dir"] for b in told.begun} == {str(run_dir / reporting.FOLDER)}
        return
    assert told.run is None and {(b["name"], b["project"]) for b in told.begun} == {("mine", "ours")}
    assert all(b.get("space_id") is None for b in told.begun), "Trackio stays on this machine"
