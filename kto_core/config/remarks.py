"""What may be said of settings that are valid."""

from __future__ import annotations

from .run_config import RunConfig


def remarks(c: RunConfig) -> list[str]:
    """Sentences about settings that are valid but rarely meant."""
    found = []
    if c.desirable_weight != 1 and c.undesirable_weight != 1:
        found.append(
            f"desirable_weight and undesirable_weight both differ from 1: only their ratio "
            f"({c.desirable_weight / c.undesirable_weight:.3g}) balances the labels. Leave one at 1."
        )
    if c.kl_group == "batch" and c.loss_type == "kto" and c.engine in ("trl", "unsloth"):
        found.append(f"kl_group is batch, but engine {c.engine} estimates the KL term within each micro-batch.")
    if c.report_to not in ("wandb", "trackio") and c.wandb_project != "kto-studio":
        found.append("wandb_project has no effect until report_to is wandb or trackio.")
    if c.lora_dropout:
        found.append(
            "lora_dropout has no effect: dropout is off with every engine, so that the model is compared with its "
            "reference and not with noise."
        )
    if c.lr_scheduler_type == "constant" and c.warmup_ratio not in (0, RunConfig.model_fields["warmup_ratio"].default):
        found.append("warmup_ratio has no effect with lr_scheduler_type constant; constant_with_warmup uses it.")
    if c.kl_group == "microbatch" and c.loss_type != "kto":
        found.append(f"kl_group has no effect with loss_type {c.loss_type}, which has no KL term.")
    if c.load_in_4bit and c.dtype == "float32":
        found.append("dtype float32 with 4-bit weights is slow on a GPU; auto uses bfloat16 if the GPU supports it.")
    return found
