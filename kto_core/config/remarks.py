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
    if c.report_to == "none" and c.wandb_project != "kto-studio":
        found.append("wandb_project has no effect until report_to is wandb.")
    if c.load_in_4bit and c.dtype == "float32":
        found.append("dtype float32 with 4-bit weights is slow on a GPU; auto uses bfloat16 if the GPU supports it.")
    return found
