"""How a batch is cut: the tokens of one pass and the layers that are computed again. Knows nothing of torch.

The engine asks with what it measured on its model, the memory plan with what it counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

Y_PART = 8  # a y' counts one of so many of its tokens in a token budget (`y_tokens`)
Y_PASS = 0.3  # of a batch's forward: the y' on kept keys and values
PASS = 2048  # tokens whose forward takes as long as what every pass costs: weights taken out of 4 bits, kernel launches
SHARE = 0.9  # of the free memory that is planned with; the rest is fragmentation and what was not counted
LAST_SHARE = 0.97  # the same where the longest row has no room otherwise: its pass is of few and large pieces
CHUNK_BYTES = {"cuda": 2**28, "cpu": 2**26}  # float32 logits held at once
RESERVE = {"cuda": 3 * 2**28, "cpu": 2**28}  # logits' chunks, gradients of the head's input, kernels' workspaces
RECURRENCE = {"cuda": 2**30, "cpu": 2**26}  # bytes of what a recurrent layer computes again that may be there at once
PROMPT = 256  # tokens of a batch for each of its rows, where that is not known
GATHERED = 3  # divided layers' weights at once: the one that runs, the buffer it came in, and the next one's
OFFLOADED = "To fit the longest rows, the inputs of recomputed layers are offloaded to CPU memory."


def working(hidden: int, intermediate: int, number: int, copies: int = 0) -> int:
    """Bytes a token that come and go in one layer's backward, beside what the layer keeps: the FFN's activations made
    again, their gradients, and the one of its answer. When attention's turn comes, what the FFN kept is gone.
    ``copies``: of a token for its experts, whose answers and gradients come and go too."""
    return number * (3 * intermediate + hidden + 2 * copies * hidden)


class Token(NamedTuple):
    """Bytes of a token of a pass: kept by a layer; by one that is recomputed (its input); outside the layers; keys and
    values of all layers; and `working`."""

    layer: float
    entry: float
    rest: float
    store: float
    busy: float

    def offloaded(self) -> Token:
        """The same where recomputed layers' inputs wait in main memory."""
        return self._replace(entry=0.0)

    def kept(self, layers: int, recomputed: int) -> float:
        """For the backward, ``recomputed`` of the layers being computed again."""
        return (layers - recomputed) * self.layer + recomputed * self.entry + self.rest

    def backward(self, layers: int, recomputed: int) -> float:
        """In a layer's backward, which may have to compute the layer again first. Recomputed are the first ones: when
        their turn comes, the others have given up theirs."""
        return self.busy + (self.layer - self.entry if recomputed == layers else 0)

    def peak(self, layers: int, recomputed: int) -> float:
        """At the worse of two moments: when the y' are scored on the kept keys and values, and in the backward."""
        return self.kept(layers, recomputed) + max(self.store, self.backward(layers, recomputed))


def inputs_fit(tokens: int, layers: int, entry: float, free: float) -> bool:
    """Whether the inputs of all layers of a pass may wait in main memory, of whose ``free`` bytes half stay free."""
    block = 2 ** math.ceil(math.log2(tokens * entry))  # torch rounds page-locked memory up to a power of two
    return layers * block <= free / 2


def y_tokens(length: int) -> int:
    """What a y' counts in a token budget: it is run without gradients, one layer's activations at a time."""
    return length // Y_PART


def chunk_tokens(vocabulary: int, device: str) -> int:
    """Tokens whose logits are held at once. ``device``: "cuda" or "cpu"."""
    return max(16, CHUNK_BYTES["cuda" if device == "cuda" else "cpu"] // (4 * vocabulary))


def layers_for(tokens: float, choices: Sequence[int], capacity: Callable[[int], int]) -> int:
    """The fewest layers to recompute (of ``choices``, fewest first) with which so many tokens fit; else the most."""
    return next((n for n in choices if capacity(n) >= tokens), choices[-1])


def cheapest(
    groups: Sequence[int], longest: int, layers: int, choices: Iterable[int], capacity: Callable[[int], int]
) -> tuple[int, int]:
    """(token budget, layers that the largest pass recomputes) with which batches of these sizes cost least.

    A batch that fits one pass costs a forward, a backward and its y'; one that does not needs another forward for z0
    before. Recomputed layers cost their share of a forward and leave room for more tokens in a pass; each pass
    recomputes as few as its size needs. The budget holds the longest row if that is possible at all.

    Args:
        groups: what optimizer batches count in a token budget. longest: tokens of the longest row.
        layers: of the model. choices: how many of them may be recomputed, fewest first.
        capacity: layers recomputed -> tokens of a pass that the memory holds.
    """
    choices = list(choices)
    held = {n: capacity(n) for n in choices}

    def cost(budget: int) -> float:
        total = 0.0
        for g in groups:
            passes = math.ceil(g / budget)
            again = layers_for(g / passes, choices, held.__getitem__) / layers
            total += g * (2 + again + (Y_PASS if passes == 1 else 1)) + PASS * passes
        return total

    budgets = sorted({n for n in held.values() if n >= longest})
    budget = min(budgets, key=cost) if budgets else held[choices[-1]]
    return budget, layers_for(min(budget, max(groups, default=budget)), choices, held.__getitem__)


class Cut(NamedTuple):
    """What `limits` chose."""

    budget: int  # tokens of a pass; fewer than the longest row's where no pass can hold it
    layers: int  # that the largest pass recomputes
    offload: bool  # inputs of recomputed layers wait in main memory
    choices: list[int]  # how many layers may be recomputed, fewest first
    needed: Callable[[int], int]  # tokens of a pass -> layers that it recomputes


def limits(
    groups: Sequence[int],
    longest: int,
    layers: int,
    token: Token,
    free: float,
    last: float,
    *,
    given: int | None,
    recompute: bool,
    can_offload: Callable[[], bool],
) -> Cut:
    """The one rule by which engine and memory plan cut batches.

    As many layers are recomputed as makes the batches cheapest (`cheapest`); without ``recompute`` none, or all where
    the longest row has no room otherwise. Where it has none then either, inputs of layers wait in main memory, and last
    more of the memory is used, by its pass alone: shorter passes, of many pieces, recompute by the usual share.

    Args:
        groups, longest, layers: as `cheapest` takes them. token: bytes of one.
        free: bytes for the tokens of a pass. last: the same where the longest row has no room otherwise.
        given: layers to recompute, where the user decided it.
        recompute: layers are recomputed before passes get smaller.
        can_offload: whether main memory has room for the inputs of the longest row's layers.
    """

    def capacity(n: int, left: float = free) -> int:
        return max(0, int(left / token.peak(layers, n)))

    choices = list(range(layers + 1)) if given is None else [given]
    if offload := capacity(choices[-1]) < longest and can_offload():
        token = token.offloaded()
    if given is None and not recompute:
        choices = [0, layers] if capacity(0) < longest else [0]
    needed = partial(layers_for, choices=choices, capacity=capacity)
    held = partial(capacity, left=last) if capacity(choices[-1]) < longest else capacity
    return Cut(*cheapest(groups, longest, layers, choices, held), offload, choices, needed)
