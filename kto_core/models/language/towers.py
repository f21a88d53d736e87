"""The parts of a wrapper that only images or sound need: left out of memory, since training and chat use text."""

from __future__ import annotations

import torch

from .part import decoder_name, is_wrapper


class LeftOut(torch.nn.Module):
    """Stands where a part of a wrapper was that text does not need."""

    def forward(self, *_, **__):
        raise RuntimeError("This part of the model was left out, because training and chat use text only.")


def leave_out_towers(causal) -> int:
    """Free what a wrapper has beside its language model and output head. Returns the parameters that are gone.

    Nothing goes where the model cannot run text without it.
    """
    if not is_wrapper(causal.config):
        return 0
    beside = _beside(causal)
    for parent, name, _ in beside:
        parent._modules[name] = LeftOut()
    training = causal.training
    try:
        with torch.no_grad():
            ids = torch.ones(1, 2, dtype=torch.long, device=causal.get_input_embeddings().weight.device)
            causal.eval()(input_ids=ids, use_cache=False)
    except (RuntimeError, AttributeError, TypeError):
        for parent, name, module in beside:
            parent._modules[name] = module
        return 0
    finally:
        causal.train(training)
    return sum(p.numel() for _, _, module in beside for p in module.parameters())


def _beside(causal) -> list[tuple[torch.nn.Module, str, torch.nn.Module]]:
    """(parent, name, module) of all parts with weights that are neither language model nor its head or embeddings."""
    kept = {id(m) for m in (causal.get_output_embeddings(), causal.get_input_embeddings())}
    found, node = [], causal
    for step in filter(None, decoder_name(causal).split(".")):
        for name, child in node.named_children():
            parts = list(child.modules())
            if name != step and not any(id(m) in kept for m in parts) and any(True for _ in child.parameters()):
                found.append((node, name, child))
        node = getattr(node, step)
    return found
