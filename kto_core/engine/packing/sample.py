"""What the optimizer batches of a run pack into, before a model is there. Knows nothing of torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from . import tree
from .groups import Ragged, plan_epoch


class Sample(NamedTuple):
    """Of some optimizer batches: ``tokens`` that each packs into, prefixes that rows share counted once, and the
    ``share`` of their rows' own tokens which that is (1.0: nothing is shared)."""

    tokens: list[int]
    share: float


def sample(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    labels: Sequence[bool],
    batch: int,
    *,
    seed: int,
    steps: int,
    world: int = 1,
    most: int = 256,
) -> Sample:
    """Pack batches of the first epoch as the trainer will: all of the first ``steps``, or ``most`` spread over them.

    Args:
        rows: (prompt, completion) token ids of each, in the run's order. batch: rows of an optimizer batch.
        world: processes that share a batch; the first one's part is packed.
    """
    prompts, completions = Ragged.of([p for p, _ in rows]), Ragged.of([c for _, c in rows])
    plan = plan_epoch(np.asarray(labels, dtype=bool), None, None, batch, seed, 0, kl=False)
    steps = min(steps, len(plan))
    tokens, own = [], 0
    for g in np.unique(np.linspace(0, steps - 1, min(most, steps)).astype(int)):
        chosen = plan.group(int(g))[0][::world]
        tokens.append(packed_tokens(prompts, completions, chosen))
        own += int(np.sum(prompts.lengths[chosen] + completions.lengths[chosen]))
    return Sample(tokens, sum(tokens) / own)


def packed_tokens(prompts: Ragged, completions: Ragged, chosen: Iterable[int]) -> int:
    """Tokens of one pass over these rows."""
    chosen = list(chosen)
    return len(tree.build([prompts[i] for i in chosen], [completions[i] for i in chosen]))
