"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464) along a prefix tree, in torch alone.

A head's state S, ``[K, V]``, goes down every path of the tree: ``S <- exp(g) S``, ``S <- S + beta k (v - S^T k)^T``,
and each token's answer is ``S^T q``. The tree is cut into chunks (`packing.spans`). What happens inside of a chunk does
not depend on the state before it and is computed for all chunks at once; then the states go down depth by depth, from
each chunk to those that follow it.

Only q, k, v, g and beta are kept for the backward, which computes the rest again, some heads at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kto_core.engine.packing import spans
from kto_core.engine.packing.passes import RECURRENCE

COPIES = 8  # numbers held for each one of a chunk's keys, values, products and states, gradients included


@dataclass
class Plan:
    """`spans.Chunks` on a device. ``steps[d]``: of each chunk of depth d + 1, its parent's number at depth d; None: the
    same number. ``kept``: at depth 0, the kept end that a chunk continues, the last + 1 for none."""

    tokens: torch.Tensor
    full: torch.Tensor
    place: torch.Tensor
    sizes: list[int]
    steps: list[torch.Tensor | None]
    kept: torch.Tensor
    last: torch.Tensor


def plan_of(found: spans.Chunks, device) -> Plan:
    def there(array):
        return torch.as_tensor(array, device=device)

    sizes = [b - a for a, b in found.levels]
    steps: list[torch.Tensor | None] = []
    for (a, b), before in zip(found.levels[1:], sizes, strict=False):
        parents = found.parents[a:b].tolist()
        steps.append(None if parents == list(range(before)) else there(parents))
    kept = found.parents[: sizes[0]]
    return Plan(
        there(found.tokens), there(found.full), there(found.place), sizes, steps, there(kept), there(found.last)
    )


def gated_delta(plan: Plan, q, k, v, g, beta, *, normalized: bool, initial=None, ends=None):
    """The answers ``[1, T, H, V]`` in the format of ``q`` and, detached, the states after the spans ``ends``
    ``[e, H, K, V]`` (None without).

    Args:
        q, k: ``[1, T, H, K]``. v: ``[1, T, H, V]``. g, beta: ``[1, T, H]``.
        normalized: q and k are first brought to length 1.
        initial: states that the first chunks continue, ``[kept, H, K, V]``; no gradient goes to them.
    """
    out, states = _Delta.apply(plan, normalized, initial, ends, q, k, v, g, beta)
    return out, states if ends is not None else None


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, normalized, initial, ends, *given):
        ctx.plan, ctx.normalized, ctx.initial = plan, normalized, initial
        ctx.save_for_backward(*given)
        q, _, v = given[:3]
        out, states = torch.empty(v.shape, dtype=q.dtype, device=v.device), []
        with torch.autocast(v.device.type, enabled=False):
            for heads in _parts(plan, q, v):
                start = None if initial is None else initial[:, heads]
                answers, final = _along(plan, *_chunked(plan, given, heads), normalized, start, ends)
                out[0, :, heads] = _flat(plan, answers).to(out.dtype)
                states.append(final)
        ends = torch.cat(states, 1) if ends is not None else v.new_empty(0)
        ctx.mark_non_differentiable(ends)
        return out, ends

    @staticmethod
    def backward(ctx, grad, _):
        plan, given = ctx.plan, ctx.saved_tensors
        grads = [torch.empty_like(t) for t in given]
        with torch.autocast(grad.device.type, enabled=False):
            for heads in _parts(plan, given[0], given[2]):
                inputs = [t.requires_grad_() for t in _chunked(plan, given, heads)]
                start = None if ctx.initial is None else ctx.initial[:, heads]
                with torch.enable_grad():
                    answers, _ = _along(plan, *inputs, ctx.normalized, start, None)
                wanted = answers.new_zeros(plan.tokens.numel(), answers.shape[1], answers.shape[3])
                wanted[plan.place] = grad[0, :, heads].to(wanted.dtype)
                wanted = wanted.view(*plan.tokens.shape, *wanted.shape[1:]).transpose(1, 2)
                for whole, part in zip(grads, torch.autograd.grad(answers, inputs, wanted), strict=True):
                    whole[0, :, heads] = _flat(plan, part).to(whole.dtype)
        return None, None, None, None, *grads


def _parts(plan: Plan, q, v) -> list[slice]:
    """Heads that are computed at once."""
    heads, chunks, length = v.shape[2], *plan.tokens.shape
    wide, high = q.shape[-1], v.shape[-1]
    numbers = chunks * (length * (wide + high + length) + wide * high)
    one = COPIES * numbers * (8 if v.dtype == torch.float64 else 4)
    count = max(1, min(heads, RECURRENCE["cuda" if v.is_cuda else "cpu"] // one))
    return [slice(a, min(a + count, heads)) for a in range(0, heads, count)]


def _chunked(plan: Plan, given, heads: slice) -> list[torch.Tensor]:
    """``[1, T, H, ...]`` -> ``[chunks, heads, length, ...]``; where a chunk is not full, nothing decays or is added."""
    dtype = torch.float64 if given[2].dtype == torch.float64 else torch.float32
    result = []
    for t in given:
        rows = t[0, :, heads].index_select(0, plan.tokens.flatten()).to(dtype)
        result.append(rows.view(*plan.tokens.shape, *rows.shape[1:]).transpose(1, 2).contiguous())
    for gate in result[3:]:
        gate.mul_(plan.full[:, None])
    return result


def _flat(plan: Plan, chunked) -> torch.Tensor:
    """``[chunks, heads, length, ...]`` -> ``[T, heads, ...]``."""
    return chunked.transpose(1, 2).flatten(0, 1).index_select(0, plan.place)


def _along(plan: Plan, q, k, v, g, beta, normalized: bool, initial, ends):
    """Answers of all chunks, and the states after the spans ``ends``."""
    if normalized:
        q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    q = q * q.shape[-1] ** -0.5
    decay = g.cumsum(-1)  # from the start of the chunk
    so_far, to_end = decay.exp()[..., None], (decay[..., -1:] - decay).exp()[..., None]
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(later, float("-inf")).exp()
    weighted = k * beta[..., None]
    # each token's change depends on those before it in its chunk: a triangular system
    system = (weighted @ k.transpose(-1, -2)) * between
    both = torch.cat([v * beta[..., None], weighted * so_far], -1)
    both = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
    change, read = both.split([v.shape[-1], k.shape[-1]], -1)
    inside = (q @ k.transpose(-1, -2)) * between

    parts = (t.split(plan.sizes) for t in (change, read, q * so_far, k * to_end, decay[..., -1].exp()[..., None, None]))
    state = _first(plan, initial, v)
    changes, answers, states = [], [], []
    for depth, (new, old, asks, keys, forget) in enumerate(zip(*parts, strict=True)):
        if depth and (step := plan.steps[depth - 1]) is not None:
            state = state.index_select(0, step)
        if state is not None:
            new = new - old @ state
            answers.append(asks @ state)
            state = state * forget + keys.transpose(-1, -2) @ new
        else:
            answers.append(torch.zeros_like(new))
            state = keys.transpose(-1, -2) @ new
        changes.append(new)
        if ends is not None:
            states.append(state)
    out = torch.cat(answers) + inside @ torch.cat(changes)
    return out, torch.cat(states).index_select(0, plan.last[ends]) if ends is not None else None


def _first(plan: Plan, initial, v):
    """States before the chunks of depth 0; None: all nothing."""
    if initial is None:
        return None
    found = initial.to(v.dtype).index_select(0, plan.kept.clamp(min=0))
    return found * (plan.kept >= 0)[:, None, None, None]
