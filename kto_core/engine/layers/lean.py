"""Leaner layers for the packed step: the same numbers from fewer kernels, and less kept for the backward.

`lean_forwards` finds what can be replaced in a model and `use` replaces it for the length of a block:

- LoRA projections: one autograd function instead of PEFT's chain. It keeps its input only, takes the frozen weight out
  of its 4 bits when it is needed, and adds the adapter's part inside a matrix product.
- SwiGLU: the product of gate and up is made again in the backward instead of being kept. What the down projection needs
  is kept before it is run, so that a layer that is computed again ends there and saves the largest product.
- RMSNorm: torch's own, which keeps its input instead of float32 copies of it; the one with a gate: gated.py.
- RoPE: three kernels instead of nine, and the heads stay in the order in which attention wants them.

Anything that is not known for sure (dropout, DoRA, several adapters, another activation) keeps its own forward.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from . import gated, sharding

Forwards = list[tuple[object, str, Callable]]  # whose, its name there, what to run instead


def lean_forwards(decoder: torch.nn.Module) -> Forwards:
    """What in ``decoder``'s layers has a leaner function that gives the same result."""
    found: Forwards = []
    checked: dict[tuple, bool] = {}
    inside: set[int] = set()  # projections that run as a part of their SwiGLU
    layer = None  # the last divided one: its modules follow it
    for module in decoder.modules():
        layer = module if sharding.is_divided(module) else layer
        forward = _lean(module)
        if forward is None or id(module) in inside:
            continue
        kind = (type(module), type(getattr(module, "base_layer", None)), forward.func)
        if kind not in checked:
            with sharding.gathered(layer):
                checked[kind] = _agrees(module, forward)
        if checked[kind]:
            found.append((module, "forward", forward))
            if forward.func is _swiglu:
                inside.add(id(module.down_proj))
    for source in {type(m).__module__ for m in decoder.modules()}:
        code = sys.modules.get(source)
        theirs = getattr(code, "apply_rotary_pos_emb", None)
        if theirs is not None and _rotates_alike(theirs):
            found.append((code, "apply_rotary_pos_emb", partial(_rope, theirs)))
    return found


@contextlib.contextmanager
def use(forwards: Forwards) -> Iterator[None]:
    """Inside, these run. Blocks may be nested."""
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in forwards]
    try:
        for owner, name, forward in forwards:
            vars(owner)[name] = forward
        yield
    finally:
        for owner, name, forward in before:
            if forward is None:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = forward


# ---- what is replaced ------------------------------------------------------------------------------------------------


def is_lora(module) -> bool:
    """A linear layer with one plain LoRA adapter."""
    return hasattr(module, "lora_A") and _is_projection(module)


def _lean(module) -> partial | None:
    if is_lora(module):
        return partial(_projection, module)
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        weight = module.weight
        return partial(_rms_norm, weight, module.variance_epsilon) if weight.ndim == 1 else None
    if _is_gated_norm(module):
        return partial(gated.gated_norm, module.weight, module.variance_epsilon)
    if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        known = type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")
        return partial(_swiglu, module) if known and _is_projection(module.down_proj) else None
    return None


def _is_gated_norm(module) -> bool:
    return type(module).__name__.endswith("RMSNormGated") and hasattr(module, "variance_epsilon")


def _is_projection(module) -> bool:
    """A frozen linear layer, plain or in 4 bits, alone or below one plain LoRA adapter."""
    base = getattr(module, "base_layer", module)
    name = type(base).__name__
    if not (type(base) is torch.nn.Linear or (name == "Linear4bit" and quant_state(base))):
        return False
    if any(p.requires_grad for p in base.parameters()):
        return False
    if name == "Linear4bit" and tuple(quant_state(base).shape) != (base.out_features, base.in_features):
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
    state = quant_state(base)
    four_bits = state is not None
    dtype = (base.compute_dtype or state.dtype) if four_bits else dtypes[0] if dtypes else torch.float32
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, width, generator=generator).to(weight.device, dtype)
    inputs = [x, x.flip(0, 1)] if _is_gated_norm(module) else [x]
    theirs, ours = module(*inputs).double(), forward(*inputs).double()
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
    (x,) = _as_autocast(x)
    return _project(layer, x, None)


def _swiglu(mlp, x):
    up, gate = _as_autocast(mlp.up_proj(x), mlp.gate_proj(x))
    h = _Gated.apply(up, gate)
    return _project(mlp.down_proj, h, h.grad_fn)


def _as_autocast(*tensors):
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) for t in tensors)


def _project(layer, x, gated):
    base = getattr(layer, "base_layer", layer)
    if base is layer or layer.disable_adapters:
        return _Projection.apply(x, gated, base, None, None, 0.0)
    (adapter,) = layer.lora_A
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return _Projection.apply(x, gated, base, a, b, layer.scaling[adapter])


def quant_state(base):
    """bitsandbytes' facts of a 4-bit weight; one that was divided and gathered again has left them to its layer."""
    return getattr(getattr(base, "weight", None), "quant_state", None) or getattr(base, "quant_state", None)


def dense(base, dtype) -> torch.Tensor:
    """The weight of a linear layer, ``[out, in]``, out of its 4 bits."""
    weight = base.weight
    if (state := quant_state(base)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, state)
    return weight.to(dtype)


class _Gated(torch.autograd.Function):
    """``silu(gate) * up``. Keeps both for itself and for the projection that follows."""

    @staticmethod
    def forward(ctx, up, gate):
        ctx.save_for_backward(up, gate)
        return F.silu(gate).mul_(up)

    @staticmethod
    def activated(ctx):
        """(up, gate, silu(gate)). Saved tensors of a layer that is computed again can be asked for once only."""
        if not hasattr(ctx, "values"):
            up, gate = ctx.saved_tensors
            ctx.values = up, gate, F.silu(gate)
        return ctx.values

    @staticmethod
    def backward(ctx, grad):
        up, gate, activated = _Gated.activated(ctx)
        del ctx.values
        grad_up = activated.mul_(grad)
        return grad_up, torch.ops.aten.silu_backward(grad.mul_(up), gate)  # the projection made grad for this alone


class _Projection(torch.autograd.Function):
    """``x W^T + bias + scale (x A^T) B^T``. W is frozen, A and B may be None. ``gated``: the node that made x."""

    @staticmethod
    def forward(ctx, x, gated, base, a, b, scale):
        ctx.gated, ctx.base, ctx.a, ctx.b, ctx.scale = gated, base, a, b, scale
        if gated is None and a is not None:
            ctx.save_for_backward(x)
        ctx.dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            rows = x.flatten(0, -2)
            bias = None if base.bias is None else base.bias.to(x.dtype)
            out = F.linear(rows, dense(base, x.dtype), bias)
            if a is not None:
                out.addmm_(rows @ a.to(x.dtype).t(), b.to(x.dtype).t(), alpha=scale)
        # no view to autograd: what comes after may write into it
        return torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[-1]])

    @staticmethod
    def backward(ctx, grad):
        a, b, base, scale, dtype = ctx.a, ctx.b, ctx.base, ctx.scale, ctx.dtype
        wanted_x, _, _, wanted_a, wanted_b, _ = ctx.needs_input_grad
        shape, grad = grad.shape, grad.to(dtype).flatten(0, -2)
        grad_x = grad_a = grad_b = None
        with torch.autocast(grad.device.type, enabled=False):
            if a is not None:
                a_, b_ = a.to(dtype), b.to(dtype)
                low_grad = (grad @ b_).mul_(scale)
                x = _input(ctx)
                if wanted_a:
                    grad_a = (low_grad.t() @ x).to(a.dtype)
                if wanted_b:
                    grad_b = (grad.t() @ (x @ a_.t()).mul_(scale)).to(b.dtype)
                del x
            if wanted_x:
                grad_x = grad @ dense(base, dtype)
                if a is not None:
                    grad_x.addmm_(low_grad, a_)
                grad_x = grad_x.view(*shape[:-1], -1)
        return grad_x, None, None, grad_a, grad_b, None


def _input(ctx) -> torch.Tensor:
    """What a projection was given, ``[tokens, in]``."""
    if ctx.gated is None:
        (x,) = ctx.saved_tensors
    else:
        up, _, activated = _Gated.activated(ctx.gated)
        x = activated * up
    return x.flatten(0, -2)


# ---- rotary positions ------------------------------------------------------------------------------------------------


def _rope(theirs, q, k, cos, sin, *args, **kwargs):
    usual = not args and not kwargs and q.shape[-1] == cos.shape[-1] and cos.ndim == 3
    if not usual or not q.dtype == k.dtype == cos.dtype:
        return theirs(q, k, cos, sin, *args, **kwargs)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)


class _Rotation(torch.autograd.Function):
    """``x cos + rotate_half(x) sin`` of ``[1, heads, tokens, width]``."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        out = x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        half = grad.shape[-1] // 2
        out = grad * cos
        out[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        out[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
        return out, None, None


@functools.cache
def _rotates_alike(theirs) -> bool:
    """Some architectures turn neighbours instead of halves, or have other arguments."""
    q, k, cos, sin = (torch.randn(1, *s, dtype=torch.float64) for s in ((2, 3, 8), (1, 3, 8), (3, 8), (3, 8)))
    try:
        return all(
            torch.allclose(a, b) for a, b in zip(theirs(q, k, cos, sin), _rope(theirs, q, k, cos, sin), strict=True)
        )
    except (TypeError, RuntimeError, ValueError):
        return False


SMALL = (_rms_norm, _rope)  # what also pays in steps of one token
