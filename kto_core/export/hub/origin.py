"""What a base model is called by others, and its licence and languages as its publisher states them, never guessed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kto_core.guards import bounded
from kto_core.models import demo_model, hub_files
from kto_core.models.facts import DEMO, public_name
from kto_core.paths import cache_dir, is_hub_id

STATED = ("license", "license_name", "license_link", "language")
LONGEST = 200  # characters of one of them


def of_base(model: str) -> dict[str, Any]:
    """What the card of a base model on this machine states, of `STATED`; {} if there is none.

    Args:
        model: its name in the run's settings.
    """
    folder = Path(model).expanduser()
    demo = cache_dir() / "demo" / demo_model.FOLDER
    place = folder if folder.is_dir() else demo if model == DEMO else hub_files.cached_folder(model)
    return {} if place is None else stated(_text(place / "README.md")) or _demo(place)


def base_name(model: str) -> str:
    """The base's name for others: a Hub id as it is, of a folder only its last part (paths stay private)."""
    name = public_name(model)
    return name if is_hub_id(name) and not Path(model).expanduser().is_dir() else Path(name).name


def stated(card: str) -> dict[str, Any]:
    """What a model card's YAML header states. A header that is none states nothing."""
    import yaml

    header = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    try:
        data = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:
        return {}
    if not isinstance(data, dict):
        return {}
    return {name: value for name in STATED if (value := _plain(data.get(name)))}


def _plain(value: object) -> str | list[str] | None:
    """A short text, or a list of them."""
    if isinstance(value, str):
        return value.strip()[:LONGEST]
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return [v.strip()[:LONGEST] for v in value[:50]]
    return None


def _demo(folder: Path) -> dict[str, Any]:
    """The demo model comes without a card; its manifest has the licence."""
    noted = bounded.read_dict(folder / "manifest.json").get("license")
    return {"license": noted.lower()} if isinstance(noted, str) else {}


def _text(file: Path) -> str:
    try:
        return bounded.read_text(file)
    except (OSError, bounded.Unreadable):
        return ""


def name_of(found: dict[str, Any]) -> str:
    """The licence in one line, or ""."""
    name = found.get("license_name") or found.get("license") or ""
    name = ", ".join(name) if isinstance(name, list) else name
    link = found.get("license_link")
    return f"{name} ({link})" if name and isinstance(link, str) and link.startswith("https://") else str(name)
