"""How a RunConfig comes about: presets, overrides, a run's config.yaml; and its fields as controls.

The way of a value: the default in its Field ◀ presets/NAME.yaml ◀ overrides (command line, user interface). `resolve`
walks it, remembers the origin of every value and reports all problems at once.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kto_core import paths
from kto_core.errors import ConfigError
from kto_core.files import write_whole
from kto_core.plain_text import cut, shown

from . import controls, plain_yaml
from .run_config import RunConfig

# what a run's config.yaml means by not naming a setting: it was begun before there was one
UNNAMED = {"test_size": 0.0, "split_by": "prompt"}


@dataclass
class Resolved:
    """A valid configuration and where each of its values comes from."""

    config: RunConfig
    origins: dict[str, str]  # "default" | "preset 7b" | "command line" | "user interface" | "because of num_gpus"


# ---- presets --------------------------------------------------------------------------------------------------------


def presets() -> dict[str, dict[str, Any]]:
    """The shipped presets, smallest first: name -> its YAML's values, ``description`` among them."""

    def size(path: Path) -> float:
        found = re.match(r"[\d.]+", path.stem)
        return float(found.group()) if found else 0.0

    return {p.stem: plain_yaml.read(p) for p in sorted(paths.PRESETS.glob("*.yaml"), key=size)}


def default_preset() -> str:
    """``7b`` where there is a GPU, else ``demo``."""
    from kto_core.hardware.gpus import devices

    return "7b" if devices() else "demo"


def _preset_values(preset: str) -> tuple[str, dict[str, Any]]:
    """(name, values without the description) of a shipped preset or of a YAML file, a run's config.yaml included."""
    path = paths.PRESETS / f"{preset}.yaml"
    if re.fullmatch(r"[\w.-]+", preset) and path.is_file():
        name, values = preset, plain_yaml.read(path)
    elif preset.endswith((".yaml", ".yml")):
        name, values = preset, plain_yaml.read(Path(preset).expanduser())
        values.pop("preset", None)
    else:
        known = list(presets())
        near = controls.nearest(preset, known)
        names = ", ".join(known)
        raise ConfigError(f"preset: {preset!r} is not a preset.{near} Choose one of {names}, or a YAML file.")
    return name, {k: v for k, v in values.items() if k not in ("description", "origins")}


# ---- resolving ------------------------------------------------------------------------------------------------------


def resolve(
    preset: str | None = None, overrides: dict[str, Any] | None = None, origin: str = "command line"
) -> Resolved:
    """Defaults, then the preset, then the overrides; every value with its origin.

    Args:
        preset: a shipped preset's name or a YAML file; None or "" takes `default_preset`.
        overrides: field -> value, as text where it was typed; None means "not given". A value that changes nothing
            keeps the origin it had.
        origin: who gave the overrides.

    Raises:
        ConfigError: ``problems`` has all of them, each naming its field and what is valid.
    """
    name, values = _preset_values((preset or "").strip() or default_preset())
    given = {k: v.strip() if isinstance(v, str) else v for k, v in (overrides or {}).items() if v is not None}
    given.pop("preset", None)
    base, problems = _check({**values, "preset": name}, source=f" (preset {name})")
    config, more = _check({**values, "preset": name, **given})
    problems = more or (problems if base is None and not given else [])
    if problems or config is None:
        raise ConfigError(problems)

    origins = {f: f"preset {name}" if f in values or f == "preset" else "default" for f in RunConfig.model_fields}
    for field in given:
        if base is None or getattr(config, field) != getattr(base, field):
            origins[field] = origin
    if config.needs_process and "worker" not in {**values, **given}:
        origins["worker"] = "because of num_gpus" if config.num_gpus > 1 else "because of engine"
    return Resolved(config, origins)


def resolve_file(path: str | os.PathLike[str], preset: str | None = None, overrides: dict[str, Any] | None = None,
                 origin: str = "command line") -> Resolved:  # fmt: skip
    """As `resolve`, with the values of a YAML file between the preset and the overrides.

    Args:
        path: lines of ``name: value``; a run's config.yaml is one. Its ``preset`` is the one to start from.
        preset: in place of the file's.

    Raises:
        ConfigError: the file cannot be read, or as `resolve`.
    """
    values = plain_yaml.read(Path(path).expanduser())
    return resolve_values(values, preset, overrides, origin, f"file {Path(path).name}")


def resolve_values(values: dict[str, Any], preset: str | None, overrides: dict[str, Any] | None, origin: str,
                   source: str) -> Resolved:  # fmt: skip
    """`resolve_file` of what was read of it. ``source``: the origin of its values."""
    values = {k: v for k, v in values.items() if k not in ("description", "origins", "alternatives")}
    own, given = values.pop("preset", None), overrides or {}
    if own is not None and not isinstance(own, str):
        raise ConfigError(f"preset: must be the name of a preset or a YAML file, not {shown(own)}.")
    given = {k: v for k, v in given.items() if v is not None}
    found = resolve(preset or own, {**values, **given}, origin)
    origins = {k: source if o == origin and k not in given else o for k, o in found.origins.items()}
    return Resolved(found.config, origins)


def _check(values: dict[str, Any], source: str = "") -> tuple[RunConfig | None, list[str]]:
    """(config, []) or (None, all problems). Fields that are wrong in themselves are left out of the cross-checks."""
    bad: set[str] = set()
    problems: list[str] = []
    while True:
        try:
            config = RunConfig.model_validate({k: v for k, v in values.items() if k not in bad}, context={"bad": bad})
        except ValidationError as e:
            found = controls.explain(e, values, RunConfig.model_fields)
            problems += [p + source for p in found.values()]
            bad |= found.keys()
            continue
        except ConfigError as e:
            return None, problems + [p + source for p in e.problems]
        return (None, problems) if problems else (config, [])


# ---- a run's config.yaml --------------------------------------------------------------------------------------------


def save_config(resolved: Resolved, path: str | os.PathLike[str]) -> None:
    """Write config.yaml: every value with its origin beside it, whole or not at all.

    The file is also a preset: ``--preset runs/ID/config.yaml`` trains with the same settings.
    """
    import yaml

    lines = ["# The settings of this run. The comment after each value says where it comes from."]
    for name, value in resolved.config.model_dump().items():
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
        text = text.removesuffix("...\n").rstrip("\n")  # the mark behind a document that is one word
        lines.append(f"{name}: {text}  # {resolved.origins.get(name, 'default')}")
    lines += ["", yaml.safe_dump({"origins": resolved.origins}, sort_keys=False, allow_unicode=True, width=10_000)]
    write_whole(path, "\n".join(lines), sync=True)


def load_config(path: str | os.PathLike[str]) -> Resolved:
    """Read what `save_config` wrote.

    Raises:
        ConfigError: the file cannot be read or was cut off, or its values are not valid.
    """
    values = plain_yaml.read(Path(path))
    origins = values.pop("origins", None) or {}
    origins = origins if isinstance(origins, dict) else dict.fromkeys(values, "default")
    config, problems = _check(UNNAMED | values, f" ({path})")
    if config is None:
        raise ConfigError(problems)
    if not values.keys() <= origins.keys():  # half a file is YAML too, and would train with defaults
        raise ConfigError(
            [f"The end of {path} is missing, and settings with it. Put a copy of the file there, or start a new run."]
        )
    return Resolved(config, {f: cut(str(origins.get(f, "default")), 100) for f in RunConfig.model_fields})


def as_trl(config: RunConfig) -> dict[str, Any]:
    """The values under TRL's, PEFT's and bitsandbytes' names, as ``--dry-run --json`` shows them. JSON types only.

    Our fields carry those names already; ``warmup_steps`` repeats ``warmup_ratio``: transformers 5 takes a share there.
    """
    values = config.model_dump(mode="json", exclude={"alternatives", "split_by"})
    return {**values, "warmup_steps": config.warmup_ratio, "effective_batch_size": config.effective_batch_size}


def cli_fields() -> list[controls.Control]:
    """What the command line and the interface build their controls from: one for each field, help text and range."""
    return [controls.control(name, info) for name, info in RunConfig.model_fields.items()]
