"""Settings of a run or a file as what Train's form shows: preset, model, values, and the data set by its id."""

from __future__ import annotations

from pathlib import Path

from kto_core import paths
from kto_core.config import plain_yaml, resolving
from kto_core.config.run_config import RunConfig
from kto_core.errors import ConfigError
from kto_core.plain_text import shown
from kto_core.runs import folders
from kto_studio.shared import data_sources, readings

from . import form as train_form


def read(file: str) -> RunConfig:
    """The settings of a YAML file that a page sent. Only a shipped preset may be named: other files are not its own.

    Raises:
        ConfigError: it cannot be read, or all its problems.
    """
    values = plain_yaml.read(Path(file))
    if (preset := values.get("preset")) not in (None, *resolving.presets()):
        names = ", ".join(resolving.presets())
        raise ConfigError(f"preset: {shown(preset, 60)} is not a preset. Choose one of {names}.")
    return resolving.resolve_values(values, None, None, train_form.ORIGIN, "file").config


def form(config: RunConfig, name: bool = False) -> dict:
    """Train's form with these settings.

    Args:
        name: with the run's name. Of a run it stays behind: two of one name are hard to tell apart.
    """
    made = train_form.empty(config.preset)
    base = resolving.resolve(made["preset"], {}).config
    made["model"] = config.model
    made["adapter"] = adapter_run(config.adapter)
    for c in train_form.controls():
        value = train_form.choice(c, getattr(config, c.name))
        if (
            (name or c.name != "run_name")
            and value is not None
            and value != train_form.choice(c, getattr(base, c.name))
        ):
            made["values"][c.name] = value
    return made


def adapter_run(folder: str) -> str:
    """The id of the run whose adapter it is, or ""."""
    path = Path(folder)
    return next((r.id for r in folders.list_runs() if folder and r.path in path.parents), "")


def data_id(config: RunConfig) -> str:
    """The id of a data set that the app knows, or ""."""
    path = Path(config.data)
    for kind, folder in (("example", paths.EXAMPLES), ("file", paths.data_dir())):
        if path.name and path.parent == folder.resolve() and path.is_file():
            return f"{kind}:{path.name}"
    if paths.is_hub_dataset(config.data) and not path.is_absolute() and not data_sources.suffix(path.name):
        return f"hub:{config.data}@{config.data_split}"
    return ""


def remarks(config: RunConfig, found: str) -> list[str]:
    """What of the settings does not come along, a sentence each; a reading is taken over where there is none.

    Args:
        found: `data_id`.
    """
    said = []
    if config.data and not found:
        said.append(f"The run's dataset {Path(config.data).name} is not among yours. Choose one in the Data tab.")
    if config.adapter and not adapter_run(config.adapter):
        said.append("The adapter that the run began with is not of a run on this machine. A new one is trained.")
    wanted = {name: value for name in readings.NAMES if (value := getattr(config, name)) not in (None, "")}
    if found and wanted != readings.of(found):
        if readings.of(found):
            said.append("The run read its dataset with other columns or thresholds. Set them in the Data tab.")
        else:
            readings.keep(found, **wanted)
    return said
