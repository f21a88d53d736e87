"""How a batch is cut: the tokens of one pass and the layers that are computed again. Knows nothing of torch.

The engine asks with what it measured on its model, the memory plan with what it counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

Y_PASS = 0.3  # of a batch's forward: the y' on kept keys and values
PASS = 2048  # tokens whose forward takes as long as what every pass costs: weights taken out of 4 bits, kernel launches
SHARE = 0.9  # of the free memory that is planned with; the rest is fragmentation and what was not counted
CHUNK_BYTES = {"cuda": 2**28, "cpu": 2**26}  # float32 logits held at once
RESERVE = {"cuda": 3 * 2**28, "cpu": 2**28}  # logits' chunks, gradients of the head's input, kernels' workspaces
GATHERED = 3  # divided layers' weights at once: the one that runs, the buffer it came in, and the next one's


def working(hidden: int, intermediate: int, number: int) -> int:
    """Bytes a token that come and go in one layer's backward: gradients of the FFN's and attention's activations."""
    return number * (5 * intermediate + 6 * hidden)


def y_tokens(length: int) -> int:
    """What a y' counts in a token budget: it is run without gradients, one layer's activations at a time."""
    return length // 2


def chunk_tokens(vocabulary: int, device: str) -> int:
    """Tokens whose logits are held at once. ``device``: "cuda" or "cpu"."""
    return max(16, CHUNK_BYTES["cuda" if device == "cuda" else "cpu"] // (4 * vocabulary))


def cheapest(
    groups: Sequence[int], longest: int, layers: int, choices: Iterable[int], most: Callable[[int], int]
) -> tuple[int, int]:
    """(token budget, layers to recompute) with which batches of these sizes cost least.

    A batch that fits one pass costs a forward, a backward and its y'; one that does not needs another forward for z0
    before. Recomputed layers cost their share of a forward and leave room for more tokens in a pass. The budget holds
    the longest row if that is possible at all.

    Args:
        groups: what optimizer batches count in a token budget. longest: tokens of the longest row.
        layers: of the model. choices: how many of them may be recomputed, fewest first.
        most: layers recomputed -> tokens of a pass that the memory holds.
    """

    def cost(recomputed: int) -> float:
        budget, each = most(recomputed), 2 + recomputed / layers
        if budget < longest:
            return math.inf
        passes = [math.ceil(g / budget) for g in groups]
        return sum(g * (each + (Y_PASS if n == 1 else 1)) + PASS * n for g, n in zip(groups, passes, strict=True))

    choices = list(choices)
    best = min(choices, key=cost)
    best = best if cost(best) < math.inf else choices[-1]
    return most(best), best
