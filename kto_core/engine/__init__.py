"""The packed KTO engine: TRL's KTO loss without padding, and without computing a shared token twice.

``available(hf_config)`` says whether it serves an architecture; ``PackedKTOTrainer`` trains; ``cache_size()`` and
``clear_cache()`` look after the reference log-probs on disk. Nothing heavy is imported until it is used.
"""

from __future__ import annotations

from .reference import cache_size, clear_cache
from .support import available

__all__ = ["PackedKTOTrainer", "available", "cache_size", "clear_cache"]


def __getattr__(name: str):
    if name == "PackedKTOTrainer":
        from .trainer import PackedKTOTrainer

        return PackedKTOTrainer
    raise AttributeError(name)
