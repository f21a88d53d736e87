"""Which run an adapter comes from, and which adapter that run went on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .events import state_of


def adapter_origin(folder: str | Path) -> dict[str, Any]:
    """Where an adapter comes from, without a path of this machine: the id of its ``run`` (and the ``checkpoint``), else
    the last part of its ``folder``. ``began_from``, if that run noted one, is the same of the adapter it went on from.
    """
    path = Path(folder).expanduser().resolve()
    of_checkpoint = path.parent.name == "checkpoints"
    run = path.parents[1] if of_checkpoint else path.parent
    if not all((run / name).is_file() for name in ("config.yaml", "events.jsonl")):
        return {"folder": path.name}
    earlier = state_of(run / "events.jsonl").used.get("began_from")
    return (
        {"run": run.name}
        | ({"checkpoint": path.name} if of_checkpoint else {})
        | ({"began_from": earlier} if isinstance(earlier, dict) and earlier else {})
    )
