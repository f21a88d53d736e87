"""Layers that go along the sequence: in a packed pass each token has the state and the last inputs of its own path."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from kto_core.engine import probe
from kto_core.engine.group import Group, Objective
from kto_core.engine.layers import delta, recurrent
from kto_core.engine.packing import spans, tree
from kto_core.engine.step import Engine
from kto_core.errors import NotServed
from tests.support import oracle, recurrence

TIGHT = 2e-6
FAMILIES = ["qwen3_5", "olmo_hybrid", "lfm2"]


def ids(*numbers) -> np.ndarray:
    return np.array(numbers, np.int32)


def deep_rows():
    """Rows that part at every depth, whose pieces are longer and shorter than chunks and convolutions: prompts of one
    token, a prompt that ends inside of another row, completions of one token, equal rows."""
    rng = np.random.default_rng(5)
    path = rng.integers(3, 300, 150).astype(np.int32)
    prompts, completions = [ids(7), ids(7), ids(8, 9)], [rng.integers(3, 300, 5).astype(np.int32), ids(5), ids(4, 6)]
    for cut in (9, 20, 84, 85, 149):  # each parts from the path that the one before went on with
        prompts.append(path[:cut])
        completions.append(rng.integers(3, 300, 1 + cut % 12).astype(np.int32))
    prompts += [path[:20], path[:20], path[:84]]
    completions += [path[20:90], completions[4], ids(3)]
    return prompts, completions, [bool(i % 3) for i in range(len(prompts))]


def step(engine, group):
    engine.model.train()
    with engine.using_tree():
        result = engine.run(group, Objective(0.1), backward=lambda loss: loss.backward())
    return result, oracle.gradients(engine.model)


def mixture(dtype=torch.float64):
    """Qwen3-Next, which `available` refuses for its experts only."""
    settings = oracle.RECURRENT["qwen3_5"][1] | {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_next", **{**oracle.SIZES, **settings})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    model = get_peft_model(model.to(dtype), oracle.lora()).to(dtype)
    recurrence.remember(model)
    oracle.fill_adapter(model)
    return model


@pytest.mark.parametrize("budget, layers", [(None, 0), (None, 3), (170, 1)])
@pytest.mark.parametrize("architecture", [*FAMILIES, "qwen3_next"])
def test_a_deep_tree_is_what_its_rows_are_alone(architecture, budget, layers):
    model = mixture() if architecture == "qwen3_next" else oracle.tuned_model(architecture)
    prompts, completions, labels = deep_rows()
    borrowed = [*completions[2:], *completions[:2]]
    expected = oracle.step(model, prompts, completions, borrowed, labels)
    engine = Engine(model, budget, layers)
    group = Group(prompts, completions, borrowed, torch.tensor(labels), expected["reference"], expected["kl_reference"])
    result, gradients = step(engine, group)
    assert (result.passes > 1) == (budget is not None)
    assert float(result.loss) == pytest.approx(expected["loss"], rel=TIGHT)
    assert float(result.z0) == pytest.approx(expected["z0"], rel=TIGHT, abs=1e-6)
    assert torch.allclose(result.logps.double(), expected["logps"], rtol=TIGHT)
    assert oracle.worst(gradients, expected["gradients"]) < 1e-5


@pytest.mark.parametrize("architecture", FAMILIES)
def test_transformers_own_function_says_the_same_in_float32(architecture):
    model = oracle.tuned_model(architecture, torch.float32).train()
    prompts, completions, _ = deep_rows()
    together = Engine(model).score(prompts, completions)
    with torch.no_grad():
        alone = [float(oracle.logp(model, p, c)) for p, c in zip(prompts, completions, strict=True)]
    assert together == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_state_of_a_row_does_not_reach_another(architecture):
    engine = Engine(oracle.tuned_model(architecture, torch.float32).eval())
    prompts, completions, _ = oracle.random_rows(6)
    for same in (prompts, [prompts[0]] * 6):
        changed = [c.copy() for c in completions]
        changed[2][:] = (changed[2] + 7) % 300
        before, after = engine.score(same, completions), engine.score(same, changed)
        assert before[2] != after[2]
        others = np.arange(6) != 2
        assert (before[others] == after[others]).all()
    other = [p.copy() for p in prompts]
    other[5][:] = (other[5] + 7) % 300  # another prompt, too: the tree changes its shape
    assert engine.score(other, completions)[:5] == pytest.approx(engine.score(prompts, completions)[:5], rel=1e-6)


def test_what_is_kept_of_a_prompt_is_its_end_only():
    """Kept once, without gradient, and not filled again by a recompute."""
    engine = Engine(oracle.tuned_model("qwen3_5", torch.float32), checkpoint_layers=3)
    engine.model.train()
    prompts, completions, _ = oracle.random_rows(5)  # two of the prompts are equal
    t = tree.build(prompts, completions)
    with engine.using_tree():
        hidden, store = engine.hidden(t, tree.branch(t, completions[::-1]))
        assert {k for k in store if not isinstance(k, int)} == {(n, i) for n in ("inputs", "state") for i in (0, 2)}
        (states,), (inputs,) = store["state", 0], store["inputs", 0]
        assert states.shape == (4, 4, 8, 8) and inputs.shape == (4 * 3, 64)
        assert not states.requires_grad and not inputs.requires_grad
        kept = {k: v[0].clone() for k, v in store.items()}
        hidden.sum().backward()
    assert all(torch.equal(v, store[k][0]) for k, v in kept.items())


# ---- the cut into spans, lines and chunks ----------------------------------------------------------------------------


def paths(t: tree.Tree):
    """Of each token, the packed indices of its ancestors and itself, oldest first."""
    result = []
    for i in range(len(t)):
        node = t.segments.q_node[i]
        seen = t.segments.seen[node][t.segments.k_node] & (t.segments.k_pos <= t.positions[i])
        result.append(np.flatnonzero(seen)[np.argsort(t.positions[seen])])
    return result


@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_before_every_token_are_its_own_last_ancestors(width):
    prompts, completions, _ = deep_rows()
    t = tree.build(prompts, completions)
    found = spans.lines(t.segments.spans, width)
    for i, path in enumerate(paths(t)):
        wanted = [*[len(t)] * width, *path][-width:]  # a row of zeros is before the first
        place = found.place[i]
        assert found.rows[place - width + 1 : place + 1].tolist() == wanted
    assert (found.rows[found.copies] == found.copied).all()
    assert sorted([*found.place, *found.copies]) == np.flatnonzero(found.rows < len(t)).tolist()
    ends = t.segments.spans.bounds[:, 1] - 1
    if width > 1:
        assert found.tails[:, -1].tolist() == ends.tolist()
    assert width == 1 or len(found.rows) < len(t) + (width - 1) * len(t.nodes)  # only where the line breaks


@pytest.mark.parametrize("length", [None, 1, 3, 16, 64])
def test_every_token_is_in_one_chunk_and_follows_its_parent(length):
    prompts, completions, _ = deep_rows()
    t = tree.build(prompts, completions)
    found = spans.chunks(t.segments.spans, length)
    assert sorted(found.tokens[found.full]) == list(range(len(t)))
    assert (found.tokens.flatten()[found.place] == np.arange(len(t))).all()
    before = {}
    for depth, (a, b) in enumerate(found.levels):
        for chunk in range(a, b):
            parent = found.parents[chunk]
            assert (parent == -1) == (depth == 0)
            above = before[found.levels[depth - 1][0] + parent] if depth else []
            before[chunk] = [*above, *found.tokens[chunk][found.full[chunk]].tolist()]
    for s, (_, end) in enumerate(t.segments.spans.bounds):
        assert before[found.last[s]] == paths(t)[end - 1].tolist()


@pytest.mark.parametrize("held", [1, 2**30])
@pytest.mark.parametrize("normalized", [True, False])
def test_the_rule_against_its_formula(monkeypatch, held, normalized):
    """Two paths of one tree, from kept states; some heads at a time or all at once."""
    monkeypatch.setitem(delta.RECURRENCE, "cpu", held)
    torch.manual_seed(0)
    bounds = np.array([[0, 70], [70, 75], [75, 200]])
    found = spans.Spans(bounds, np.array([-1, 0, 0]), np.array([1, -1, -1]))
    q, k = (torch.randn(1, 200, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn(1, 200, 3, 5, dtype=torch.float64, requires_grad=True)
    g = (-torch.rand(1, 200, 3, dtype=torch.float64) / 10).requires_grad_()
    beta = torch.rand(1, 200, 3, dtype=torch.float64).div(1 if normalized else 9).requires_grad_()
    wanted, given = torch.randn(1, 200, 3, 5, dtype=torch.float64), (q, k, v, g, beta)
    started = torch.randn(2, 40, 3, 8, dtype=torch.float64), torch.randn(2, 40, 3, 5, dtype=torch.float64)
    initial = torch.einsum("ethk,ethv->ehkv", *started) / 40

    plan = delta.plan_of(spans.chunks(found), "cpu")
    ends = torch.tensor([2, 0])
    out, states = delta.gated_delta(plan, *given, normalized=normalized, initial=initial, ends=ends)
    ours = torch.autograd.grad(out, given, wanted)

    answers, last = torch.zeros_like(out), []
    for start, end in ((70, 75), (75, 200)):
        path = [t[:, [*range(70), *range(start, end)]] for t in given]
        one, state = recurrence.gated_delta_rule(
            *path[:3], g=path[3], beta=path[4], use_qk_l2norm_in_kernel=normalized, initial_state=initial[1:]
        )
        answers[:, start:end], answers[:, :70] = one[:, 70:], one[:, :70]
        last.append(state)
    assert torch.allclose(out, answers, rtol=1e-9, atol=1e-11) and torch.allclose(states[0], last[1][0])
    for mine, theirs in zip(ours, torch.autograd.grad(answers, given, wanted), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-10)


# ---- fast kernels ----------------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    """flash-linear-attention's function, with what its documentation says of it written out; counts its calls."""
    calls = []

    def chunk_gated_delta_rule(
        q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
        cu_seqlens=None,
    ):  # fmt: skip
        calls.append(len(cu_seqlens) - 1)
        assert q.shape[0] == 1 and (initial_state is None or len(initial_state) == len(cu_seqlens) - 1)
        assert cu_seqlens.dtype == torch.long and output_final_state and use_qk_l2norm_in_kernel
        outs, states = [], []
        for i, (a, b) in enumerate(cu_seqlens.unfold(0, 2, 1).tolist()):
            out, state = recurrence.gated_delta_rule(
                q[:, a:b], k[:, a:b], v[:, a:b], g=g[:, a:b], beta=beta[:, a:b], use_qk_l2norm_in_kernel=True,
                initial_state=None if initial_state is None else initial_state[i : i + 1],
            )  # fmt: skip
            outs.append(out)
            states.append(state)
        return torch.cat(outs, 1), torch.cat(states)

    monkeypatch.setattr(recurrent, "fast_rule", lambda: chunk_gated_delta_rule)
    monkeypatch.setattr(recurrent, "_fast_serves", lambda query: True)
    return calls


@pytest.mark.parametrize("budget", [None, 170])
def test_fast_kernels_are_called_once_for_each_depth(kernels, budget):
    model = oracle.tuned_model("qwen3_5")
    prompts, completions, labels = deep_rows()
    borrowed = [*completions[2:], *completions[:2]]
    expected = oracle.step(model, prompts, completions, borrowed, labels)
    group = Group(prompts, completions, borrowed, torch.tensor(labels), expected["reference"], expected["kl_reference"])
    result, gradients = step(Engine(model, budget, 1), group)
    assert torch.allclose(result.logps.double(), expected["logps"], rtol=TIGHT)
    assert float(result.z0) == pytest.approx(expected["z0"], rel=TIGHT, abs=1e-6)
    assert oracle.worst(gradients, expected["gradients"]) < 1e-5
    depths = 1 + tree.build(prompts, completions).segments.spans.depths().max()
    assert budget or len(kernels) == 2 * (depths + 1) + depths  # two layers; y' are one depth; one is computed again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_comparison_in_float32_does_without_kernels(monkeypatch, dtype):
    """They take half precision on a GPU only; transformers calls them in any case where they are installed."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as code

    calls = []

    def instead_of(theirs):
        @functools.wraps(theirs.__wrapped__)
        def kernel(x, *args, **kwargs):
            calls.append(x.dtype)
            assert x.dtype == torch.bfloat16, "the kernel does not take this format"
            return theirs(x, *args, **kwargs)

        return kernel

    for name in (recurrent.RULE, recurrent.CONVOLUTION):
        monkeypatch.setattr(code, name, instead_of(getattr(code, name)))
    model = oracle.base_model("qwen3_5")
    recurrence.remember(model)
    engine = Engine(get_peft_model(model.to(dtype), oracle.lora()))
    probe.check_head_and_attention(engine, np.arange(3, 40, dtype=np.int32))
    assert set(calls) == ({torch.bfloat16} if dtype == torch.bfloat16 else set())


# ---- the comparison before the first step ----------------------------------------------------------------------------


def states_from_nowhere(monkeypatch):
    monkeypatch.setattr(delta, "_first", lambda *_: None)


def states_of_the_last(monkeypatch):
    true = spans.chunks

    def chunks(found, length=None):
        return true(replace(found, parents=np.arange(-1, len(found) - 1)), length)

    monkeypatch.setattr(spans, "chunks", chunks)


def lines_through(monkeypatch):
    true = spans.lines

    def lines(found, *rest):
        return true(replace(found, parents=np.arange(-1, len(found) - 1)), *rest)

    monkeypatch.setattr(spans, "lines", lines)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", [None, states_from_nowhere, states_of_the_last, lines_through])
def test_the_comparison_finds_a_leak(monkeypatch, fault, dtype):
    model = oracle.base_model("qwen3_5")
    recurrence.remember(model)
    engine = Engine(get_peft_model(model.to(dtype), oracle.lora()))
    prompt = np.random.default_rng(0).integers(3, 300, 30).astype(np.int32)
    if fault is None:
        probe.check_head_and_attention(engine, prompt)
        return
    fault(monkeypatch)
    with pytest.raises(NotServed, match="does not reproduce"):
        probe.check_head_and_attention(engine, prompt)
