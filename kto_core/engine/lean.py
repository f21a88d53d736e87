"""Leaner layers for the packed step: the same numbers from fewer kernels, and less kept for the backward.

`lean_forwards` finds what can be replaced in a model and `use` replaces it for the length of a block:

- LoRA projections: one autograd function instead of PEFT's chain. It keeps its input only, takes the frozen weight out
  of its 4 bits when it is needed, and adds the adapter's part inside a matrix product.
- SwiGLU: the product of gate and up is made again in the backward instead of being kept.
- RMSNorm: torch's own, which keeps its input instead of float32 copies of it.

Anything that is not known for sure (dropout, DoRA, several adapters, another activation) keeps its own forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

Forwards = list[tuple[torch.nn.Module, Callable]]


def lean_forwards(decoder: torch.nn.Module) -> Forwards:
    """(module, forward) of all layers of ``decoder`` that have a leaner forward which gives the same result."""
    found: Forwards = []
    checked: dict[tuple, bool] = {}
    inside: set[int] = set()  # projections that run as a part of their SwiGLU
    for module in decoder.modules():
        forward = _lean(module)
        if forward is None or id(module) in inside:
            continue
        kind = (type(module), type(getattr(module, "base_layer", None)), forward.func)
        if kind not in checked:
            checked[kind] = _agrees(module, forward)
        if checked[kind]:
            found.append((module, forward))
            if forward.func is _swiglu:
                inside.add(id(module.down_proj))
    return found


@contextlib.contextmanager
def use(forwards: Forwards) -> Iterator[None]:
    """Inside, the modules run these forwards. Blocks may be nested."""
    before = [(module, module.__dict__.get("forward")) for module, _ in forwards]
    try:
        for module, forward in forwards:
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward in before:
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


# ---- what is replaced ------------------------------------------------------------------------------------------------


def _lean(module) -> partial | None:
    if _is_projection(module) and hasattr(module, "lora_A"):
        return partial(_projection, module)
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        weight = module.weight
        return partial(_rms_norm, weight, module.variance_epsilon) if weight.ndim == 1 else None
    if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        known = type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")
        return partial(_swiglu, module) if known and _is_projection(module.down_proj) else None
    return None


def _is_projection(module) -> bool:
    """A frozen linear layer, plain or in 4 bits, alone or below one plain LoRA adapter."""
    base = getattr(module, "base_layer", module)
    name = type(base).__name__
    if not (type(base) is torch.nn.Linear or (name == "Linear4bit" and getattr(base.weight, "quant_state", None))):
        return False
    if any(p.requires_grad for p in base.parameters()):
        return False
    if name == "Linear4bit" and tuple(base.weight.quant_state.shape) != (base.out_features, base.in_features):
        return False
    if base is module:
        return True
    if not hasattr(module, "lora_A") or len(module.lora_A) != 1 or module.merged:
        return False
    (adapter,) = module.lora_A
    return (
        list(module.active_adapters) == [adapter]
        and isinstance(module.lora_dropout[adapter], torch.nn.Identity)
        and type(module.lora_A[adapter]) is torch.nn.Linear
        and module.lora_A[adapter].bias is None
        and module.lora_B[adapter].bias is None
        and not getattr(module, "lora_variant", None)
        and not getattr(module, "fan_in_fan_out", False)
    )


@torch.no_grad()
def _agrees(module, forward) -> bool:
    """Whether both forwards give the same for a few random inputs (an architecture may do more than its names say)."""
    first = getattr(module, "gate_proj", module)
    weight = next(module.parameters())
    width = getattr(getattr(first, "base_layer", first), "in_features", weight.shape[-1])
    known = {torch.float32, torch.float64, torch.bfloat16, torch.float16}
    dtypes = [p.dtype for p in module.parameters() if p.dtype in known and not p.requires_grad]
    base = getattr(getattr(module, "down_proj", module), "base_layer", None)
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    four_bits = state is not None
    dtype = (base.compute_dtype or state.dtype) if four_bits else dtypes[0] if dtypes else torch.float32
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, width, generator=generator).to(weight.device, dtype)
    theirs, ours = module(x).double(), forward(x).double()
    scale = float(theirs.norm()) or 1.0
    return float((theirs - ours).norm()) / scale < (1e-4 if dtype in (torch.float32, torch.float64) else 2e-2)


# ---- forwards --------------------------------------------------------------------------------------------------------


def _rms_norm(weight, eps, x):
    if x.dtype != weight.dtype:  # transformers' answer then has the wider format
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        return weight * normed.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):  # it would widen the input
        return F.rms_norm(x, weight.shape, weight, eps)


def _projection(layer, x, *_, **__):
    return _apply(layer, x, None)


def _swiglu(mlp, x):
    return _apply(mlp.down_proj, mlp.up_proj(x), mlp.gate_proj(x))


def _apply(layer, x, gate):
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, gate = x.to(dtype), gate if gate is None else gate.to(dtype)
    base = getattr(layer, "base_layer", layer)
    if base is layer or layer.disable_adapters:
        return _Projection.apply(x, gate, base, None, None, 0.0)
    (adapter,) = layer.lora_A
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return _Projection.apply(x, gate, base, a, b, layer.scaling[adapter])


def dense(base, dtype) -> torch.Tensor:
    """The weight of a linear layer, ``[out, in]``, out of its 4 bits."""
    weight = base.weight
    if (state := getattr(weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, state)
    return weight.to(dtype)


class _Projection(torch.autograd.Function):
    """``h W^T + bias + scale (h A^T) B^T`` with h = x, or h = silu(gate) * x. W is frozen; A and B may be None."""

    @staticmethod
    def forward(ctx, x, gate, base, a, b, scale):
        ctx.base, ctx.scale = base, scale
        ctx.save_for_backward(x, gate, a, b)
        with torch.autocast(x.device.type, enabled=False):
            h = (x if gate is None else F.silu(gate).mul_(x)).flatten(0, -2)
            bias = None if base.bias is None else base.bias.to(x.dtype)
            out = F.linear(h, dense(base, x.dtype), bias)
            if a is not None:
                out.addmm_(h @ a.to(x.dtype).t(), b.to(x.dtype).t(), alpha=scale)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, gate, a, b = ctx.saved_tensors
        base, scale = ctx.base, ctx.scale
        wanted_x, wanted_gate, _, wanted_a, wanted_b, _ = ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False):
            shape, x, grad = x.shape, x.flatten(0, -2), grad.to(x.dtype).flatten(0, -2)
            activated = None if gate is None else F.silu(gate.flatten(0, -2))
            grad_x = grad_gate = grad_a = grad_b = None
            low_grad = None
            if a is not None:
                a_, b_ = a.to(x.dtype), b.to(x.dtype)
                low_grad = (grad @ b_).mul_(scale)
                h = x if gate is None else activated * x
                if wanted_a:
                    grad_a = (low_grad.t() @ h).to(a.dtype)
                if wanted_b:
                    grad_b = (grad.t() @ (h @ a_.t()).mul_(scale)).to(b.dtype)
                del h
            if wanted_x or wanted_gate:
                grad_h = grad @ dense(base, x.dtype)
                if a is not None:
                    grad_h.addmm_(low_grad, a_)
                if gate is None:
                    grad_x = grad_h.view(shape)
                else:
                    grad_x = activated.mul_(grad_h).view(shape)
                    grad_gate = torch.ops.aten.silu_backward(grad_h.mul_(x), gate.flatten(0, -2)).view(gate.shape)
        return grad_x, grad_gate, None, grad_a, grad_b, None
