"""Dropout off, in whatever form a model has it: policy and reference are then the same numbers until the first update.

TRL's own switch knows `torch.nn.Dropout` only. Many models call the function instead, with a rate that a module or the
configuration keeps; it acts whenever the model is in train mode, also while the reference is scored.
"""

from __future__ import annotations

import torch

# of a module's numbers: dropout and its kin (LayerDrop, drop path), and the noise of some routers
NOISE = ("drop", "jitter")


def switch_off(model: torch.nn.Module) -> None:
    """Set every rate of dropout and router noise in ``model`` to 0, those of a PEFT adapter included."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _zero(module, NOISE)
        config = getattr(module, "config", None)
        if hasattr(config, "to_dict"):  # read at each forward by some; not written anywhere with an adapter
            _zero(config, ("dropout",))


def _zero(owner, names: tuple[str, ...]) -> None:
    for name, value in list(vars(owner).items()):
        if isinstance(value, float) and value and any(part in name for part in names):
            setattr(owner, name, 0.0)
