"""Groups and pairs: nothing lost, nobody paired with himself, the same again from the same seed."""

import time

import numpy as np
import pytest
from datasets import Dataset

from kto_core.engine.packing import passes
from kto_core.engine.packing.batches import GroupLoader, Planner, planned_pairs
from kto_core.engine.packing.groups import Ragged, TokenRows, group_count, plan_epoch, plan_sequential
from kto_core.errors import DataError


def keys(n, kinds=None):
    return np.arange(n) if kinds is None else np.arange(n) % kinds


def labels(n, share=0.5, seed=0):
    return np.random.default_rng(seed).random(n) < share


@pytest.mark.parametrize("n", [64, 65, 71, 63, 9, 8, 7, 3, 2])
@pytest.mark.parametrize("batch", [2, 8])
def test_every_row_once_and_its_completion_once(n, batch):
    plan = plan_epoch(labels(n), keys(n), keys(n), batch, seed=1, epoch=0)
    assert sorted(plan.rows) == list(range(n))
    assert len(plan) == group_count(n, batch) == max(1, min(-(-n // batch), n // 2))
    sizes = np.diff(plan.bounds)
    assert sizes.min() >= 2 and sizes.max() - sizes.min() <= 1
    for g in range(len(plan)):
        rows, partner = plan.group(g)
        assert sorted(rows) == sorted(partner)  # the y' are the y of the same group
        assert not np.any(rows == partner)
    assert plan.own == plan.same_prompt == plan.identical == 0


def test_labels_are_spread():
    y = np.array([True] * 300 + [False] * 100)  # sorted, as files often are
    plan = plan_epoch(y, keys(400), keys(400), 16, seed=0, epoch=0)
    share = [y[plan.group(g)[0]].mean() for g in range(len(plan))]
    assert min(share) > 0.6 and max(share) < 0.9


def test_each_epoch_is_shuffled_anew_and_reproducible():
    def plan(seed, epoch):
        return plan_epoch(labels(100), keys(100), keys(100), 8, seed, epoch)

    assert np.array_equal(plan(1, 0).rows, plan(1, 0).rows) and np.array_equal(plan(1, 0).partner, plan(1, 0).partner)
    assert not np.array_equal(plan(1, 0).rows, plan(1, 1).rows)
    assert not np.array_equal(plan(1, 0).rows, plan(2, 0).rows)
    groups = [{frozenset(plan(1, e).group(g)[0].tolist()) for g in range(12)} for e in (0, 1)]
    assert groups[0] != groups[1]


@pytest.mark.parametrize("prompts, completions", [(5, None), (None, 5), (7, 6), (2, None)])
def test_bad_pairs_are_avoided_wherever_they_can_be(prompts, completions):
    n = 128
    p, c = keys(n, prompts), keys(n, completions)
    plan = plan_epoch(labels(n), p, c, 16, seed=3, epoch=0)
    for g in range(len(plan)):
        rows, partner = plan.group(g)
        assert sorted(rows) == sorted(partner)
        bad = (p[rows] == p[partner]) | (c[rows] == c[partner])
        if prompts == 2:  # a group may have more than half of its rows from one prompt
            most = max(np.bincount(p[rows]))
            assert bad.sum() == max(0, 2 * most - len(rows))
        else:
            assert not bad.any()


def test_what_cannot_be_avoided_is_counted():
    plan = plan_epoch(labels(12), np.zeros(12, int), keys(12), 6, seed=0, epoch=0)
    assert (plan.own, plan.same_prompt, plan.identical) == (0, 12, 0)
    plan = plan_epoch(labels(12), keys(12), np.zeros(12, int), 6, seed=0, epoch=0)
    assert (plan.own, plan.same_prompt, plan.identical) == (0, 0, 12)


def test_one_row_cannot_be_paired():
    with pytest.raises(DataError, match="two rows"):
        plan_epoch(labels(1), keys(1), keys(1), 8, 0, 0)
    assert len(plan_epoch(labels(1), keys(1), keys(1), 8, 0, 0, kl=False)) == 1


def test_sequential_is_trls_rotation():
    plan = plan_sequential(11, 4, 2)
    assert plan.partner.tolist() == [3, 0, 1, 2, 7, 4, 5, 6, 10, 8, 9]
    assert plan.bounds.tolist() == [0, 8, 11]
    assert plan_sequential(9, 4, 1).partner.tolist()[-1] == 7  # not its own


def test_a_million_rows_are_planned_in_seconds():
    n, rng = 1_000_000, np.random.default_rng(0)
    flat = rng.integers(0, 50_000, 4 * n).astype(np.int32)
    flat[: 4 * (n // 2)] = np.tile(flat[:400], n // 200)  # half of the rows share 100 prompts
    prompt = Ragged(flat, np.arange(0, 4 * n + 1, 4))
    completion = Ragged(rng.integers(0, 300, 2 * n).astype(np.int32), np.arange(0, 2 * n + 1, 2))
    rows = TokenRows(prompt, completion, labels(n))
    started = time.process_time()
    plan = Planner(rows, 32, 0, None, True).epoch(0)
    assert time.process_time() - started < 20
    assert len(plan) == n // 32 and plan.own == plan.same_prompt == plan.identical == 0


def test_rows_from_a_dataset():
    data = Dataset.from_dict(
        {"prompt_ids": [[1, 2], [3], [4, 5, 6]], "completion_ids": [[7], [8, 9], [7]], "label": [True, False, True]}
    )
    rows = TokenRows.from_dataset(data.select([2, 0, 1]))  # an indices mapping, not the stored order
    assert [r.tolist() for r in (rows.prompt[0], rows.prompt[1], rows.completion[2])] == [[4, 5, 6], [1, 2], [8, 9]]
    assert rows.labels.tolist() == [True, True, False]
    k = rows.completion.keys()
    assert k[0] == k[1] != k[2]
    with pytest.raises(DataError, match="empty completion"):
        TokenRows.from_dataset(Dataset.from_dict({"prompt_ids": [[1]], "completion_ids": [[]], "label": [True]}))
    with pytest.raises(DataError, match="prompt_ids"):
        TokenRows.from_dataset(Dataset.from_dict({"prompt": ["x"], "completion": ["y"], "label": [True]}))


def test_processes_share_a_group_and_planned_pairs_cover_the_steps():
    n = 21
    rows = TokenRows(Ragged.of([[i] for i in range(n)]), Ragged.of([[i + 50] for i in range(n)]), labels(n))
    planner = Planner(rows, 6, 0, None, True)
    halves = [list(GroupLoader(planner, rank, 2)) for rank in (0, 1)]
    together = [np.concatenate([a["rows"], b["rows"]]) for a, b in zip(*halves, strict=True)]
    assert sorted(np.concatenate(together)) == list(range(n))
    pairs = set(planned_pairs(planner, 6))  # 4 groups an epoch: one epoch and a half
    for epoch, steps in ((0, 4), (1, 2)):
        plan = planner.epoch(epoch)
        for g in range(steps):
            for r, partner in zip(*plan.group(g), strict=True):
                assert (r, r) in pairs and (r, partner) in pairs
    last = planner.epoch(1).group(3)
    assert not all((r, partner) in pairs for r, partner in zip(*last, strict=True))


def test_a_prompt_that_was_cut_is_still_the_same_prompt(demo_model):
    """How much of a prompt is cut depends on the answer: the ids that are left differ, the prompt does not."""
    from kto_core.data.records.rows import parse
    from kto_core.data.rendering.template import encode_rows
    from kto_core.models.load import load_tokenizer
    from kto_core.training.trainer import encoded_dataset

    rows = [
        parse({"prompt": f"{p} " * 60, "completion": "so " * (1 + 2 * a), "label": a % 2}, 1)[0][0]
        for p in ("alpha", "beta", "gamma", "delta")
        for a in range(4)
    ]
    encoded = encode_rows(rows, load_tokenizer(str(demo_model)), 48)
    assert {e.fate for e in encoded} == {"truncated"}
    assert len({tuple(e.prompt_ids) for e in encoded}) > 4
    found = TokenRows.from_dataset(encoded_dataset(encoded, [r.label for r in rows], 4, kl=True, keys=True))
    planner = Planner(found, 8, seed=0, micro_batch=None, kl=True)
    for epoch in range(5):
        plan = planner.epoch(epoch)
        on_prompt = sum(a // 4 == b // 4 for a, b in zip(plan.rows, plan.partner, strict=True))
        assert on_prompt == plan.same_prompt == 0


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_the_rule_of_recomputing_offloading_and_the_last_share():
    """Two layers. A token takes 26 bytes with none recomputed, 17 with one or both, 16 with their inputs elsewhere."""
    token = passes.Token(layer=10, entry=1, rest=2, store=0, busy=4)
    assert [token.peak(2, n) for n in range(3)] == [26, 17, 17] and token.offloaded().peak(2, 2) == 16

    def found(free, last=0, recompute=True, offloads=False, given=None):
        return passes.limits([60], 40, 2, token, free, last, given=given, recompute=recompute,
                             can_offload=lambda: offloads)  # fmt: skip

    assert found(26 * 60)[:3] == (60, 0, False)
    assert found(26 * 39, recompute=False).choices == [0, 2] and found(26 * 40, recompute=False).choices == [0]
    assert found(17 * 39, 17 * 39).budget == 39  # no pass holds the longest row
    assert found(17 * 39, 17 * 39, offloads=True)[:3] == (41, 1, True)
    assert found(17 * 40, offloads=True).offload is False  # only where there is no room otherwise
    last = found(17 * 39, 26 * 45)
    assert last[:3] == (68, 1, False) and last.needed(20) == 0 and last.needed(30) == 1  # shorter ones: the usual share
    assert found(26 * 60, given=1).choices == [1] and found(26 * 60, given=1).layers == 1
