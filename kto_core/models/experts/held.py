"""transformers' fused experts with their weights in 4 bits: the module keeps its class, router and activation.

Served are the modules that transformers marks with ``use_experts_implementation``, gated and without biases: parameters
``gate_up_proj`` ``[experts, 2 × width, hidden]`` and ``down_proj`` ``[experts, hidden, width]``.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator

import torch
from torch import nn

from kto_core.models.language.part import class_of, is_wrapper

from .bank import Bank, multiply, multiply_few

WEIGHTS = ("gate_up_proj", "down_proj")
FEW = 16  # pairs of a token and an expert that are computed one by one: an answer's token


class Held(nn.Module):
    """What experts do once their weights are in ``banks``, one for each of `WEIGHTS`; ``sizes``: of both."""

    sizes: dict[str, tuple[int, int, int]]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """``[…, hidden]``, the experts of each token ``[n, k]`` and their weights ``[n, k]`` -> ``[…, hidden]``."""
        return through(self.banks, self._apply_gate, hidden_states, top_k_index, top_k_weights)


def through(banks, gate, hidden_states, top_k_index, top_k_weights, biases=None):
    """Tokens through their experts; see `Held.forward`.

    Args:
        banks: by `WEIGHTS`. gate: ``[n, 2 × width]`` -> ``[n, width]``. biases: by `WEIGHTS`, ``[experts, out]`` each.
    """
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    up, down = (banks[name] for name in WEIGHTS)
    chosen, weights = top_k_index.flatten(), top_k_weights.flatten()
    k = top_k_index.shape[-1]

    def with_bias(name: str, found: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        return found if biases is None else found + biases[name][experts].to(found.dtype)

    if len(chosen) <= FEW and not torch.is_grad_enabled():
        each = with_bias(WEIGHTS[0], multiply_few(up, tokens.repeat_interleave(k, 0), chosen), chosen)
        answers = with_bias(WEIGHTS[1], multiply_few(down, gate(each), chosen), chosen) * weights[:, None]
    else:
        order = chosen.argsort(stable=True)  # each expert's tokens side by side
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        counts = chosen.bincount(minlength=up.experts).tolist()[: up.experts]
        own = chosen[order] if biases is not None else order
        each = with_bias(WEIGHTS[0], multiply(up, _Spread.apply(tokens, order, back, k), counts), own)
        answers = with_bias(WEIGHTS[1], multiply(down, gate(each), counts), own)
        # each token's answers side by side again: adding them where they belong would round by chance on a GPU, and
        # policy and reference would differ before anything is learned
        answers = _Permuted.apply(answers, back, order) * weights[:, None]
    return answers.view(-1, k, answers.shape[-1]).sum(1).to(hidden_states.dtype).view(hidden_states.shape)


class _Spread(torch.autograd.Function):
    """Each token once for each of its experts, in the experts' order; the backward adds without chance."""

    @staticmethod
    def forward(ctx, tokens, order, back, k):
        ctx.save_for_backward(back)
        ctx.k = k
        return tokens[order // k]

    @staticmethod
    def backward(ctx, gradient):
        (back,) = ctx.saved_tensors
        return gradient[back].view(-1, ctx.k, gradient.shape[-1]).sum(1), None, None, None


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, there, back):
        ctx.save_for_backward(back)
        return rows[there]

    @staticmethod
    def backward(ctx, gradient):
        (back,) = ctx.saved_tensors
        return gradient[back], None, None


# ---- which modules ---------------------------------------------------------------------------------------------------


def classes(config) -> list[type]:
    """The classes of fused experts beside the model of this transformers config, served or not."""
    found: dict[str, type] = {}
    own = class_of(config.get_text_config()) if is_wrapper(config) else None
    for model_class in (class_of(config), own):
        module = sys.modules.get(getattr(model_class, "__module__", ""))
        for name, value in vars(module).items() if module else ():
            if isinstance(value, type) and hasattr(value, "_apply_gate") and value.__module__ == module.__name__:
                found[name] = value
    return list(found.values())


def why_not(experts: nn.Module) -> str:
    """Why the weights of a module of fused experts cannot be held in 4 bits here; "" where they can."""
    if any(getattr(experts, name, default) for name, default in (("has_bias", False), ("is_transposed", False))):
        return "its experts have biases or transposed weights"
    if not getattr(experts, "has_gate", False) or not getattr(experts, "is_concatenated", True):
        return "its experts have no gate of their own"
    shapes = [tuple(getattr(experts, name).shape) for name in WEIGHTS if hasattr(experts, name)]
    if len(shapes) != 2 or any(len(s) != 3 for s in shapes):
        return "its experts' weights have other names"
    (n, twice, hidden), down = shapes
    if down != (n, hidden, twice // 2):
        return "its experts' weights have other shapes"
    names = list(inspect.signature(_original_forward(type(experts))).parameters)
    if names != ["self", "hidden_states", "top_k_index", "top_k_weights"]:
        return "its experts compute in a way of their own"
    if not (Bank.holds(twice, hidden, 2) and Bank.holds(hidden, twice // 2, 1)):
        return "its experts' sizes are no multiple of 64"
    return ""


def _original_forward(kind: type):
    return inspect.unwrap(kind.forward)


@contextlib.contextmanager
def layout(config) -> Iterator[None]:
    """Inside, models of this config are built with experts that have no weights yet (`filling.fill` brings them), where
    they can be held in 4 bits."""
    kinds, whole = classes(config), class_of(config)
    ignored = getattr(whole, "_keys_to_ignore_on_load_unexpected", None)
    for kind in kinds:
        setattr(sys.modules[kind.__module__], kind.__name__, _held_class(kind))
    if kinds:  # transformers would print a table of what `filling` reads
        whole._keys_to_ignore_on_load_unexpected = [*(ignored or ()), r"\.experts\."]
    try:
        yield
    finally:
        for kind in kinds:
            setattr(sys.modules[kind.__module__], kind.__name__, kind)
        if kinds:
            whole._keys_to_ignore_on_load_unexpected = ignored


def _held_class(kind: type) -> type:
    def __init__(self, *args, **kwargs):
        with torch.device("meta"):
            kind.__init__(self, *args, **kwargs)
        if why_not(self):  # stays what it is, without memory yet, as all that is built on the way to weights
            self.__class__ = kind
            return
        self.sizes = {name: tuple(getattr(self, name).shape) for name in WEIGHTS}
        for name in WEIGHTS:
            delattr(self, name)
            self.register_buffer(name, torch.empty(0), persistent=False)  # what some blocks initialize
        self.banks = nn.ModuleDict()
        self._is_hf_initialized = True

    return type(kind.__name__, (Held, kind), {"__init__": __init__, "__module__": kind.__module__, "plain": kind})


def held(model) -> dict[str, Held]:
    """Name -> module of all experts of ``model`` that are held in 4 bits, filled or not."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Held)}


def fuse(model, dtype: torch.dtype) -> None:
    """Give experts that are held in 4 bits transformers' own parameters again, which is what others read."""
    for module in held(model).values():
        for name in WEIGHTS:
            bank = module.banks[name]
            delattr(module, name)
            weight = torch.stack([bank.dense(slice(e, e + 1), dtype)[0] for e in range(bank.experts)])
            module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        del module.banks
        module.__class__ = type(module).plain
