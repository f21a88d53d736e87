"""Where things lie: the runs folder, the cache. Both move by an environment variable. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ROOT / "presets"
EXAMPLES = ROOT / "examples"


def runs_dir() -> Path:
    """``$KTO_STUDIO_RUNS``, else ``runs`` in the working directory. Made by whoever writes."""
    return Path(os.environ.get("KTO_STUDIO_RUNS") or "runs").expanduser().resolve()


def cache_dir() -> Path:
    """``$KTO_STUDIO_CACHE``, else ``~/.cache/kto-studio``: demo model, GGUF converter, reference log-probs."""
    return Path(os.environ.get("KTO_STUDIO_CACHE") or "~/.cache/kto-studio").expanduser().resolve()


def data_dir() -> Path:
    """``$KTO_STUDIO_DATA``, else ``data`` beside the runs folder: uploaded files and feedback from the chat."""
    return Path(os.environ.get("KTO_STUDIO_DATA") or runs_dir().parent / "data").expanduser().resolve()
