"""Attention over a prefix tree, as one of transformers' attention functions ("kto_tree").

`use_tree` switches a model to it for the length of a block; the pass itself travels through the model as the keyword
``kto_tree``, so a recompute under gradient checkpointing meets the same pass on any thread. On CUDA (compute capability
8.0 and newer) all segments run in one variable-length FlashAttention call, with sinks too (sinks.py); elsewhere
neighbouring segments share scaled-dot-product calls with a mask made from the tree.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from kto_core.engine.packing.tree import Branches, Segments, Tree
from kto_core.models.experts.gpt_oss import sink_attention

from . import sinks as sink_kernel

NAME = "kto_tree"
MERGE = 4096  # masked-out query-key pairs that cost less than one more call


@dataclass
class Pass:
    """What the attention functions need of one forward, and the recurrent ones (recurrent.py). Not shared between
    forwards.

    ``store``: where the K/V of the ``keep`` tokens go (layer -> (k, v), detached), and what recurrent layers have at
    the end of the spans ``ends``; or None. ``prefix``: a store that this pass attends to before its own keys.
    """

    segments: Segments
    device: torch.device
    keep: torch.Tensor | None = None
    ends: torch.Tensor | None = None
    store: dict | None = None
    prefix: dict | None = None
    _plans: dict = field(default_factory=dict)

    @classmethod
    def keeping(cls, tree: Tree, branches: Branches | None, device: torch.device) -> Pass:
        """Over a tree, with a store of what these branches of it need, if any."""
        if branches is None:
            return cls(tree.segments, device)
        keep, ends = (torch.as_tensor(a, device=device) for a in (branches.keep, branches.ends))
        return cls(tree.segments, device, keep, ends, store={})

    def close(self) -> None:
        """From now on a recompute does not fill the store."""
        self.store = None

    def recall(self, key: Hashable, make: Callable):
        """What was made for this pass under this key before, or ``make()``."""
        if key not in self._plans:
            self._plans[key] = make()
        return self._plans[key]

    def plan(self, kind: str, window: int | None):
        make = _varlen_plan if kind == "varlen" else _masked_plan
        return self.recall((kind, window), lambda: make(self.segments, self.device, window))


def register(name: str, function) -> None:
    """Make an attention function known to transformers; again does nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(name, function)


def configs(model) -> list:
    """The configurations that the modules of a model read their attention's name from."""
    return list({id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values())


def use_tree(configs):
    """Inside, modules with these configs attend with "kto_tree"; backward passes that recompute belong inside too."""
    register(NAME, tree_attention)
    return use(configs, NAME)


@contextlib.contextmanager
def use(configs, attention: str):
    """Inside, modules with these configs attend with the registered function of that name."""
    before = [(c, c._attn_implementation) for c in configs if hasattr(c, "_attn_implementation_internal")]
    try:
        for config, _ in before:
            config._attn_implementation_internal = attention
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


def tree_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, kto_tree=None, **kwargs
):
    """transformers' attention signature: q ``[1, H, T, D]``, k and v ``[1, Hkv, T, D]`` -> (``[1, T, H, D]``, None)."""
    if kto_tree is None:
        raise RuntimeError("the attention kto_tree needs the keyword kto_tree; use_tree() is for tree passes only")
    if kwargs.get("position_bias") is not None:
        raise RuntimeError("position biases are not supported by the packed engine")
    sinks = kwargs.get("s_aux")
    if torch.is_autocast_enabled(query.device.type):  # an fp32 norm or rotation may have left q and k in fp32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    layer = module.layer_idx
    if kto_tree.store is not None and layer not in kto_tree.store:
        kto_tree.store[layer] = tuple(t.detach().index_select(2, kto_tree.keep) for t in (key, value))
    if kto_tree.prefix is not None:
        key, value = (torch.cat([a, b], 2) for a, b in zip(kto_tree.prefix[layer], (key, value), strict=True))
    scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
    if not softcap and _varlen_serves(query, value) and (sinks is None or _sinks_serve(query, key)):
        plan = kto_tree.plan("varlen", sliding_window)
        return _varlen(plan, query, key, value, scaling, sliding_window, sinks), None
    return _masked(kto_tree.plan("masked", sliding_window), query, key, value, scaling, softcap, sinks), None


# ---- one FlashAttention call for all segments ------------------------------------------------------------------------


def _varlen_serves(query, value) -> bool:
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if query.shape[-1] > 256 or query.shape[-1] != value.shape[-1]:
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0) and _varlen_function() is not None


@functools.cache
def _varlen_function():
    """torch's variable-length attention and the names of its parameters, which differ by version; None without it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def _sinks_serve(query, key) -> bool:
    _, known = _varlen_function()
    heads, groups = query.shape[1], query.shape[1] if "enable_gqa" not in known else key.shape[1]
    return "window_size" in known and sink_kernel.serve(query.device, query.dtype, query.shape[-1], heads, groups)


def _varlen_plan(segments: Segments, device, window):
    q_lengths = [b - a for a, b in segments.queries.tolist()]
    k_lengths = [sum(b - a for a, b in ranges) for ranges in segments.keys]
    flat = np.concatenate([np.arange(a, b) for ranges in segments.keys for a, b in ranges])
    shared = len(flat) != len(segments.k_pos) or not np.array_equal(flat, np.arange(len(flat)))

    def ends(lengths):
        return torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32, device=device)

    index = torch.as_tensor(flat, device=device) if shared else None
    return ends(q_lengths), ends(k_lengths), max(q_lengths), max(k_lengths), index


def _varlen(plan, query, key, value, scaling, window, sinks=None):
    cu_q, cu_k, max_q, max_k, index = plan
    query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))  # [T, H, D]
    if index is not None:
        key, value = _Gather.apply(key, index), _Gather.apply(value, index)
    function, known = _varlen_function()
    kwargs = {"scale": scaling}
    if "window_size" in known:
        kwargs["window_size"] = (window - 1 if window else -1, 0)
    elif window and window < max_k:
        raise RuntimeError("this torch's varlen_attn knows no sliding window")
    else:
        kwargs["is_causal"] = True
    if "enable_gqa" in known:
        kwargs["enable_gqa"] = key.shape[1] != query.shape[1]
    elif key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    given = query.contiguous(), key.contiguous(), value.contiguous(), cu_q, cu_k, max_q, max_k
    if sinks is not None:
        return sink_kernel.attend(*given, scaling, kwargs["window_size"], sinks)[None]
    return function(*given, **kwargs)[None]


class _Gather(torch.autograd.Function):
    """index_select on dim 0 whose backward adds up in fp32: a prefix shared by many rows gets many small gradients."""

    @staticmethod
    def forward(ctx, tensor, index):
        ctx.save_for_backward(index)
        ctx.length = len(tensor)
        return tensor.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        total = torch.zeros(ctx.length, *grad.shape[1:], dtype=torch.float32, device=grad.device)
        return total.index_add_(0, index, grad.float()).to(grad.dtype), None


# ---- masked calls, each for some neighbouring segments ---------------------------------------------------------------


@dataclass
class _Call:
    q: tuple[int, int]
    k: torch.Tensor | tuple[int, int]  # indices, or one range
    allowed: torch.Tensor | None  # bool [q, k]; None: causal, square


def _masked_plan(segments: Segments, device, window) -> list[_Call]:
    groups: list[tuple[list[int], list[tuple[int, int]]]] = []
    cost = 0
    for s, ranges in enumerate(segments.keys):
        size = int(segments.queries[s, 1] - segments.queries[s, 0])
        alone = size * _width(ranges)
        if groups:
            members, union = groups[-1]
            joined = _union(union, ranges)
            rows = int(segments.queries[s, 1] - segments.queries[members[0], 0])
            if rows * _width(joined) <= cost + alone + MERGE:
                groups[-1] = ([*members, s], joined)
                cost = rows * _width(joined)
                continue
        groups.append(([s], ranges))
        cost = alone
    calls = []
    for members, ranges in groups:
        a, b = int(segments.queries[members[0], 0]), int(segments.queries[members[-1], 1])
        k = np.concatenate([np.arange(x, y) for x, y in ranges])
        distance = segments.q_pos[a:b, None] - segments.k_pos[None, k]
        allowed = segments.seen[segments.q_node[a:b]][:, segments.k_node[k]] & (distance >= 0)
        if window:
            allowed &= distance < window
        plain = len(k) == b - a and np.array_equal(allowed, np.tri(b - a, dtype=bool))
        where = ranges[0] if len(ranges) == 1 else torch.as_tensor(k, device=device)
        calls.append(_Call((a, b), where, None if plain else torch.as_tensor(allowed, device=device)))
    return calls


def _masked(calls: list[_Call], query, key, value, scaling, softcap, sinks=None):
    parts = []
    for call in calls:
        q = query[:, :, call.q[0] : call.q[1]]
        if isinstance(call.k, tuple):
            k, v = key[:, :, call.k[0] : call.k[1]], value[:, :, call.k[0] : call.k[1]]
        else:
            k, v = key.index_select(2, call.k), value.index_select(2, call.k)
        parts.append(attend(q, k, v, call.allowed, scaling, softcap, sinks))
    out = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
    return out.transpose(1, 2).contiguous()


def attend(q, k, v, allowed, scaling, softcap=None, sinks=None):
    """``[1, H, T, D]`` over ``[1, Hkv, K, D]``. ``allowed``: bool ``[T, K]``; None: causal, square. ``sinks``:
    ``[H]``."""
    if sinks is not None:
        mask = None if allowed is None else allowed[None, None]
        return sink_attention(None, q, k, v, mask, scaling, sinks)[0].transpose(1, 2)
    if softcap:
        return _capped(q, k, v, allowed, scaling, softcap)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, is_causal=allowed is None, scale=scaling, enable_gqa=gqa
    )


def _capped(q, k, v, allowed, scaling, softcap):
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.tanh((q @ k.transpose(2, 3)) * (scaling / softcap)) * softcap
    if allowed is None:
        allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.softmax(scores, -1, dtype=torch.float32 if q.dtype != torch.float64 else None).to(q.dtype) @ v


def _width(ranges) -> int:
    return sum(b - a for a, b in ranges)


def _union(one, two) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for a, b in sorted([*one, *two]):
        if out and a <= out[-1][1]:
            out[-1] = (out[-1][0], max(b, out[-1][1]))
        else:
            out.append((a, b))
    return out
