"""The packed step against the float64 oracle: every architecture, every way to split the work, every trap."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from kto_core.engine.group import Group, Objective
from kto_core.engine.layers import attention
from kto_core.engine.layers.loss import Head, kto_losses, token_logps
from kto_core.engine.packing import passes, tree
from kto_core.engine.step import Engine
from tests.support import oracle

TIGHT = 2e-6  # transformers' norms compute in fp32 also in a float64 model


def group_of(rows, expected=None, borrowed=None, kl=True):
    prompts, completions, labels = rows
    borrowed = borrowed or [*completions[1:], completions[0]]
    return Group(
        prompts,
        completions,
        borrowed if kl else None,
        torch.tensor(labels),
        expected["reference"] if expected else None,
        expected["kl_reference"] if expected and kl else None,
    )


def run(engine, group, backward=True, **settings):
    objective = Objective(**({"beta": 0.1} | settings))
    engine.model.train()
    with engine.using_tree():
        result = engine.run(group, objective, backward=(lambda loss: loss.backward()) if backward else None)
    return result, oracle.gradients(engine.model)


def check(result, gradients, expected, tolerance=TIGHT):
    assert float(result.loss) == pytest.approx(expected["loss"], rel=tolerance)
    assert float(result.z0) == pytest.approx(expected["z0"], rel=tolerance, abs=1e-6)
    assert torch.allclose(result.logps.double(), expected["logps"], rtol=tolerance)
    assert oracle.worst(gradients, expected["gradients"]) < tolerance


@pytest.mark.parametrize("architecture", oracle.SERVED)
def test_every_architecture_matches_the_oracle(architecture):
    model = oracle.tuned_model(architecture)
    rows = oracle.random_rows(6)
    prompts, completions, labels = rows
    borrowed = [*completions[1:], completions[0]]
    expected = oracle.step(model, prompts, completions, borrowed, labels, 0.1, 1.3, 0.7)
    result, gradients = run(Engine(model), group_of(rows, expected), desirable_weight=1.3, undesirable_weight=0.7)
    # Gemma 4 computes its norms in float32, whatever its weights are
    check(result, gradients, expected, 1e-5 if architecture.startswith("gemma4") else TIGHT)
    assert result.passes == 1 and result.packed < result.tokens / 2  # shared starts were computed once


@pytest.mark.parametrize("budget, layers", [(None, 1), (None, 3), (90, 0), (60, 3), (48, 0)])
def test_micro_passes_and_recomputed_layers_change_nothing(budget, layers):
    model = oracle.tuned_model("qwen2")  # its z0 is above zero here
    rows = oracle.random_rows(6)
    prompts, completions, labels = rows
    expected = oracle.step(model, prompts, completions, [*completions[1:], completions[0]], labels)
    assert expected["z0"] > 0
    result, gradients = run(Engine(model, budget, layers), group_of(rows, expected))
    assert (result.passes > 1) == (budget is not None)
    check(result, gradients, expected)


def test_inputs_of_recomputed_layers_wait_in_main_memory(monkeypatch):
    """Two of three layers in each pass; theirs are given up until the backward, which gets the same gradient."""
    waiting, inputs, alive = [], [], []

    class Elsewhere(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory):
            super().__init__(self.pack, lambda tensor: tensor)

        def pack(self, tensor):
            waiting.append(tensor.clone())
            return waiting[-1]

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Elsewhere)
    model = oracle.tuned_model("qwen2")
    rows = oracle.random_rows(6)
    prompts, completions, labels = rows
    expected = oracle.step(model, prompts, completions, [*completions[1:], completions[0]], labels)
    engine = Engine(model, 60, 2)
    engine.limits = replace(engine.limits, offload=True)
    for layer in engine.layers:
        layer.register_forward_pre_hook(lambda _, x: inputs.append(StorageWeakRef(x[0].untyped_storage())))
    engine.model.train()
    with engine.using_tree():

        def backward(loss):
            alive.append(sum(not i.expired() for i in inputs[-3:]))
            loss.backward()

        result = engine.run(group_of(rows, expected), Objective(0.1), backward=backward)
    check(result, oracle.gradients(model), expected)
    assert result.passes > 1 and len(waiting) == 2 * result.passes
    assert alive == [1] * result.passes  # of the layer that is not computed again


def test_order_of_rows_changes_nothing():
    model = oracle.tuned_model()
    prompts, completions, labels = oracle.random_rows(6)
    borrowed = [*completions[1:], completions[0]]
    expected = oracle.step(model, prompts, completions, borrowed, labels)
    order = [4, 2, 0, 5, 3, 1]
    turned = [[x[i] for i in order] for x in (prompts, completions, labels, borrowed)]
    group = Group(turned[0], turned[1], turned[3], torch.tensor(turned[2]), expected["reference"][order],
                  expected["kl_reference"][order])  # fmt: skip
    result, gradients = run(Engine(model), group)
    assert torch.allclose(result.logps.double(), expected["logps"][order], rtol=TIGHT)
    assert float(result.loss) == pytest.approx(expected["loss"], rel=TIGHT)
    assert oracle.worst(gradients, expected["gradients"]) < TIGHT


@pytest.mark.parametrize("labels", [[True] * 6, [False] * 6])
def test_a_batch_of_one_label_has_a_finite_loss_and_gradient(labels):
    model = oracle.tuned_model()
    prompts, completions, _ = oracle.random_rows(6)
    expected = oracle.step(model, prompts, completions, [*completions[1:], completions[0]], labels)
    result, gradients = run(Engine(model), group_of((prompts, completions, labels), expected))
    check(result, gradients, expected)
    assert all(g.isfinite().all() for g in gradients.values())


def test_loss_without_a_kl():
    model = oracle.tuned_model()
    rows = oracle.random_rows(6)
    prompts, completions, labels = rows
    expected = oracle.step(model, prompts, completions, completions, labels, kl=False)
    result, gradients = run(Engine(model), group_of(rows, expected, kl=False), loss_type="apo_zero_unpaired")
    check(result, gradients, expected)


def test_before_the_first_update_nothing_differs_from_the_reference():
    from peft import get_peft_model

    model = get_peft_model(oracle.base_model(), oracle.lora())
    rows = oracle.random_rows(6)
    engine = Engine(model)
    prompts, completions, _ = rows
    borrowed = [*completions[1:], completions[0]]
    with model.disable_adapter():
        reference, kl_reference = engine.score(prompts, completions), engine.score(prompts, borrowed)
    scored = {"reference": torch.tensor(reference), "kl_reference": torch.tensor(kl_reference)}
    result, _ = run(engine, group_of(rows, scored), desirable_weight=2.0)
    assert torch.allclose(result.logps.double(), scored["reference"], atol=1e-4)
    assert float(result.z0) < 1e-4
    assert float(result.loss) == pytest.approx(0.5 * np.mean([2.0 if y else 1.0 for y in rows[2]]), abs=1e-5)


@pytest.mark.parametrize("z0", [0.0, 0.7])
def test_the_loss_formula_in_float64(z0):
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(-40, 5, 9), rng.normal(-40, 5, 9)
    labels = [bool(i % 2) for i in range(9)]
    loss, slopes = oracle.kto(policy, reference, labels, z0, 0.3, 1.5, 0.8)
    x = torch.tensor(policy, requires_grad=True)
    ours = kto_losses(x, torch.tensor(reference), z0, torch.tensor(labels), 0.3, 1.5, 0.8).mean()
    ours.backward()
    assert ours.item() == pytest.approx(loss, rel=1e-12)
    assert x.grad.tolist() == pytest.approx(slopes, rel=1e-12)


@pytest.mark.parametrize("architecture", ["llama", "mistral with a window", "gemma3"])
def test_the_variable_length_call(monkeypatch, architecture):
    """The GPU's way, with its kernel's documented meaning written out: causal from the last key, heads grouped."""

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        out = []
        assert enable_gqa and max_q == int(cu_q.diff().max()) and max_k == int(cu_k.diff().max())
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        for (a, b), (c, d) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
            far = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
            seen = (far >= 0) & ((far <= window_size[0]) if window_size[0] >= 0 else True)
            scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale
            out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v[c:d]))
        return torch.cat(out)

    known = frozenset(("scale", "window_size", "enable_gqa"))
    monkeypatch.setattr(attention, "_varlen_serves", lambda query, value: True)
    monkeypatch.setattr(attention, "_varlen_function", lambda: (kernel, known))
    model = oracle.tuned_model(architecture)
    rows = oracle.random_rows(6)
    prompts, completions, labels = rows
    expected = oracle.step(model, prompts, completions, [*completions[1:], completions[0]], labels)
    for budget in (None, 70):
        result, gradients = run(Engine(model, budget, checkpoint_layers=1), group_of(rows, expected))
        check(result, gradients, expected, 1e-5)


# ---- the tree -------------------------------------------------------------------------------------------------------


def test_a_changed_branch_leaves_every_other_bit_equal():
    model = oracle.tuned_model("gemma2", torch.float32).eval()
    engine = Engine(model)
    prompts, completions, _ = oracle.random_rows(6)
    prompts = [prompts[0]] * 6
    before = engine.score(prompts, completions)
    changed = [c.copy() for c in completions]
    changed[2][:] = (changed[2] + 7) % 300
    after = engine.score(prompts, changed)
    assert before[2] != after[2]
    assert [a for i, a in enumerate(after) if i != 2] == [b for i, b in enumerate(before) if i != 2]


def test_packed_and_one_by_one_score_the_same():
    model = oracle.tuned_model("mistral with a window", torch.float32).eval()
    engine = Engine(model)
    prompts, completions, _ = oracle.random_rows(12, seed=4)
    together = engine.score(prompts, completions)
    alone = [engine.score([p], [c])[0] for p, c in zip(prompts, completions, strict=True)]
    in_parts = engine.score(prompts, completions, budget=70)
    with torch.no_grad():
        plain = [float(oracle.logp(model, p, c)) for p, c in zip(prompts, completions, strict=True)]
    for other in (alone, in_parts, plain):
        assert together == pytest.approx(other, rel=2e-6)


def test_tree_layout():
    a, b = np.arange(20, dtype=np.int32), np.arange(100, 112, dtype=np.int32)
    prompts = [np.concatenate([a, b[:3]]), np.concatenate([a, b[3:6]]), a]
    completions = [b, b[:1], np.concatenate([b[:9], b[:2]])]
    t = tree.build(prompts, completions)
    # shared starts once, also that of a prompt and another row's answer; the last completion tokens are no inputs
    assert len(t) == 20 + 3 + 11 + 3 + 0 + 7
    for i, (p, c) in enumerate(zip(prompts, completions, strict=True)):
        index = t.scores.index[t.scores.sequence == i]
        assert t.positions[index].tolist() == list(range(len(p) - 1, len(p) + len(c) - 1))
        assert t.ids[index].tolist() == [p[-1], *c[:-1]]  # the last prompt token predicts y_1
        assert t.scores.target[t.scores.sequence == i].tolist() == c.tolist()
    covered = np.concatenate([np.arange(x, y) for x, y in t.segments.queries])
    assert covered.tolist() == list(range(len(t)))


def test_equal_rows_are_computed_once():
    p, c = np.arange(10, dtype=np.int32), np.arange(30, 45, dtype=np.int32)
    assert len(tree.build([p, p], [c, c])) == len(tree.build([p], [c]))


def test_a_budget_is_kept():
    prompts, completions, _ = oracle.random_rows(20, seed=2)
    order = tree.sorted_by_prefix(prompts, completions, range(20))
    parts = tree.packs(prompts, completions, [0] * 20, order, 120)
    assert sorted(i for part in parts for i in part) == list(range(20))
    sizes = [len(tree.build([prompts[i] for i in part], [completions[i] for i in part])) for part in parts]
    assert max(sizes) <= 120 and len(parts) > 1


def test_passes_are_of_about_the_same_size():
    """No more of them than filling one after the other makes, and no small one at the end."""
    rows = [(np.arange(6, dtype=np.int32) + 100 * i, np.arange(5, dtype=np.int32)) for i in range(11)]  # 10 tokens each
    prompts, completions = zip(*rows, strict=True)
    assert [len(part) for part in tree.packs(prompts, completions, [0] * 11, range(11), 100)] == [6, 5]
    assert [len(part) for part in tree.packs(prompts, completions, [0] * 11, range(11), 40)] == [4, 4, 3]
    extra = [60, *[0] * 10]  # one that counts as much as seven
    parts = tree.packs(prompts, completions, extra, range(11), 100)
    assert [i for part in parts for i in part] == list(range(11))
    assert [sum(10 + extra[i] for i in part) for part in parts] == [90, 80]
    assert tree.packs(prompts, completions, [0] * 11, range(11), 5) == [[i] for i in range(11)]  # refused by callers


def test_prompt_keys_are_stored_once():
    """A recompute in the backward neither fills the store again nor finds another pass's keys in it."""
    model = oracle.tuned_model("llama", torch.float32)
    engine = Engine(model, checkpoint_layers=3)
    engine.model.train()
    prompts, completions, _ = oracle.random_rows(4)
    t = tree.build(prompts, completions)
    branches = tree.branch(t, completions[::-1])
    store = {}
    run_ = attention.Pass(t.segments, engine.device, keep=torch.as_tensor(branches.keep), store=store)
    with engine.using_tree():
        hidden = engine.forward(t.ids, t.positions, run_)
        kept = {layer: k.clone() for layer, (k, _) in store.items()}
        assert sorted(kept) == [0, 1, 2]
        run_.close()
        store.clear()
        hidden.sum().backward()
    assert store == {}
    assert not any(k.requires_grad for k in kept.values())


def test_the_model_is_left_as_it_was():
    model = oracle.tuned_model("gemma3")
    engine = Engine(model)
    before = engine.causal.config._attn_implementation
    with engine.using_tree():
        assert engine.causal.config._attn_implementation == attention.NAME
    assert engine.causal.config._attn_implementation == before == "eager"
    ids = torch.arange(5, 15)[None]
    assert model(input_ids=ids).logits.isfinite().all()
    with engine.using_tree(), pytest.raises(RuntimeError, match="kto_tree"):
        model(input_ids=ids)


# ---- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.3, None), (1.0, 2.0), (0.3, 2.0)])
@pytest.mark.parametrize("chunk", [2**26, 4 * 50 * 16])
def test_token_logps_and_their_gradient(monkeypatch, scale, softcap, chunk):
    monkeypatch.setitem(passes.CHUNK_BYTES, "cpu", chunk)
    torch.manual_seed(0)
    hidden = torch.randn(40, 12, dtype=torch.float64, requires_grad=True)
    head = Head(torch.randn(50, 12, dtype=torch.float64), torch.randn(50, dtype=torch.float64), scale, softcap)
    targets = torch.randint(0, 50, (40,))
    coefficients = torch.randn(40, dtype=torch.float64)
    scores = token_logps(head, hidden, targets, stats=True)
    (scores.logps * coefficients).sum().backward()
    ours, hidden.grad = hidden.grad, None
    z = (hidden @ head.weight.T + head.bias) * scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    table = z.log_softmax(-1)
    expected = table.gather(1, targets[:, None])[:, 0]
    (expected * coefficients).sum().backward()
    assert torch.allclose(scores.logps, expected, rtol=1e-12)
    assert torch.allclose(ours, hidden.grad, rtol=1e-9)
    assert torch.allclose(scores.entropy, -(table.exp() * table).sum(-1))
    assert torch.allclose(scores.mean_logits, z.mean(-1))


def test_log_sum_exp_is_fp32_for_bf16_models():
    torch.manual_seed(0)
    weight, hidden = torch.randn(4000, 32).bfloat16(), torch.randn(30, 32).bfloat16()
    head = Head(weight, None, 1.0, None)
    targets = torch.randint(0, 4000, (30,))
    logps = token_logps(head, hidden, targets).logps
    exact = (hidden @ weight.T).double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert logps.dtype == torch.float32
    assert float((logps - exact).abs().max()) < 1e-4  # bf16 would be off by 0.03
