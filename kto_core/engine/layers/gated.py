"""RMSNorm with a gate, ``weight * norm(x) * silu(gate)``, as recurrent layers have it: keeps its inputs only."""

from __future__ import annotations

import torch
import torch.nn.functional as F

HELD = {"cuda": 2**27, "cpu": 2**24}  # numbers of the input that are computed at once


def gated_norm(weight, eps, x, gate):
    """``[n, width]`` each, in the format of ``x``; weights are frozen."""
    return _GatedNorm.apply(weight, eps, x, gate)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, eps, x, gate):
        ctx.weight, ctx.eps = weight, eps
        ctx.save_for_backward(x, gate)
        with torch.autocast(x.device.type, enabled=False):
            return torch.cat([_normed(weight, eps, *part) for part in _parts(x, gate)])

    @staticmethod
    def backward(ctx, grad):
        grads = []
        with torch.autocast(grad.device.type, enabled=False):
            for x, gate, part in _parts(*ctx.saved_tensors, grad):
                inputs = x.detach().requires_grad_(), gate.detach().requires_grad_()
                with torch.enable_grad():
                    out = _normed(ctx.weight, ctx.eps, *inputs)
                grads.append(torch.autograd.grad(out, inputs, part))
        return None, None, *(torch.cat(parts) for parts in zip(*grads, strict=True))


def _parts(*tensors):
    rows = max(1, HELD["cuda" if tensors[0].is_cuda else "cpu"] // (8 * tensors[0].shape[-1]))
    return zip(*(t.split(rows) for t in tensors), strict=True)


def _normed(weight, eps, x, gate):
    wide = x.float()
    normed = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return (normed * F.silu(gate.float())).to(x.dtype)
