"""Before an export begins: disk and memory have room (refusals have numbers)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from kto_core.errors import DiskError, HardwareError

RESERVE = 100e6  # bytes left free


def require_disk(folder: Path, needed: float, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed + RESERVE > free:
        raise DiskError(
            f"Not enough disk space. {what}: {(needed + RESERVE) / 1e9:.1f} GB; free in {folder}: {free / 1e9:.1f} "
            "GB. Free up disk space, or choose fewer files."
        )


def require_memory(parameters: int, quantized: str, base: Path) -> None:
    """The merge holds the whole model, in the dtype of its files, and a converted copy of it for a moment."""
    import psutil

    own = json.loads((base / "config.json").read_text(encoding="utf-8"))
    full = (own.get("dtype") or own.get("torch_dtype")) == "float32"
    per_weight = 6.0 if full else 2.7 if quantized else 2.2
    needed, free = parameters * per_weight + 1e9, psutil.virtual_memory().available
    if needed > free:
        raise HardwareError(
            f"The merge needs about {needed / 1e9:.1f} GB of CPU memory, but only {free / 1e9:.1f} GB are free. "
            "Close other programs, or merge on a machine with more memory."
        )
