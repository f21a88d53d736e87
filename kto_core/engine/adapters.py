"""The reference policy of a LoRA run, and checks of the adapter. The reference never becomes a second adapter."""

from __future__ import annotations

import contextlib

from kto_core.errors import ModelError

from .reference import adapter_key


def check_adapter(model) -> None:
    """Raises ModelError unless ``model`` is a PeftModel whose one LoRA adapter the packed engine can train."""
    import torch
    from peft import LoraConfig, PeftModel

    if not isinstance(model, PeftModel):
        raise ModelError("The packed engine trains LoRA adapters. Pass peft_config, or choose engine `trl`.")
    for config in model.peft_config.values():
        if not isinstance(config, LoraConfig):
            raise ModelError(f"The packed engine trains LoRA adapters, not {config.peft_type}. Choose engine `trl`.")
    head = model.get_base_model().get_output_embeddings()
    if any(p.requires_grad for p in head.parameters()) or not isinstance(head, torch.nn.Linear):
        raise ModelError(
            "`lm_head` cannot be trained with the packed engine, which computes log-probs from its weight. Remove "
            "it, and embeddings tied to it, from target_modules and modules_to_save."
        )
    if not head.weight.dtype.is_floating_point:
        raise ModelError("The packed engine needs an unquantized output head (lm_head). Choose engine `trl`.")
    if others := [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]:
        raise ModelError(
            f"The packed engine trains only LoRA layers, but {others[0]} is trainable too. Remove modules_to_save, "
            "bias and trainable_token_indices from the adapter, or choose engine `trl`."
        )


def trainable(model) -> dict:
    """Adapter parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def broadcast_values(parameters: dict) -> None:
    """Give every process the main one's values of these parameters, which begin as random numbers."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for p in parameters.values():
        dist.broadcast(p.data, src=0)


class Reference:
    """The policy at the start of the run.

    A fresh adapter changes nothing, so the base model is the reference and adapters are switched off. Of an adapter
    that was trained before, a frozen copy is kept in main memory and put in its place while the reference is scored.
    """

    def __init__(self, model):
        self.model = model
        state = {name: p.detach() for name, p in trainable(model).items()}
        scaling = {
            n: dict(m.scaling) for n, m in model.named_modules() if isinstance(getattr(m, "scaling", None), dict)
        }
        self.key = adapter_key(state, scaling)
        self.copy = {name: t.to("cpu", copy=True) for name, t in state.items()} if self.key else None

    @contextlib.contextmanager
    def active(self):
        if self.copy is None:
            with self.model.disable_adapter():
                yield
            return
        now = {}
        parameters = trainable(self.model)
        try:
            for name, p in parameters.items():
                now[name] = p.data
                p.data = self.copy[name].to(p.device)
            yield
        finally:
            for name, p in parameters.items():
                p.data = now[name]
