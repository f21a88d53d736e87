"""A row of facts for each run: what a table of runs shows, sorts and filters by."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from kto_core.runs.run import Run
from kto_core.runs.run_list import Brief, RunList

from .judged import Judged, Short

BUDGET = 0.3  # seconds to read verdicts that are not known yet, each time


@dataclass(frozen=True)
class Facts:
    """What a table says of a run. Texts are of one line; None and "": not known, or not there.

    Attributes:
        state: of `RunState`; "" of one that was not read yet.
        changed: (setting, value) of those that no preset decided. rate: peak learning rate.
        loss: of the newest training step. eval_loss, margin: of rows that were not trained on; interval: the margin's
        95 % interval. verdict: of `judging.WORDS`. seconds: of work. memory: GiB. started: unix time.
        problem: why the run cannot be read.
    """

    id: str
    name: str = ""
    state: str = ""
    step: int = 0
    total_steps: int = 0
    data: str = ""
    preset: str = ""
    model: str = ""
    changed: tuple[tuple[str, str], ...] = ()
    rate: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    margin: float | None = None
    interval: tuple[float, float] | None = None
    verdict: str = ""
    seconds: float | None = None
    memory: float | None = None
    tags: tuple[str, ...] = ()
    note: str = ""
    started: float | None = None
    problem: str = ""

    @property
    def title(self) -> str:
        """Its name, else its id."""
        return self.name or self.id

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        pairs = {"interval": list(self.interval) if self.interval else None, "tags": list(self.tags)}
        return asdict(self) | {"changed": dict(self.changed)} | pairs


class Table:
    """The facts of all runs that a `RunList` knows. Asked again, only what changed is made anew."""

    def __init__(self, known: RunList) -> None:
        self.known = known
        self._judged = Judged(known.root)
        self._made: dict[str, tuple[tuple, Facts]] = {}
        self._lock = threading.Lock()
        self.pending = False  # verdicts are still to be read

    def facts(self, *, patient: bool = False) -> list[Facts]:
        """Newest first.

        Args:
            patient: read all verdicts, however long it takes.
        """
        end = None if patient else time.monotonic() + BUDGET
        with self._lock:
            self.pending = False
            runs = self.known.runs()
            found = [self._fact(run, end) for run in runs]
            self._made = {run.id: self._made[run.id] for run in runs}
            self._judged.keep()
            return found

    def of(self, ids: Iterable[str]) -> list[Facts]:
        """Of these runs, in this order; whose run is not there is left out."""
        runs = [run for name in ids if (run := self.known.find(name)) is not None]
        with self._lock:
            return [self._fact(run, None) for run in runs]

    def _fact(self, run: Run, end: float | None) -> Facts:
        brief, label = self.known.brief(run), self.known.label(run)
        stamp = (self.known.folder_time(run), brief.step) if brief else None  # more training: another adapter
        verdict = self._judged.of(run, stamp, end)
        self.pending |= self._judged.pending(run)
        of, before = (brief, label, verdict), self._made.get(run.id)
        if before is None or not all(a is b for a, b in zip(before[0], of, strict=True)):
            before = self._made[run.id] = (of, facts_of(run.id, brief, label, verdict))
        return before[1]


def facts_of(run_id: str, brief: Brief | None, label, verdict: Short | None = None) -> Facts:
    """The row of one run. Pure.

    Args:
        brief: None: not read yet. label: of `kto_core.labels`.
    """
    if brief is None:
        return Facts(run_id, label.name, tags=label.tags, note=label.note)
    judged = verdict or Short("")
    return Facts(
        run_id,
        label.name or brief.name,
        brief.state,
        brief.step,
        brief.total_steps,
        brief.data,
        brief.preset or "",
        "" if brief.problem else brief.model,
        brief.changed,
        brief.rate,
        brief.loss,
        judged.loss if brief.eval_loss is None else brief.eval_loss,
        brief.margin if judged.margin is None else judged.margin,
        judged.interval,
        judged.word,
        brief.seconds or None,
        brief.memory,
        label.tags,
        label.note,
        brief.started,
        brief.problem,
    )
