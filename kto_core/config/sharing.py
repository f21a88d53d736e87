"""A configuration in short, as YAML, and as the command line that trains with it. What `train` makes of either is the
same configuration again; the output folder is left out, since a run that is made from it needs its own.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kto_core import paths
from kto_core.plain_text import one_line, whole

from . import resolving

if TYPE_CHECKING:
    from .controls import Control
    from .run_config import RunConfig

PROGRAM = "python -m kto_core train"
NO_SETTINGS = ("preset", "run_name", "output_dir", "alternatives")  # of which a difference says nothing
ELSEWHERE = ("model", "data", "data_split")  # shown by themselves
FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz")
BASE = "demo"  # what is said beside its name of settings whose preset is a file


def text(value: object) -> str:
    """A value as one line: a list with commas, ``true`` for True, nothing for None."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return one_line(", ".join(str(v) for v in value))
    return "" if value is None else one_line(value)


def changed(found: resolving.Resolved) -> dict[str, str]:
    """The settings that neither the preset nor a default decided, as `text`, without model and data."""
    left_out = (*NO_SETTINGS, *ELSEWHERE)
    return {
        name: Path(shown).name if name == "adapter" and shown else shown
        for name, origin in found.origins.items()
        if name not in left_out and origin != "default" and not origin.startswith("preset ")
        for shown in [text(getattr(found.config, name))]
    }


def data_name(config: RunConfig) -> str:
    """A data set without the folder that it lies in; the split of one on the Hub, if it is another than train."""
    if paths.is_hub_dataset(config.data) and Path(config.data).suffix.lower() not in FILES:
        return one_line(config.data + (f", split {config.data_split}" if config.data_split != "train" else ""), 200)
    return one_line(Path(config.data).name, 200) if config.data else ""


def differing(config: RunConfig) -> tuple[str, dict[str, Any]]:
    """(shipped preset, the values that differ from it): all that decides a run.

    Settings that came from a file as preset are said beside `BASE`.
    """
    preset = config.preset if config.preset in resolving.presets() else BASE
    base = resolving.resolve(preset, {}).config
    names = [name for name in type(config).model_fields if name not in ("preset", "output_dir", "alternatives")]
    values = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(base, name)}
    return preset, values


def as_yaml(config: RunConfig) -> str:
    """Lines of ``name: value`` for ``train --config FILE``: the preset and what differs from it."""
    import yaml

    preset, values = differing(config)
    lines = ["# Settings for `kto train --config FILE`: what differs from the preset."]
    for name, value in {"preset": preset, **values}.items():
        value = whole(value) if isinstance(value, str) else value
        said = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
        lines.append(f"{name}: {said.removesuffix('...' + chr(10)).rstrip()}")
    return "\n".join(lines) + "\n"


def as_command(config: RunConfig, program: str = PROGRAM) -> str:
    """The command line, quoted for a POSIX shell. Hidden settings, which have no flag, are left out."""
    preset, values = differing(config)
    known = {c.name: c for c in resolving.cli_fields()}
    words = [word for name, value in values.items() for word in _flag(known[name], value)]
    return " ".join([program, *map(shlex.quote, ["--preset", preset, *words])])


def _flag(c: Control, value: object) -> list[str]:
    if c.group == "Hidden" or value is None:
        return []
    long = c.flags[-1]
    if c.type is bool:
        return [long if value else f"--no-{long[2:]}"]
    said = ",".join(value) if isinstance(value, list) else str(value).lower() if c.choices else str(value)
    return [f"{long}={said}"] if said.startswith("-") else [long, said]
