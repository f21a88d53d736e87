"""What the packed trainer refuses, and how it says so."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kto_core.engine import PackedKTOTrainer, available
from kto_core.errors import DataError, ModelError, NotServed
from tests.support import oracle
from tests.support.packed import arguments, dataset, metrics, packed

# ---- what it refuses ------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_in_one_sentence(tmp_path, tokenizer):
    from peft import LoraConfig

    with pytest.raises(DataError, match="two rows"):
        packed(tmp_path, tokenizer, dataset(1))
    with pytest.raises(DataError, match="batch"):
        one = arguments(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=1)
        packed(tmp_path, tokenizer, dataset(8), args=one)
    with pytest.raises(DataError, match="exceed the limit of 30 tokens"):
        packed(tmp_path, tokenizer, dataset(8), token_budget=30)
    with pytest.raises(ModelError, match="lm_head"):
        PackedKTOTrainer(
            model=oracle.base_model(), args=arguments(tmp_path), train_dataset=dataset(8), processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
        )  # fmt: skip
    with pytest.raises(ModelError, match="LoRA"):
        packed(tmp_path, tokenizer, dataset(8), peft_config=False)
    for extra in ({"bias": "lora_only"}, {"modules_to_save": ["norm"]}):
        with pytest.raises(ModelError, match="only LoRA layers"):
            PackedKTOTrainer(
                model=oracle.base_model("qwen2"), args=arguments(tmp_path), train_dataset=dataset(8),
                processing_class=tokenizer,
                peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **extra),
            )  # fmt: skip


def test_one_label_trains_without_nan(tmp_path, tokenizer):
    trainer = packed(tmp_path, tokenizer, dataset(16, labels=[True] * 16))
    trainer.train()
    for m in metrics(trainer):
        assert math.isfinite(m["loss"]) and math.isfinite(m["grad_norm"])
        assert "rewards/chosen" in m and "rewards/rejected" not in m and "rewards/margins" not in m


def test_a_pass_that_is_not_the_models_is_refused(tmp_path, tokenizer, monkeypatch):
    from kto_core.engine.layers.loss import Head

    true = Head.of.__func__
    monkeypatch.setattr(Head, "of", classmethod(lambda cls, m: Head(true(cls, m).weight, None, 3.0, None)))
    with pytest.raises(ModelError, match="does not reproduce"):
        packed(tmp_path, tokenizer, dataset(8))


def test_keys_and_values_that_are_not_the_models_are_refused(tmp_path, tokenizer):
    """DiffLlama attends twice in a layer, with other values: its completions on kept ones would be wrong."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("diffllama", **oracle.SIZES)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with pytest.raises(NotServed, match="does not reproduce"):
        packed(tmp_path, tokenizer, dataset(8), model)


@pytest.mark.parametrize("architecture", oracle.SERVED)
def test_available(architecture):
    assert available(oracle.config_of(architecture)) == (True, "")


@pytest.mark.parametrize(
    "model_type, settings, word",
    [
        ("doge", {"num_experts": 4}, "mixture of experts of a kind"),
        ("kimi_linear", {}, "linear attention"),
        ("mamba", {}, "linear attention"),
        ("t5", {}, "encoder-decoder"),
        ("gpt2", {}, "rotary"),
        ("falcon_mamba", {}, "linear attention"),
        ("whisper", {}, "encoder-decoder"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "position"),
    ],
)
def test_not_available_says_why(model_type, settings, word):
    ok, reason = available(AutoConfig.for_model(model_type, **settings))
    assert not ok and word in reason and reason.endswith(".")


def test_available_with_a_length():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = AutoConfig.for_model("llama", max_position_embeddings=4096, rope_parameters=rope)
    assert available(config, 2048) == (True, "") and not available(config, 2049)[0]
