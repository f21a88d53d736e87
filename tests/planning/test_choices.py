"""What `auto` becomes: decided once for a start."""

from types import SimpleNamespace

import pytest

from kto_core.errors import ConfigError
from kto_core.hardware import gpus
from kto_core.hardware.gpus import Device
from kto_core.planning import choices, memory
from tests.support.training import resolved

CARD = Device(0, "x", 24.0, 24.0, 0.0, (8, 6))
DATA = SimpleNamespace(lengths=[200] * 16, train_rows=[None] * 16, packed=lambda config: None)
ENGINE = ("packed", "Training engine: packed.")


@pytest.fixture
def plans(monkeypatch):
    """The memory plans that are made; two processes, each with a card of its own."""
    made, plan = [], memory.plan
    monkeypatch.setattr(memory, "plan", lambda *args, **kwargs: made.append(plan(*args, **kwargs)) or made[-1])
    monkeypatch.setattr(gpus, "devices", lambda: [CARD, CARD])
    monkeypatch.setattr(choices, "choose_engine", lambda config: ENGINE)
    monkeypatch.setenv("WORLD_SIZE", "2")
    return made


def large(**overrides):
    settings = {"num_gpus": 2, "engine": "auto", "load_in_4bit": True, "r": 8, "lora_alpha": 16} | overrides
    return resolved("meta-llama/Llama-2-70b-hf", "", **settings).config


def test_a_start_plans_its_memory_once(plans):
    decision = choices.decide(large(), DATA)
    assert plans == [decision.plan] and decision.engine == "packed" and decision.sharding and not decision.precompute
    assert decision.checkpointing["every_n_layers"] == max(1, decision.plan.layers // decision.plan.checkpoint_layers)
    texts = [text for text, _ in decision.sentences]
    assert texts[0] == ENGINE[1] and texts[-1] == "The base model's weights are sharded across 2 processes."
    assert [level for text, level in decision.sentences if text.startswith("Memory plan:")] in ([], ["warning"])


def test_what_is_configured_needs_no_plan(plans):
    decision = choices.decide(large(gradient_checkpointing=True, shard=False), DATA)
    assert plans == [] and decision.plan is None and decision.checkpointing == {"use_reentrant": False}
    assert not decision.sharding and decision.sentences == ((ENGINE[1], "info"),)


def test_trls_step_instead_goes_by_the_same_plan(plans):
    first = choices.decide(large(), DATA)
    second = choices.decide_for_trl(large(), DATA, first, "It does not know this model.")
    assert len(plans) == 1 and second.plan is first.plan and second.checkpointing == first.checkpointing
    assert second.engine == "trl" and not second.sharding
    assert second.sentences == (("Using TRL's training step instead. It does not know this model.", "info"),)
    with pytest.raises(ConfigError, match="shard"):
        choices.decide_for_trl(large(shard=True), DATA, first, "")
