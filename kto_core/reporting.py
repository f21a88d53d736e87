"""``report_to``: W&B, TensorBoard or Trackio beside the run's own log. transformers' callbacks do the work.

None is installed with the project, and none is asked for by default. Metrics have TRL's names: ``train/loss``,
``train/rewards/margins``; ``eval/loss``, ``eval/rewards/margins`` of the validation rows.
"""

from __future__ import annotations

import contextlib
import importlib.util
import netrc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kto_core.errors import ConfigError

if TYPE_CHECKING:
    from kto_core.config.run_config import RunConfig

TITLES = {"wandb": "Weights & Biases", "tensorboard": "TensorBoard", "trackio": "Trackio"}
FOLDER = "tensorboard"  # in the run's folder


def check(config: RunConfig) -> None:
    """Before the start: what ``report_to`` asks for is there.

    Raises:
        ConfigError: a package or a key is missing.
    """
    name = config.report_to
    if name == "none":
        return
    packages = (name, "tensorboardX") if name == "tensorboard" else (name,)
    if not any(map(importlib.util.find_spec, packages)):
        raise ConfigError(
            f"report_to: {TITLES[name]} is not installed. Run `pip install {name}`, or set report_to to none."
        )
    if name == "wandb" and not _key() and os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun"):
        raise ConfigError("report_to: Weights & Biases has no key. Run `wandb login`, or set WANDB_API_KEY.")


def _key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def arguments(config: RunConfig) -> dict[str, Any]:
    """Keywords of TRL's arguments. W&B reads its project from the environment, which is set here."""
    name = config.report_to
    if name == "none":
        return {"report_to": []}
    if name == "wandb":
        os.environ["WANDB_PROJECT"] = config.wandb_project
    return {"report_to": [name]} | ({"project": config.wandb_project} if name == "trackio" else {})


def into(trainer: Any, run_dir: Path) -> None:
    """TensorBoard's files go into the run's folder, where TENSORBOARD_LOGGING_DIR does not say otherwise."""
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
            callback.logging_dir = str(run_dir / FOLDER)


def finish() -> None:
    """End what a run left open, good or bad: the last evaluation comes after the training's end."""
    if (wandb := sys.modules.get("wandb")) is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()
    if (trackio := sys.modules.get("trackio")) is not None:
        with contextlib.suppress(RuntimeError):  # what it raises where no run is open
            trackio.finish()
