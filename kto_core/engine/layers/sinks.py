"""Attention sinks (gpt-oss) in one variable-length FlashAttention call, whose kernel knows none.

A sink is a logit ``s`` that takes weight and has no value. With the kernel's answer ``o`` and its log-sum-exp ``l`` of
a query's scores, ``l' = log(e^l + e^s)`` is the sum with the sink and ``o' = o e^(l - l')`` the answer. The kernel's
backward makes its weights anew as ``e^(score - l)`` and takes ``o`` only for ``sum(grad o)``, the mean of what a weight
is worth; given ``l'`` and ``o'`` in their place it returns the exact gradients, since a sink's value is zero.
"""

from __future__ import annotations

import functools
import logging

import torch

logger = logging.getLogger(__name__)

WINDOWS = ((-1, 0), (15, 0))  # of the trial


def _operators():
    """torch's own below `varlen_attn`, which does not let its backward be given other sums."""
    import torch.nn.attention.varlen  # noqa: F401  (registers them)

    return torch.ops.torch_attn


def _forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, window):
    """(answers ``[T, H, D]``, log-sum-exps ``[H, T]`` float32, the kernel's random state)."""
    grouped = (True,) if k.shape[1] != q.shape[1] else ()  # torch 2.11 neither knows nor is given such heads
    return _operators()._varlen_attn(
        q, k, v, cu_q, cu_k, max_q, max_k, window == (-1, 0), scale, list(window), *grouped
    )  # fmt: skip


def _backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, state, scale, window):
    return _operators()._varlen_attn_backward(
        grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, window == (-1, 0), state, scale, list(window)
    )  # fmt: skip


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, *how):
        out, lse, state = _forward(q, k, v, *how)
        total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out = (out * (lse - total).exp().t()[..., None]).to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, total, state)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, sinks, out, total, state = ctx.saved_tensors
        cu_q, cu_k, max_q, max_k, scale, window = ctx.how
        grad = grad.contiguous()
        grads = _backward(grad, q, k, v, out, total, cu_q, cu_k, max_q, max_k, state, scale, window)
        grad_sinks = None
        if ctx.needs_input_grad[3]:
            mean = (grad.to(total.dtype) * out).sum(-1).t()
            grad_sinks = -((sinks.to(total.dtype)[:, None] - total).exp() * mean).sum(1).to(sinks.dtype)
        return *grads, grad_sinks, *[None] * len(ctx.how)


def attend(q, k, v, cu_q, cu_k, max_q: int, max_k: int, scale: float, window: tuple[int, int], sinks) -> torch.Tensor:
    """`varlen_attn`'s arguments, heads of keys and values grouped where its version allows it; ``sinks``: ``[H]``."""
    return _Attend.apply(q, k, v, sinks, cu_q, cu_k, max_q, max_k, scale, window)


@functools.cache
def serve(device: torch.device, dtype: torch.dtype, width: int, heads: int, kv_heads: int) -> bool:
    """Whether answers and gradients are `sink_attention`'s here: the operators are not torch's public interface."""
    own = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda t: t)  # none of a recomputed layer's
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False), own:
            if all(_agrees(device, dtype, width, heads, kv_heads, window) for window in WINDOWS):
                return True
            why = "its results are different"
    except (RuntimeError, TypeError, ValueError, AttributeError, ImportError) as e:
        why = str(e).partition("\n")[0][:200]
    logger.warning(
        "Attention sinks run in separate calls here, which is slower. The fused call is not available: %s", why
    )
    return False


def _agrees(device, dtype, width: int, heads: int, kv_heads: int, window: tuple[int, int]) -> bool:
    from kto_core.models.experts.gpt_oss import sink_attention

    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(*size, generator=generator).to(device, dtype).requires_grad_()

    ends, scale = [0, 40, 64], width**-0.5
    q, k, v, sinks = random(64, heads, width), random(64, kv_heads, width), random(64, kv_heads, width), random(heads)
    grad = torch.randn(64, heads, width, generator=generator).to(device, dtype)
    cu = torch.tensor(ends, dtype=torch.int32, device=device)
    ours = attend(q, k, v, cu, cu, 40, 40, scale, window, sinks)
    far = torch.arange(64)[:, None] - torch.arange(64)
    seen = (far >= 0) & (torch.arange(64)[:, None] // 40 == torch.arange(64) // 40)
    if window[0] >= 0:
        seen &= far <= window[0]
    given = (t.transpose(0, 1)[None] for t in (q, k, v))
    theirs = sink_attention(None, *given, seen[None, None].to(device), scale, sinks)[0][0]
    wanted = (q, k, v, sinks)
    pairs = [(ours, theirs), *zip(*(torch.autograd.grad(o, wanted, grad) for o in (ours, theirs)), strict=True)]
    close = 1e-3 if dtype in (torch.float32, torch.float64) else 3e-2
    return all(torch.dist(a.double(), b.double()) <= close * b.double().norm() for a, b in pairs)
