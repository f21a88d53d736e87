"""How many tokens one pass may have and how many layers are recomputed, from what a token was measured to keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from kto_core.engine.layers import attention, recurrent, sharding
from kto_core.engine.packing import passes, tree
from kto_core.engine.packing.passes import (
    LAST_SHARE,
    PROMPT,
    RECURRENCE,
    RESERVE,
    SHARE,
    Token,
    inputs_fit,
    working,
    y_tokens,
)
from kto_core.engine.packing.sample import packed_tokens
from kto_core.hardware.gpus import GIB, allowed, memory_gib

from .support import is_mixture

SCORING = (2048, 16384)  # most tokens of a pass without gradients: enough to keep a CPU, or a GPU, busy
MEASURED = (64, 192)  # tokens of the measured passes


@dataclass(frozen=True)
class Limits:
    """How an engine cuts a batch; it is given another one as a whole, `Engine.limits`.

    Attributes:
        token_budget: packed tokens of a pass with gradients; None: everything in one.
        scoring_tokens: the same of a pass without.
        checkpoint_layers: decoder layers, from the first, that are computed again in the backward.
        needed: tokens of a pass -> layers it has to compute again; where set, each pass with gradients sets
            ``checkpoint_layers`` by it, to ``least_layers`` at least.
        offload: the inputs of layers that are computed again wait for their backward in main memory.
    """

    token_budget: int | None = None
    scoring_tokens: int | None = None
    checkpoint_layers: int = 0
    needed: Callable[[int], int] | None = None
    least_layers: int = 0
    offload: bool = False


def sample_groups(planner, rank: int = 0, world: int = 1, count: int = 32) -> list[int]:
    """What a process's part of some optimizer batches of the first epoch counts in a token budget."""
    plan, rows = planner.epoch(0), planner.rows
    sizes = []
    for g in np.unique(np.linspace(0, len(plan) - 1, min(count, len(plan))).astype(int)):
        own, other = (rows[rank::world] for rows in plan.group(int(g)))
        if not len(own):  # fewer rows than processes
            continue
        y = sum(y_tokens(len(rows.completion[i])) for i in other) if planner.kl else 0
        sizes.append(packed_tokens(rows.prompt, rows.completion, own) + y)
    return sizes


def choose(
    engine,
    groups: list[int],
    autocast,
    checkpoint_layers: int | None,
    longest: int,
    recompute: bool | None = None,
    moments: float = 8,
    rows: float | None = None,
) -> Limits:
    """The limits with which the sampled batches cost least (`passes.cheapest`).

    ``checkpoint_layers`` given: only the tokens of passes are chosen; else each pass recomputes as few layers as its
    size needs. ``recompute``: layers may be recomputed before passes get smaller; default on a GPU (a CPU has memory,
    not speed, to spare). ``moments``: bytes that the optimizer keeps of a parameter, which count, like
    `passes.LAST_SHARE`, only where the longest row has no room otherwise; with 8, AdamW's in 32 bits, the presets were
    measured. Where it has none then either, inputs of layers wait in main memory. ``rows``: of a batch; each has a
    prompt, at whose end recurrent layers keep a state.
    """
    total = len(engine.layers)
    token, copies = measure(engine, autocast, np.mean(groups) / rows if rows and groups else PROMPT)
    room = available(engine.device)
    adapter = sum(p.numel() for p in engine.model.parameters() if p.requires_grad)
    fixed = copies + (4 + 8) * adapter  # gradient and Adam's moments
    fixed += RESERVE.get(engine.device.type, 0) + sharding.gathered_bytes(engine.layers)
    if any(name == recurrent.RULE for _, name, _ in engine.recurrent):
        fixed += RECURRENCE["cuda" if engine.device.type == "cuda" else "cpu"]
    free = room * SHARE - fixed
    scoring = int(free / (2 * token.busy + token.rest + token.store))
    cut = passes.limits(
        groups,
        longest,
        total,
        token,
        free,
        room * LAST_SHARE - fixed + (8 - moments) * adapter,
        given=None if checkpoint_layers is None else min(checkpoint_layers, total),
        recompute=engine.device.type != "cpu" if recompute is None else recompute,
        can_offload=lambda: can_offload(engine, longest),
    )
    # divided layers are computed again by all processes or none
    by_size = checkpoint_layers is None and not engine.divided
    return replace(
        engine.limits,
        token_budget=cut.budget,
        scoring_tokens=max(longest, min(SCORING[engine.device.type == "cuda"], scoring)),
        checkpoint_layers=cut.layers,
        needed=cut.needed if by_size else engine.limits.needed,
        offload=cut.offload or engine.limits.offload,
    )


def measure(engine, autocast, prompt: float = PROMPT) -> tuple[Token, float]:
    """Bytes of a token, and bytes that a pass keeps whatever its tokens (number-format copies of the adapter).
    ``prompt``: tokens for each prompt, at whose end recurrent layers keep a state."""
    (few, few_rest, _, _), (many, many_rest, width, stored) = (_kept(engine, autocast, t) for t in MEASURED)
    tokens, layers = MEASURED[1] - MEASURED[0], max(1, len(engine.layers))
    per_layer = (many - few) / tokens / layers
    config = engine.causal.config.get_text_config()
    number = width // config.hidden_size  # bytes of one
    keys, states = stored
    store = keys / MEASURED[1] + states / prompt  # counted as if all tokens were prompt
    rest = (many_rest - few_rest) / tokens + 3 * width
    experts = getattr(config, "num_experts_per_tok", 0) or getattr(config, "top_k_experts", 0) or 1
    copies = experts if is_mixture(config) and config.model_type != "gpt_oss" else 0
    busy = working(config.hidden_size, experts * _widest(config), number, copies)
    return Token(per_layer, width, rest, store, busy), max(0.0, few - per_layer * layers * MEASURED[0])


def _widest(config) -> int:
    """Of the layers' FFNs, which may differ."""
    expert = getattr(config, "moe_intermediate_size", None) if is_mixture(config) else None
    width = expert or getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return max(width) if isinstance(width, list | tuple) else width


def _unpack(_):
    raise RuntimeError("a pass that is only measured has no backward")


def _kept(engine, autocast, tokens: int) -> tuple[int, int, int, tuple[int, int]]:
    """Bytes that a pass of ``tokens`` tokens saves in the layers and outside, of one hidden state, and of what it keeps
    for others: of the keys and values of all tokens, and of what recurrent layers have at the end of the prompt."""
    ids = np.arange(tokens + 1, dtype=np.int32) % 97 + 3
    t = tree.build([ids[:-2]], [ids[-3:]])
    kept = {"layers": 0, "rest": 0}
    seen: set[int] = {sharding.local(p).untyped_storage().data_ptr() for p in engine.model.parameters()}
    alive = []  # a freed storage's address would be met again
    where, passing = "rest", set()

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen | passing:
            seen.add(storage.data_ptr())
            alive.append(storage)
            kept[where] += storage.nbytes()
        # not the tensor: an output that its own node holds is a circle that is never collected; no backward will ask

    def weights(layer) -> set[int]:  # gathered ones are given up after the layer, saved or not
        return {p.untyped_storage().data_ptr() for p in layer.parameters()} if sharding.is_divided(layer) else set()

    def enter(layer, *_):
        nonlocal where, passing
        where, passing = "layers", weights(layer)

    def leave(*_):
        nonlocal where, passing
        where, passing = "rest", set()

    before = engine.limits
    engine.limits = replace(before, checkpoint_layers=0)
    hooks = [h for m in engine.layers for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        with engine.using_tree(), autocast(), torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            keep = torch.arange(len(t), device=engine.device)
            run = attention.Pass(t.segments, engine.device, keep, torch.as_tensor(t.ends, device=engine.device), {})
            hidden = engine.forward(t.ids, t.positions, run)
    finally:
        engine.limits = before
        for h in hooks:
            h.remove()
    attends = [(isinstance(key, int), t.nbytes) for key, held in run.store.items() for t in held]
    stored = sum(n for yes, n in attends if yes), sum(n for yes, n in attends if not yes)
    return kept["layers"], kept["rest"], hidden.shape[-1] * hidden.element_size(), stored


def available(device: torch.device) -> float:
    """Bytes that may still be taken: on a GPU what is free or cached, within the process's cap; on a CPU half of it."""
    if device.type != "cuda":
        return memory_gib()[1] * GIB / 2
    return allowed(device) - torch.cuda.memory_allocated(device)


def can_offload(engine, tokens: int) -> bool:
    """Whether main memory has room for the inputs of all layers of a pass of so many tokens; on a GPU only."""
    if engine.device.type != "cuda":
        return False
    weight = engine.causal.get_input_embeddings().weight  # the hidden states have its format
    entry = weight.shape[1] * weight.element_size()
    return inputs_fit(tokens, len(engine.layers), entry, memory_gib()[1] * GIB)


def tightened(engine, longest: int, batch: int, recompute: bool = True) -> Limits | None:
    """After running out of memory: recompute more layers, make passes smaller, keep layers' inputs in main memory.
    None: nothing is left to give.

    ``longest``: tokens of the longest row. ``batch``: of the batch that failed, at most. ``recompute``: there was a
    backward, which recomputed layers leave room for.
    """
    now, total = engine.limits, len(engine.layers)
    if recompute and now.checkpoint_layers < total:
        more = min(total, now.checkpoint_layers + max(1, total // 4))
        return replace(now, checkpoint_layers=more, least_layers=more)
    budget = min(now.token_budget or batch, batch)  # a larger one would change nothing
    if budget <= longest:
        if not recompute or now.offload or not can_offload(engine, longest):
            return None
        return replace(now, offload=True)
    scoring = max(longest, (now.scoring_tokens or budget) // 2)
    return replace(now, token_budget=max(longest, budget // 2), scoring_tokens=scoring)
