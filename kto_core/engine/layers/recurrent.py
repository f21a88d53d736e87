"""Layers that go along a sequence, on a prefix tree: short convolutions and the gated delta rule.

Such a layer works token by token but for two functions of its modeling file: a causal convolution, for which every
token needs its own last ancestors, and the rule's recurrence, which must begin where the token's path left it. Both
are replaced for the length of a block (`lean.use`). A pass that keeps its prompts for the y' keeps, at the end of each
prompt, the state and the last inputs of the convolution.

Neither function is told which layer calls, or of which pass: the decoder layer around says so, on its thread.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from functools import partial
from typing import NamedTuple

import torch

from kto_core.engine.packing import spans

from . import delta
from .lean import Forwards

CONVOLUTION, RULE = "causal_conv1d_fn", "torch_chunk_gated_delta_rule"
_current = threading.local()


def recurrent_forwards(layers: list) -> Forwards:
    """What has to be replaced in these decoder layers; empty where none goes along the sequence."""
    found: Forwards = []
    sources: set[str] = set()
    for number, layer in enumerate(layers):
        mixers = [m for m in layer.modules() if any(isinstance(c, torch.nn.Conv1d) for c in m.children())]
        if mixers:
            found.append((layer, "forward", partial(_layer, number, layer.forward)))
            sources |= {type(m).__module__ for m in mixers}
    for code in (sys.modules[source] for source in sorted(sources)):
        for name, ours in ((CONVOLUTION, _convolution), (RULE, _rule)):
            theirs = getattr(code, name, None)
            if isinstance(theirs, partial):  # replaced already
                theirs = theirs.args[0]
            if theirs is not None:
                found.append((code, name, partial(ours, theirs)))
    return found


def reference_forwards(forwards: Forwards) -> Forwards:
    """transformers' own torch functions in place of the fast kernels that it takes where they are installed: these do
    not take every device and format."""
    functions = [(c, name, run) for c, name, run in forwards if name != "forward" and isinstance(run, partial)]
    return [(code, name, _in_torch(run.args[0])) for code, name, run in functions]


def _in_torch(theirs):
    """The function that transformers has put fast kernels before."""
    return getattr(theirs, "__wrapped__", theirs)


def _layer(number: int, theirs, *args, kto_tree=None, **kwargs):
    before = getattr(_current, "call", None)
    if kto_tree is not None:
        kwargs["kto_tree"] = kto_tree
    _current.call = None if kto_tree is None else (kto_tree, number)
    try:
        return theirs(*args, **kwargs)
    finally:
        _current.call = before


def _convolution(theirs, x, weight, *args, **kwargs):
    """x ``[1, C, T]``, weight ``[C, width]``."""
    call = getattr(_current, "call", None)
    if call is None:
        return theirs(x, weight, *args, **kwargs)
    run, number = call
    key = ("inputs", number)
    width, rows = weight.shape[-1], x[0].t()  # [T, C]
    held = None if run.prefix is None else run.prefix[key][0]
    kept = 0 if held is None else len(held) // max(1, width - 1)
    found = run.recall(("lines", width), lambda: _lines(run, width, kept))
    if run.store is not None and key not in run.store:
        run.store[key] = (_read(rows.detach(), None, found.tails[run.ends].flatten()),)
    kwargs = {k: v for k, v in kwargs.items() if k not in ("kto_tree", "seq_idx")}
    theirs = theirs if x.is_cuda else _in_torch(theirs)
    own = partial(theirs, weight=weight, **dict(zip(("bias", "activation"), args, strict=False)), **kwargs)
    return _Convolved.apply(rows, held, found, own).t()[None]


class _Convolved(torch.autograd.Function):
    """A convolution of ``rows``, ``[T, C]``, with frozen weights. Keeps its input only."""

    @staticmethod
    def forward(ctx, rows, held, found, own):
        ctx.held, ctx.found, ctx.own = held, found, own
        ctx.save_for_backward(rows)
        return own(_read(rows, held, found.rows).t()[None])[0].t().index_select(0, found.place)

    @staticmethod
    def backward(ctx, grad):
        (rows,), found = ctx.saved_tensors, ctx.found
        lines = _read(rows, ctx.held, found.rows).requires_grad_()
        with torch.enable_grad():
            out = ctx.own(lines.t()[None])[0].t()
        wanted = torch.zeros_like(out)
        wanted[found.place] = grad
        (lines_grad,) = torch.autograd.grad(out, lines, wanted)
        result = lines_grad.index_select(0, found.place)
        if len(found.copied):  # many branches may begin at one end: their sum is made in float32
            tokens, group = found.copied.unique(return_inverse=True)
            wide = torch.promote_types(rows.dtype, torch.float32)
            total = result[tokens].to(wide).index_add_(0, group, lines_grad[found.copies].to(wide))
            result[tokens] = total.to(result.dtype)
        return result, None, None, None


class _Lines(NamedTuple):
    """`spans.Lines` on a device."""

    rows: torch.Tensor
    place: torch.Tensor
    copies: torch.Tensor
    copied: torch.Tensor
    tails: torch.Tensor


def _lines(run, width: int, kept: int) -> _Lines:
    found = spans.lines(run.segments.spans, width, kept)
    return _Lines(*(torch.as_tensor(a, device=run.device) for a in found))


def _read(rows, held, index) -> torch.Tensor:
    """Rows of: what was kept, the pass's own, nothing."""
    nothing = rows.new_zeros(1, rows.shape[1])
    return torch.cat([*([] if held is None else [held]), rows, nothing]).index_select(0, index)


def _rule(theirs, query, key, value, *, g, beta, use_qk_l2norm_in_kernel=False, **kwargs):
    """q, k ``[1, T, H, K]``, v ``[1, T, H, V]``, g and beta ``[1, T, H]`` -> (``[1, T, H, V]``, None)."""
    call = getattr(_current, "call", None)
    if call is None:
        kwargs["use_qk_l2norm_in_kernel"] = use_qk_l2norm_in_kernel
        return theirs(query, key, value, g=g, beta=beta, **kwargs)
    run, number = call
    name = ("state", number)
    initial = None if run.prefix is None else run.prefix[name][0]
    ends = run.ends if run.store is not None and name not in run.store else None
    given, normalized = (query, key, value, g, beta), use_qk_l2norm_in_kernel
    if _fast_serves(query):
        levels = run.recall("levels", lambda: _levels(run))
        out, states = _by_depth(levels, *given, normalized=normalized, initial=initial, ends=ends)
    else:
        plan = run.recall("chunks", lambda: delta.plan_of(spans.chunks(run.segments.spans), run.device))
        out, states = delta.gated_delta(plan, *given, normalized=normalized, initial=initial, ends=ends)
    if ends is not None:
        run.store[name] = (states,)
    return out, None


# ---- flash-linear-attention's kernels, where they are installed ------------------------------------------------------


@functools.cache
def fast_rule():
    """flash-linear-attention's chunk_gated_delta_rule; None without it."""
    try:
        return importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    except Exception:  # not installed, or for another torch or Triton
        return None


def _fast_serves(query) -> bool:
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and fast_rule() is not None


def _levels(run) -> list[tuple]:
    """Of each depth of the tree: its spans, packed indices of their tokens, where each begins among these, and the
    parents' numbers within the depth before (at depth 0: kept ends)."""
    found = run.segments.spans
    depths = found.depths()
    number: dict[int, int] = {}
    levels = []

    def there(array, dtype=torch.long):
        return torch.as_tensor(array, device=run.device, dtype=dtype)

    for depth in range(int(depths.max()) + 1):
        members = (depths == depth).nonzero()[0].tolist()
        number |= {s: i for i, s in enumerate(members)}
        index = [i for s in members for i in range(*found.bounds[s])]
        cuts = [0]
        for s in members:
            cuts.append(cuts[-1] + int(found.bounds[s, 1] - found.bounds[s, 0]))
        parents = [number[int(found.parents[s])] if depth else int(found.kept[s]) for s in members]
        levels.append((members, there(index), there(cuts), there(parents)))
    return levels


def _by_depth(levels, q, k, v, g, beta, *, normalized: bool, initial, ends):
    """One call for the spans of each depth, from the final states of the depth before."""
    state, outs, indices, states, order = initial, [], [], [], []
    for depth, (members, index, cuts, parents) in enumerate(levels):
        start = None
        if state is not None:
            start = state.index_select(0, parents.clamp(min=0))
            if not depth:
                start = start * (parents >= 0)[:, None, None, None]
        part = (t.index_select(1, index) for t in (q, k, v, g, beta))
        q_, k_, v_, g_, beta_ = part
        out, state = fast_rule()(
            q_, k_, v_, g=g_, beta=beta_, initial_state=start, output_final_state=True,
            use_qk_l2norm_in_kernel=normalized, cu_seqlens=cuts,
        )  # fmt: skip
        outs.append(out)
        indices.append(index)
        states.append(state.detach())
        order += members
    place = torch.empty_like(torch.cat(indices))
    place[torch.cat(indices)] = torch.arange(len(place), device=place.device)
    out = torch.cat(outs, 1).index_select(1, place)
    if ends is None:
        return out, None
    numbers = torch.as_tensor(order, device=place.device)
    where = (numbers[None] == ends[:, None]).int().argmax(1)
    return out, torch.cat(states).index_select(0, where)
