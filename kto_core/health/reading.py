"""A run's folder -> its findings: what the page and the command line show."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from kto_core.errors import ConfigError
from kto_core.guards import bounded
from kto_core.runs.run import Run

from .about import About, Finding
from .rules import findings


def of_run(run: Run) -> list[Finding]:
    """What a run's log says now; [] where its settings cannot be read, or nothing was logged."""
    state = run.state()
    if state.problem or not (state.metrics or state.error):
        return []
    rate = state.used.get("learning_rate")
    files = tuple(bounded.stamp(run.path / name) for name in ("config.yaml", "dataset.json"))
    about = _about(run.path, files, rate if isinstance(rate, float) else None)
    return findings(state, about) if about else []


@lru_cache(maxsize=32)
def _about(path: Path, stamps: tuple, rate: float | None) -> About | None:
    """Read once for as long as the files stay as they are."""
    run = Run.at(path)
    try:
        return About.of(run.config().config, run.dataset(), rate)
    except ConfigError:
        return None
