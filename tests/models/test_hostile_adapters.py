"""Adapters of strangers: one sentence before anything is loaded, and only safetensors are ever read."""

import shutil
import time
from pathlib import Path

import pytest

from kto_core.chat import chat
from kto_core.errors import ModelError
from kto_core.models import adapter_gate
from kto_core.models import load as model
from tests.support.hostile import change, header, load, no_weights  # noqa: F401 (a fixture)
from tests.support.training import resolved


@pytest.fixture(scope="module")
def made_adapter(tiny_model, tmp_path_factory) -> Path:
    settings = resolved(tiny_model, "").config
    out = tmp_path_factory.mktemp("adapter") / "adapter"
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(base, model.lora_config(settings, base)).save_pretrained(out)
    return out


@pytest.fixture
def adapter(made_adapter, tmp_path) -> Path:
    return shutil.copytree(made_adapter, tmp_path / "adapter")


def test_adapters_that_are_none(adapter):
    settings = adapter / "adapter_config.json"
    good = settings.read_text()
    for text, words in (
        ("[]", "holds a list"),
        ("{", "cannot be read"),
        ('{"peft_type": "IA3"}', "IA3, not a LoRA adapter"),
    ):
        settings.write_text(text)
        with pytest.raises(ModelError, match=words):
            adapter_gate.require_adapter(adapter)
    settings.write_text(good)
    renamed = lambda h: {f"x{i}": v for i, v in enumerate(h.values()) if "dtype" in v}  # noqa: E731
    header(adapter / "adapter_model.safetensors", renamed)
    with pytest.raises(ModelError, match="no LoRA weights"):
        adapter_gate.require_adapter(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ModelError, match="does not contain an adapter"):
        adapter_gate.require_adapter(adapter)
    (adapter / "adapter_model.safetensors").symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match="link to another place"):
        adapter_gate.require_adapter(adapter)


@pytest.mark.loads
def test_a_pattern_that_never_ends_is_not_matched(adapter, tiny_model):
    bomb = "(([a-z_.0-9]+)+)$!"
    change(adapter / "adapter_config.json", target_modules=bomb, exclude_modules=bomb, layers_pattern=bomb,
           auto_mapping={"parent_library": "evil", "base_model_class": "Evil"})  # fmt: skip
    base = load(tiny_model)
    began = time.thread_time()
    loaded = model.load_adapter(base, adapter)
    assert time.thread_time() - began < 10
    assert sum("lora_A" in n for n, _ in loaded.named_parameters()) == 14  # seven projections in two layers
    change(adapter / "adapter_config.json", rank_pattern={bomb: 8})
    with pytest.raises(ModelError, match="rank_pattern"):
        model.load_adapter(base, adapter)
    change(adapter / "adapter_config.json", rank_pattern={"^model.layers.0.self_attn.q_proj$": 4})
    adapter_gate.require_adapter(adapter)


@pytest.mark.parametrize(
    ("made_for", "base", "fits"),
    [
        ("some/other", "demo", False),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "demo", True),
        ("unsloth/SmolLM2-135M-Instruct-bnb-4bit", "demo", True),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct", False),
        ("/home/me/model", "Qwen/Qwen2.5-7B-Instruct", True),
        (None, "demo", True),
    ],
)
def test_an_adapter_of_another_base(adapter, made_for, base, fits):
    change(adapter / "adapter_config.json", base_model_name_or_path=made_for)
    if fits:
        adapter_gate._require_base(adapter, base)
        return
    with pytest.raises(ModelError, match="was made for"):
        adapter_gate.require_adapter(adapter, base)


def test_an_adapter_of_other_sizes_is_refused_before_the_base_is_loaded(adapter, tiny_model, monkeypatch):
    from kto_core.planning import checks

    header(adapter / "adapter_model.safetensors",
           lambda h: {n: v | {"shape": v["shape"][::-1]} if "lora_A" in n else v for n, v in h.items()})  # fmt: skip
    with pytest.raises(ModelError, match="does not fit"):
        adapter_gate.require_adapter(adapter, str(tiny_model))
    config = resolved(tiny_model, "", adapter=str(adapter)).config
    assert "does not fit" in checks.refusal(config)
    monkeypatch.setattr(chat, "resolve", lambda *a: (config, adapter, "x"))
    with pytest.raises(ModelError, match="does not fit"):
        chat.Chat.load("x")
