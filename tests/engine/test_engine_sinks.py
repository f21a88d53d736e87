"""Sinks in the variable-length call: exact, with the kernel's documented meaning written out."""

import numpy as np
import pytest
import torch

from kto_core.engine.layers import attention, sinks
from kto_core.engine.packing import tree
from kto_core.models.experts.gpt_oss import sink_attention

CPU = torch.device("cpu")


def weights(q, k, cu_q, cu_k, scale, window, lse=None):
    """For each segment (its queries, its keys, its weights ``[H, q, k]`` by ``lse``, the log-sum-exps)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    for (a, b), (c, d) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
        far = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        seen = (far >= 0) & ((far <= window[0]) if window[0] >= 0 else True)
        scores = (torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale).masked_fill(~seen, -torch.inf)
        sums = scores.logsumexp(-1) if lse is None else lse[:, a:b]
        yield slice(a, b), slice(c, d), (scores - sums[..., None]).exp(), sums


def forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, window):
    out, sums, wide = [], [], v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    assert max_q == int(cu_q.diff().max()) and max_k == int(cu_k.diff().max())
    for _, keys, weight, lse in weights(q, k, cu_q, cu_k, scale, window):
        out.append(torch.einsum("hqk,khd->qhd", weight, wide[keys]))
        sums.append(lse)
    return torch.cat(out), torch.cat(sums, 1), torch.empty(0)


def backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, state, scale, window):
    """As FlashAttention does it: weights from the scores and the sums, `out` for its product with the gradient."""
    groups = q.shape[1] // k.shape[1]
    wide_k, wide_v = (t.repeat_interleave(groups, 1) for t in (k, v))
    grad_q, grad_k, grad_v = (torch.zeros_like(t) for t in (q, wide_k, wide_v))
    mean = (grad * out).sum(-1).t()
    for queries, keys, weight, _ in weights(q, k, cu_q, cu_k, scale, window, lse):
        grad_v[keys] += torch.einsum("hqk,qhd->khd", weight, grad[queries])
        worth = torch.einsum("qhd,khd->hqk", grad[queries], wide_v[keys])
        grad_scores = weight * (worth - mean[:, queries, None]) * scale
        grad_q[queries] += torch.einsum("hqk,khd->qhd", grad_scores, wide_k[keys])
        grad_k[keys] += torch.einsum("hqk,qhd->khd", grad_scores, q[queries])
    return grad_q, *(t.unflatten(1, (k.shape[1], groups)).sum(2) for t in (grad_k, grad_v))


@pytest.fixture
def kernel(monkeypatch):
    sinks.serve.cache_clear()
    monkeypatch.setattr(sinks, "_forward", forward)
    monkeypatch.setattr(sinks, "_backward", backward)
    yield
    sinks.serve.cache_clear()


@pytest.mark.parametrize("window", sinks.WINDOWS)
def test_values_and_gradients_are_exact(kernel, window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, h, 8, dtype=torch.float64, requires_grad=True) for n, h in ((9, 4), (14, 2), (14, 2)))
    s = torch.randn(4, dtype=torch.float64, requires_grad=True)
    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32) for c in ([0, 5, 9], [0, 7, 14]))

    def ours(q, k, v, s):
        return sinks.attend(q, k, v, cu_q, cu_k, 5, 7, 0.3, window, s)

    assert torch.autograd.gradcheck(ours, (q, k, v, s))
    found, expected = ours(q, k, v, s), []
    for a, b, c, d in ((0, 5, 0, 7), (5, 9, 7, 14)):
        far = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        seen = (far >= 0) & ((far <= window[0]) if window[0] >= 0 else True)
        given = (t[i:j].transpose(0, 1)[None] for t, i, j in ((q, a, b), (k, c, d), (v, c, d)))
        expected.append(sink_attention(None, *given, seen[None, None], 0.3, s)[0][0])
    assert torch.allclose(found, torch.cat(expected))


def test_a_trial_decides(kernel, monkeypatch, caplog):
    """It also runs inside of a recomputed layer, whose saved tensors it must not add to."""
    how = (CPU, torch.float64, 16, 4, 2)
    kept = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        assert sinks.serve(*how)
    assert not kept
    for name, wrong in (
        ("_forward", lambda *a: (forward(*a)[0], forward(*a)[1] + 0.1, torch.empty(0))),
        ("_backward", lambda *a: tuple(g * 1.1 for g in backward(*a))),
    ):
        with monkeypatch.context() as m:
            m.setattr(sinks, name, wrong)
            sinks.serve.cache_clear()
            assert not sinks.serve(*how)
    monkeypatch.setattr(sinks, "_forward", lambda *a: (_ for _ in ()).throw(RuntimeError("no such kernel")))
    sinks.serve.cache_clear()
    assert not sinks.serve(*how)
    assert [m.rpartition(": ")[2] for m in caplog.messages] == ["its results are different"] * 2 + ["no such kernel"]


def test_without_a_card_the_operators_are_there_and_do_not_serve():
    """Their names and arguments, which are not torch's public interface; what they compute needs a card."""
    sinks.serve.cache_clear()
    ops = sinks._operators()
    names = [a.name for a in ops._varlen_attn.default._schema.arguments]
    assert names[:11] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "is_causal", "scale",
                          "window_size", "enable_gqa"]  # fmt: skip
    names = [a.name for a in ops._varlen_attn_backward.default._schema.arguments]
    assert names == ["grad_out", "query", "key", "value", "out", "lse", "cu_seq_q", "cu_seq_k", "max_q", "max_k",
                     "is_causal", "rng_state", "scale", "window_size"]  # fmt: skip
    assert not sinks.serve(CPU, torch.bfloat16, 64, 8, 2)


@pytest.mark.parametrize("known", [("scale", "window_size", "enable_gqa"), ("scale", "window_size")])
@pytest.mark.parametrize("window", [None, 3])
def test_a_pass_attends_with_sinks_as_masked_calls_do(kernel, monkeypatch, window, known):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 9, n).astype(np.int32) for n in (4, 4, 6)]
    prompts[1] = prompts[0]
    answers = [rng.integers(0, 9, n).astype(np.int32) for n in (5, 3, 4)]
    t = tree.build(prompts, answers)
    torch.manual_seed(0)
    q = torch.randn(1, 4, len(t), 8, dtype=torch.float64)
    k, v = (torch.randn(1, 2, len(t), 8, dtype=torch.float64) for _ in range(2))
    s, module = torch.randn(4, dtype=torch.float64), torch.nn.Module()
    module.layer_idx = 0
    found, calls = [], []
    monkeypatch.setattr(attention, "_varlen_function", lambda: (None, frozenset(known)))
    monkeypatch.setattr(sinks, "_forward", lambda *a: calls.append(a[1].shape[1]) or forward(*a))
    for serves in (False, True):
        monkeypatch.setattr(attention, "_varlen_serves", lambda query, value, serves=serves: serves)
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        run = attention.Pass(t.segments, CPU)
        out, _ = attention.tree_attention(module, *given, None, 0.3, window, kto_tree=run, s_aux=s)
        out.square().sum().backward()
        found.append([out, *(x.grad for x in given)])
    for masked, ours in zip(*found, strict=True):
        assert torch.allclose(masked, ours, atol=1e-6)  # a shared key's gradients are added in float32
    assert calls[-1] == (2 if "enable_gqa" in known else 4)
