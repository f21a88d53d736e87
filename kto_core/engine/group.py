"""One KL group: its rows, the loss they are given, and what its passes gave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from kto_core.engine.layers.loss import kto_losses
from kto_core.engine.packing import tree


@dataclass
class Group:
    """One KL group. Lists of int32 arrays; ``borrowed[i]`` is row i's y' (None: the loss has no KL).

    ``labels`` bool, ``ref`` and ``ref_kl`` fp32 ``[n]`` on the model's device.
    """

    prompts: list[np.ndarray]
    completions: list[np.ndarray]
    borrowed: list[np.ndarray] | None
    labels: torch.Tensor
    ref: torch.Tensor
    ref_kl: torch.Tensor | None


@dataclass
class Result:
    """``loss``: this group's share of the step's loss. ``logps`` ``[n]`` in the group's order; ``entropy`` and
    ``mean_logits``: sums over each row's completion tokens. ``tokens``: real tokens of the rows; ``packed``: tokens
    that the policy pass computed."""

    loss: torch.Tensor
    z0: torch.Tensor
    logps: torch.Tensor
    entropy: torch.Tensor
    mean_logits: torch.Tensor
    lengths: torch.Tensor
    tokens: int
    packed: int
    passes: int


@dataclass(frozen=True)
class Objective:
    """The loss of a row (`kto_losses`)."""

    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    loss_type: str = "kto"

    def losses(self, logps, ref_logps, z0, labels) -> torch.Tensor:
        """Of each row, ``[n]``."""
        weights = self.desirable_weight, self.undesirable_weight
        return kto_losses(logps, ref_logps, z0, labels, self.beta, *weights, loss_type=self.loss_type)


@dataclass
class Work:
    """A group on its way through its passes, and what they have given so far.

    ``borrowed_tokens``: what each row's y' counts in a token budget. ``passes``: the rows of each. ``totals``:
    log-prob, entropy and mean logit of each row, ``[n]``.
    """

    group: Group
    objective: Objective
    rows: int
    kl: bool
    borrowed_tokens: list[int]
    passes: list[list[int]]
    backward: Callable[[torch.Tensor], None] | None
    reduce: Callable[[torch.Tensor], torch.Tensor] | None
    autocast: Callable
    loss: torch.Tensor | float = 0.0
    packed: int = 0
    totals: list[torch.Tensor | None] = field(default_factory=lambda: [None, None, None])

    def build_tree(self, numbers: list[int]) -> tree.Tree:
        """Of some of the rows."""
        return tree.build([self.group.prompts[i] for i in numbers], [self.group.completions[i] for i in numbers])
