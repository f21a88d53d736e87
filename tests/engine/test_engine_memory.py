"""How the packed engine fits the memory: limits of a pass, layers recomputed, inputs kept elsewhere, out of memory."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from tests.support.packed import dataset, metrics, packed


def test_limits_follow_the_memory(tmp_path, tokenizer, monkeypatch):
    """Less memory: first more recomputed layers (on a GPU), then smaller passes; the measured bytes are the truth."""
    from kto_core.engine import limits

    trainer = packed(tmp_path, tokenizer, dataset(16))
    engine, groups = trainer.engine, limits.sample_groups(trainer.planner)
    token, copies = limits.measure(engine, trainer._autocast)
    per_layer, width, rest = token.layer, token.entry, token.rest + token.store
    assert width == 64 * 4
    assert 8 * width < per_layer < 60 * width and 0 < rest < per_layer * 3
    assert token.peak(3, 0) > token.peak(3, 1) > token.peak(3, 2) == token.peak(3, 3)  # the last one is in its backward
    found = []
    for tokens, kept in ((max(groups), 0), (max(groups), 1), (max(groups), 2), (50, 2)):
        leave(monkeypatch, trainer, (tokens + 0.5) * token.peak(3, kept) + copies)
        chosen = limits.choose(engine, groups, trainer._autocast, None, 40, recompute=True)
        found.append((chosen.token_budget, chosen.checkpoint_layers))
    assert found == [(max(groups), 0), (max(groups), 1), (max(groups), 2), (50, 2)]


def test_inputs_of_layers_wait_elsewhere_where_the_longest_row_has_no_room(tmp_path, tokenizer, monkeypatch, caplog):
    """At the start, and as the last answer to running out of memory."""
    from kto_core.engine import limits
    from kto_core.engine.packing.batches import longest
    from kto_core.engine.packing.passes import OFFLOADED

    trainer = packed(tmp_path, tokenizer, dataset(16))
    engine, groups = trainer.engine, limits.sample_groups(trainer.planner)
    token, copies = limits.measure(engine, trainer._autocast)
    monkeypatch.setattr(limits, "LAST_SHARE", limits.SHARE)
    leave(monkeypatch, trainer, 39.5 * token.peak(3, 3) + copies)

    def chosen(layers=None):
        return limits.choose(engine, groups, trainer._autocast, layers, 40, recompute=True)

    assert chosen().token_budget == 39
    assert not chosen().offload and not limits.can_offload(engine, 40)  # a CPU's memory is main memory
    engine.limits = replace(engine.limits, checkpoint_layers=3, token_budget=40)
    assert limits.tightened(engine, 40, 1000) is None
    monkeypatch.setattr(limits, "can_offload", lambda engine, tokens: True)
    assert limits.tightened(engine, 40, 1000, recompute=False) is None  # without a backward nothing waits
    engine.limits = limits.tightened(engine, 40, 1000)
    assert engine.limits.offload
    assert limits.tightened(engine, 40, 1000) is None
    engine.limits = replace(engine.limits, offload=False)
    cut = chosen()
    assert cut.offload and cut.token_budget == int(39.5 * token.peak(3, 3) / token.offloaded().peak(3, 3)) > 40
    leave(monkeypatch, trainer, (longest(trainer.rows) - 0.5) * token.peak(3, 3) + copies)
    trainer._limits(None, None)
    assert caplog.messages.count(OFFLOADED) == 1
    leave(monkeypatch, trainer, 40.5 * token.peak(3, 3) + copies)
    engine.limits = replace(engine.limits, offload=False)
    assert chosen().token_budget == 40 and not chosen().offload
    assert not chosen(10**6).offload  # every layer, however many there are


def test_the_longest_row_may_have_more_of_the_memory(tmp_path, tokenizer, monkeypatch):
    """Where it has no room otherwise; then an 8-bit optimizer counts as what it is, too."""
    from transformers.training_args import OptimizerNames

    from kto_core.engine import limits

    trainer = packed(tmp_path, tokenizer, dataset(16))
    engine, groups = trainer.engine, limits.sample_groups(trainer.planner)
    token, copies = limits.measure(engine, trainer._autocast)
    adapter = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    fixed, peak = copies + 12 * adapter, token.peak(3, 3)
    room = (39.5 * peak + fixed) / limits.SHARE
    monkeypatch.setattr(limits, "RESERVE", {})
    monkeypatch.setattr(limits, "available", lambda device: room)

    def chosen(longest, moments):
        return limits.choose(engine, groups, trainer._autocast, None, longest, recompute=True, moments=moments)

    def budget(longest, moments):
        return chosen(longest, moments).token_budget

    assert budget(39, 8) == budget(39, 2.1) == 39
    assert budget(40, 8) == int((room * limits.LAST_SHARE - fixed) / peak) >= 40
    assert budget(40, 2.1) == int((room * limits.LAST_SHARE - fixed + 5.9 * adapter) / peak) > budget(40, 8)
    with_one = [int((room * share - fixed) / token.peak(3, 1)) for share in (limits.SHARE, limits.LAST_SHARE)]
    needed = chosen(40, 2.1).needed
    assert with_one[0] < with_one[1] and needed(with_one[0]) == 1 and needed(with_one[1]) == 2
    counted = []
    roomy = limits.Limits(10**6, 10**6)
    monkeypatch.setattr(limits, "choose", lambda *args, moments, rows: counted.append(moments) or roomy)
    for name in (OptimizerNames.ADAMW_8BIT, OptimizerNames.ADAMW_TORCH):
        trainer.args.optim = name
        trainer._limits(None, None)
    assert counted == [2.1, 8]


def test_main_memory_has_to_have_room_for_the_inputs():
    from kto_core.engine.packing.passes import inputs_fit

    assert inputs_fit(1000, 32, 1024, 64 * 2**20) and not inputs_fit(1000, 32, 1024, 63 * 2**20)  # 32 blocks of 1 MiB
    assert not inputs_fit(1025, 32, 1024, 64 * 2**20)  # of 2 MiB


def leave(monkeypatch, trainer, room: float) -> None:
    """Leave so many bytes for a pass."""
    from kto_core.engine import limits

    room += sum(p.numel() * 12 for p in trainer.model.parameters() if p.requires_grad)
    monkeypatch.setattr(limits, "RESERVE", {})
    monkeypatch.setattr(limits, "available", lambda device: room / limits.SHARE)


def test_each_pass_recomputes_as_few_layers_as_its_size_needs(tmp_path, tokenizer, monkeypatch):
    """And never fewer than running out of memory has taught; the gradient does not depend on it."""
    from kto_core.engine import limits

    trainer = packed(tmp_path, tokenizer, dataset(16))
    engine, groups = trainer.engine, limits.sample_groups(trainer.planner)
    token, copies = limits.measure(engine, trainer._autocast)
    assert min(groups) < max(groups)
    leave(monkeypatch, trainer, (min(groups) + max(groups)) / 2 * token.peak(3, 0) + copies)
    engine.limits = limits.choose(engine, groups, trainer._autocast, None, 40, recompute=True)
    seen, forward = [], engine.forward

    def noted(*args):
        if torch.is_grad_enabled():
            seen.append(engine.limits.checkpoint_layers)
        return forward(*args)

    monkeypatch.setattr(engine, "forward", noted)
    trainer.train()
    assert set(seen) == {0, 1}
    assert engine.limits.needed(1) == 0 and engine.limits.needed(10**6) == 3
    quiet = packed(tmp_path, tokenizer, dataset(16))
    quiet.train()
    assert [m["loss"] for m in metrics(trainer)] == pytest.approx([m["loss"] for m in metrics(quiet)], rel=1e-5)
    assert limits.tightened(engine, 40, 1000) is not None
    engine.limits = replace(engine.limits, least_layers=2)
    seen.clear()
    trainer._step(next(iter(trainer.get_train_dataloader())), backward=True)
    assert min(seen) == 2


def test_out_of_memory_is_answered_with_smaller_passes(tmp_path, tokenizer, monkeypatch):
    data = dataset(16)
    quiet = packed(tmp_path, tokenizer, data)
    quiet.train()
    trainer = packed(tmp_path, tokenizer, data)
    run, failures = trainer.engine.run, iter([True, True, False, True, False, False, False, False, False])

    def fails(*args, **kwargs):
        if next(failures):
            raise torch.cuda.OutOfMemoryError("for the test")
        return run(*args, **kwargs)

    monkeypatch.setattr(trainer.engine, "run", fails)
    trainer.train()
    assert trainer.engine.limits.checkpoint_layers == 3
    assert [m["loss"] for m in metrics(trainer)] == pytest.approx([m["loss"] for m in metrics(quiet)], rel=1e-5)


def test_states_of_prompts_and_what_the_rule_computes_again_are_counted(monkeypatch):
    from kto_core.engine import limits
    from kto_core.engine.step import Engine
    from tests.support import oracle

    engine = Engine(oracle.tuned_model("qwen3_5", torch.float32).train())
    few, many = (limits.measure(engine, nullcontext, prompt)[0].store for prompt in (10, 40))
    # two layers: a state of 4 heads, 8 x 8, in float32, and three inputs of the convolution, which is 64 wide
    assert few - many == pytest.approx(2 * (4 * 8 * 8 + 3 * 64) * 4 * (1 / 10 - 1 / 40))
    assert few == pytest.approx(2 * 2 * 16 * 4 + 2 * (4 * 8 * 8 + 3 * 64) * 4 / 10, rel=0.01)  # one layer attends
    monkeypatch.setattr(limits, "available", lambda device: 2**30)
    roomy = limits.choose(engine, [100], nullcontext, None, 40, recompute=True, rows=10).token_budget
    monkeypatch.setitem(limits.RECURRENCE, "cpu", 2**29)
    assert limits.choose(engine, [100], nullcontext, None, 40, recompute=True, rows=10).token_budget < roomy / 1.5
