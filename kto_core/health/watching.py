"""The rules beside a training: asked now and then, each kind of finding is said once."""

from __future__ import annotations

from typing import Any

from kto_core.runs.events import RunState, fold

from .about import WARNING, About, Finding
from .rules import findings

EVERY, SHARE = 5, 20  # metrics between two looks: so many, and of many a twentieth


class HealthWatch:
    """Folds a run's events as they are written, and looks at them.

    Args:
        state: what the events said before this start; changed in place.

    Attributes:
        said: kinds of findings that the log has.
    """

    def __init__(self, about: About, state: RunState):
        self.about, self.state = about, state
        self.said: set[str] = {"lengths"}  # the data report says it
        self._next = 0

    def look(self, *events: dict[str, Any], last: bool = False) -> list[Finding]:
        """Warnings that were not said yet. ``last``: look in any case, as after an evaluation."""
        fold(events, self.state)
        total = self.state.metrics.total
        evaluated = any("eval_loss" in e for e in events)
        if not (last or evaluated or total >= self._next):
            return []
        self._next = total + max(EVERY, total // SHARE)
        new = [f for f in findings(self.state, self.about) if f.level == WARNING and f.kind not in self.said]
        self.said.update(f.kind for f in new)
        return new
