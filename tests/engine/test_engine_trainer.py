"""PackedKTOTrainer beside TRL's KTOTrainer: same numbers, same loop; resume; what it refuses."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import KTOTrainer

from kto_core.engine import PackedKTOTrainer
from tests.support import oracle
from tests.support.packed import arguments, dataset, metrics, packed


class Plain(KTOTrainer):
    """TRL's trainer on rows that are tokens already, with TRL's pairs."""

    def _prepare_dataset(self, dataset, processing_class, args, name):
        def rotate(batch):
            return {"KL_completion_ids": [batch["completion_ids"][-1], *batch["completion_ids"][:-1]]}

        return dataset.map(rotate, batched=True, batch_size=args.per_device_train_batch_size)


def plain(folder, tokenizer, data, args=None):
    return Plain(
        model=oracle.base_model(), args=args or arguments(folder), train_dataset=data, processing_class=tokenizer,
        peft_config=oracle.lora(),
    )  # fmt: skip


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_one_step_equals_trls(tmp_path, tokenizer, architecture):
    """Same rows, same pairs, adapters away from zero: loss, z0, rewards and every gradient in fp32."""
    data = dataset(8)
    args = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    theirs = Plain(
        model=oracle.base_model(architecture), args=arguments(tmp_path, **args), train_dataset=data,
        processing_class=tokenizer, peft_config=oracle.lora(),
    )  # fmt: skip
    oracle.fill_adapter(theirs.model)
    theirs.model.train()
    loss = theirs.compute_loss(theirs.model, next(iter(theirs.get_train_dataloader())))
    loss.backward()
    expected = oracle.gradients(theirs.model)

    ours = packed(tmp_path, tokenizer, data, oracle.base_model(architecture), arguments(tmp_path, **args))
    ours.reference_scores.prepare([(i, j) for i in range(8) for j in (i, (i - 1) % 8)])
    oracle.fill_adapter(ours.model)
    rows = np.arange(8)
    result = ours.training_step(ours.model, {"rows": rows, "partner": np.roll(rows, 1), "size": 8})
    found = oracle.gradients(ours.model)

    assert float(result) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert oracle.worst(found, expected) < 1e-5
    for name, values in theirs._metrics["train"].items():
        assert ours._metrics["train"][name][0] == pytest.approx(values[0], rel=1e-4, abs=2e-5), name
    assert theirs._metrics["train"].keys() == ours._metrics["train"].keys()


def test_a_whole_run_with_microbatch_groups_is_trls(tmp_path, tokenizer):
    data = dataset(18)  # the last step has a short micro-batch
    theirs = plain(tmp_path, tokenizer, data)
    theirs.train()
    ours = packed(tmp_path, tokenizer, data, kl_group="microbatch")
    ours.train()
    a, b = metrics(theirs), metrics(ours)
    assert len(a) == len(b) == 6
    for one, two in zip(a, b, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"epoch"}:  # TRL counts micro-batches, and the last ones are fewer
            assert two[name] == pytest.approx(one[name], rel=2e-4, abs=1e-4), name
    final = {n: p for n, p in theirs.model.named_parameters() if p.requires_grad}
    for name, p in ours.model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(p, final[name], atol=2e-4), name


@pytest.mark.parametrize("budget, layers", [(None, None), (70, 2)])
def test_the_first_loss_is_half_the_mean_weight(tmp_path, tokenizer, budget, layers):
    trainer = packed(tmp_path, tokenizer, dataset(16), token_budget=budget, checkpoint_layers=layers)
    trainer.train()
    first, last = metrics(trainer)[0], metrics(trainer)[-1]
    labels = trainer.rows.labels[trainer.planner.epoch(0).group(0)[0]]
    assert first["loss"] == pytest.approx(0.5 * np.where(labels, 1.2, 0.9).mean(), abs=1e-5)
    assert first["kl"] < 1e-4 and abs(first["rewards/margins"]) < 1e-4
    assert last["loss"] < first["loss"] and last["rewards/margins"] > 0.01
    assert trainer.state.global_step == trainer.state.max_steps == 4
    names = {"loss", "grad_norm", "learning_rate", "kl", "entropy", "num_tokens", "rewards/margins", "epoch", "step"}
    names |= {f"{what}/{side}" for what in ("rewards", "logps", "logits") for side in ("chosen", "rejected")}
    assert names <= last.keys()


def test_steps_epochs_and_saves_count_as_in_trl(tmp_path, tokenizer):
    data = dataset(21)
    for extra in ({"num_train_epochs": 2}, {"max_steps": 5}, {"num_train_epochs": 0.5}):
        ours = packed(tmp_path, tokenizer, data, args=arguments(tmp_path, learning_rate=0.0, **extra))
        theirs = plain(tmp_path, tokenizer, data, arguments(tmp_path, learning_rate=0.0, **extra))
        ours.train()
        theirs.train()
        assert ours.state.global_step == theirs.state.global_step == ours.state.max_steps
        assert metrics(ours)[-1]["epoch"] == pytest.approx(theirs.state.log_history[-1]["epoch"], abs=0.2)


class Pairs(TrainerCallback):
    def __init__(self):
        self.seen = []

    def watch(self, trainer):
        step = trainer._step

        def recorded(inputs, *args, **kwargs):
            self.seen.append((inputs["rows"].tolist(), inputs["partner"].tolist()))
            return step(inputs, *args, **kwargs)

        trainer._step = recorded
        return self


def test_resume_in_the_middle_of_an_epoch_repeats_the_run(tmp_path, tokenizer):
    data = dataset(29)
    args = {"save_strategy": "steps", "save_steps": 6, "num_train_epochs": 3}
    whole = packed(tmp_path, tokenizer, data, args=arguments(tmp_path, **args))
    seen = Pairs().watch(whole).seen
    whole.train()
    again = packed(tmp_path, tokenizer, data, args=arguments(tmp_path, **args))
    repeated = Pairs().watch(again).seen
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))  # 4 steps an epoch
    assert len(seen) == 12 and repeated == seen[6:]
    assert [m["loss"] for m in metrics(again)] == [m["loss"] for m in metrics(whole)]
    assert not list(tmp_path.glob("checkpoint-*/ref"))


def test_a_second_run_computes_nothing_it_knows(tmp_path, tokenizer):
    data = dataset(16)
    first = packed(tmp_path, tokenizer, data)
    assert first.prepare_reference()["computed"] > 0
    other = arguments(tmp_path, learning_rate=1e-2, beta=0.5, desirable_weight=1.0, num_train_epochs=1)
    second = PackedKTOTrainer(
        model=oracle.base_model(), args=other, train_dataset=data, processing_class=tokenizer,
        peft_config=oracle.lora(lora_dropout=0.1), cache_dir=tmp_path / "cache",
    )  # fmt: skip
    counts = second.prepare_reference()
    assert counts["computed"] == 0 and counts["cached"] == counts["pairs"] > 0
    new_seed = packed(tmp_path, tokenizer, data, args=arguments(tmp_path, seed=7))
    counts = new_seed.prepare_reference()
    assert counts["cached"] >= 16  # all rows' own scores; only new pairs are computed


def test_a_trained_adapter_starts_with_no_reward_and_is_not_copied(tmp_path, tokenizer):
    model = oracle.tuned_model("llama", torch.float32)
    trainer = packed(tmp_path, tokenizer, dataset(16), model, peft_config=False, reference_cache=False)
    trainer.train()
    first, last = metrics(trainer)[0], metrics(trainer)[-1]
    assert abs(first["rewards/chosen"]) < 1e-4 and first["kl"] < 1e-4
    assert abs(last["rewards/margins"]) > 1e-3
    assert list(trainer.model.peft_config) == ["default"]


def test_evaluation_counts_every_row_once(tmp_path, tokenizer):
    data, held_out = dataset(16), dataset(11, seed=5)
    trainer = packed(
        tmp_path, tokenizer, data, eval_dataset=held_out,
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=2, num_train_epochs=1),
    )  # fmt: skip
    trainer.train()
    logged = [h for h in trainer.state.log_history if "eval_loss" in h]
    assert len(logged) == 1 and {"eval_rewards/margins", "eval_kl", "eval_logps/chosen"} <= logged[0].keys()
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(logged[0]["eval_loss"], rel=1e-6)
    small = packed(tmp_path, tokenizer, data, args=arguments(tmp_path, learning_rate=0.0))
    assert small.evaluate(held_out)["eval_loss"] == pytest.approx(
        np.where(held_out["label"], 1.2, 0.9).mean() / 2, abs=1e-5
    )
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)


def test_every_lora_tensor_moves_with_a_4_bit_base(tmp_path, tokenizer):
    """bf16 adapters would stand still at this learning rate; these are fp32 although the base has 4 bits."""
    from transformers import BitsAndBytesConfig

    oracle.base_model(hidden_size=128, intermediate_size=192).save_pretrained(tmp_path / "model")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=quantization)
    args = arguments(tmp_path, learning_rate=5e-7, max_steps=20)
    trainer = packed(tmp_path, tokenizer, dataset(16), model, args)
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.evaluate(dataset(4))  # eval mode in between must not harm the 4-bit weights
    trainer.train()
    assert len(start) == 3 * 7 * 2
    for name, p in trainer.model.named_parameters():
        if name in start:
            assert p.dtype == torch.float32
            moved = (p != start[name]).float().mean()
            assert moved > 0.9, (name, float(moved))


def test_bf16_starts_near_the_reference_and_keeps_fp32_adapters(tmp_path, tokenizer):
    args = arguments(tmp_path, bf16=True, max_steps=4)
    trainer = packed(tmp_path, tokenizer, dataset(16), oracle.base_model("qwen3").bfloat16(), args)
    assert trainer._scoring_dtype() == "bfloat16"
    trainer.train()
    first = metrics(trainer)[0]
    assert abs(first["rewards/margins"]) < 0.05 and first["kl"] < 0.5  # rounding, packed one way or the other
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert all(math.isfinite(m["loss"]) for m in metrics(trainer))


def test_batches_are_sampled_as_they_are_packed(tmp_path, tokenizer):
    from kto_core.engine.packing.sample import sample

    data = dataset(16)
    trainer = packed(tmp_path, tokenizer, data)
    run, seen = trainer.engine.run, []

    def watched(*args, **kwargs):
        seen.append(run(*args, **kwargs))
        return seen[-1]

    trainer.engine.run = watched
    trainer.train()
    rows = list(zip(data["prompt_ids"], data["completion_ids"], strict=True))
    steps, args = len(trainer.planner.epoch(0)), trainer.args
    found = sample(rows, data["label"], args.per_device_train_batch_size, seed=args.seed, steps=100)
    assert [r.packed for r in seen[:steps]] == found.tokens and len(found.tokens) == steps > 1
    assert found.share == sum(found.tokens) / sum(len(p) + len(c) for p, c in rows) < 1
    first = sample(rows, data["label"], args.per_device_train_batch_size, seed=args.seed, steps=1)
    assert first.tokens == found.tokens[:1]


def test_a_process_counts_its_own_rows(tmp_path, tokenizer):
    """What limits are chosen for is what the process's trainer will pack, not the batch of all processes."""
    from kto_core.engine import limits
    from kto_core.engine.packing.batches import GroupLoader
    from kto_core.engine.packing.passes import y_tokens
    from kto_core.engine.packing.sample import packed_tokens

    planner = packed(tmp_path, tokenizer, dataset(17)).planner
    rows = planner.rows
    for rank, world in ((0, 1), (0, 2), (1, 2), (3, 4)):
        expected = [
            packed_tokens(rows.prompt, rows.completion, batch["rows"])
            + sum(y_tokens(len(rows.completion[i])) for i in batch["partner"])
            for batch in GroupLoader(planner, rank, world)
        ]
        assert limits.sample_groups(planner, rank, world) == expected
    assert limits.sample_groups(planner, 16, 20) == []  # fewer rows than processes
