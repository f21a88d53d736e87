"""What `chat` loads for a name: a run's newest or chosen adapter on its base model, or a model by itself."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from kto_core.errors import ModelError
from kto_core.guards import bounded


def resolve(target, checkpoint=None):
    """(RunConfig, adapter folder or None, name shown) of a run or model. See `Chat.load`."""
    from kto_core.errors import RunError
    from kto_core.runs import folders
    from kto_core.runs.run import Run

    found = target if isinstance(target, Run) else None
    if found is None:
        with contextlib.suppress(RunError):
            found = folders.find(str(target))
    if found is None:
        if checkpoint:
            raise ModelError(f"{target} is not a run, so it has no checkpoints. `runs list` shows all runs.")
        return _model_config(str(target)), None, str(target)
    return found.config().config, _adapter(found, checkpoint), found.id


def require_same_base(one, two, first: str, second: str) -> None:
    """Whether two runs' adapters can be put on one set of weights. ``one``, ``two``: their RunConfigs.

    Raises:
        ModelError: they were trained on different models, or on one model in different precisions.
    """
    if one.model != two.model:
        names = [Path(c.model).name if Path(c.model).is_absolute() else c.model for c in (one, two)]
        raise ModelError(
            f"{first} was trained on {names[0]}, {second} on {names[1]}. Choose two runs of one base model."
        )
    if one.load_in_4bit != two.load_in_4bit:
        four, whole = (first, second) if one.load_in_4bit else (second, first)
        raise ModelError(
            f"{four} was trained on the base model in 4 bit, {whole} was not, so one set of weights cannot serve both. "
            "Choose two runs with the same setting of load_in_4bit."
        )


def style(target):
    """How a conversation with a run or model is rendered: thinking as in the rows that the run trained."""
    from kto_core.data.rendering.style import PLAIN, Style
    from kto_core.errors import RunError
    from kto_core.runs import folders
    from kto_core.runs.run import Run

    found = target if isinstance(target, Run) else None
    if found is None:
        try:
            found = folders.find(str(target))
        except RunError:
            return PLAIN
    thinking = found.config().config.thinking
    return Style(_as_trained(found.path) if thinking == "rows" else thinking)


def _as_trained(folder: Path):
    """ "on" if any trained answer had a thought, "off" if none had; "rows" where nobody noted it."""
    facts = bounded.read_dict(folder / "dataset.json").get("report")
    noted = facts.get("thoughts") if isinstance(facts, dict) else None
    if not isinstance(noted, dict):
        return "rows"
    return "on" if noted.get("answers") else "off"


def _adapter(run, checkpoint) -> Path:
    saved = run.checkpoints()
    if checkpoint:
        step = re.sub(r"\D", "", Path(str(checkpoint)).name)
        for folder in saved:
            if folder.name == f"checkpoint-{step}":
                return folder
        steps = ", ".join(f.name.removeprefix("checkpoint-") for f in saved) or "none"
        raise ModelError(f"Run {run.id} has no checkpoint {checkpoint}. Its checkpoints: {steps}.")
    if run.adapter:
        return run.adapter
    if saved:  # stopped or interrupted: the newest saved state
        return saved[-1]
    raise ModelError(
        f"Run {run.id} has not saved anything yet. Wait for its first checkpoint, or chat with its base model."
    )


def _model_config(name: str):
    """How a model that is no run's is loaded: 4 bits on a GPU, plain on a CPU."""
    from kto_core.config.run_config import RunConfig
    from kto_core.hardware.gpus import devices

    four = bool(devices()) and name != "demo"
    return RunConfig(preset="demo", model=name, load_in_4bit=four)
