"""What the phases of a run share."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kto_core.jobs import Progress
from kto_core.planning.advice import helps_most
from kto_core.planning.training_data import Planned

if TYPE_CHECKING:
    from kto_core.config.run_config import RunConfig
    from kto_core.runs.events import EventLog
    from kto_core.runs.stopping import StopWatch


@dataclass(frozen=True)
class RunContext:
    """One run in this process: its settings and folder, who is told and who may stop it, its rows and tokenizer."""

    config: RunConfig
    run_dir: Path
    events: EventLog
    watch: StopWatch
    progress: Progress
    data: Planned
    tokenizer: Any

    def advice(self) -> str:
        """The change that helps most where memory is short."""
        return helps_most(self.config, self.data.lengths)


@dataclass
class StatusProgress:
    """``progress(fraction, text)`` of long work as status events: a new text at once, numbers every second.

    Attributes:
        state: of the events. what: stands before each text.
    """

    events: EventLog
    state: str
    what: str = ""
    last: float = 0.0
    head: str = ""

    def __call__(self, fraction: float | None, text: str) -> None:
        head = text.split(":")[0]
        if head != self.head or time.monotonic() - self.last > 1:
            self.head, self.last = head, time.monotonic()
            share = {} if fraction is None else {"fraction": round(fraction, 3)}
            self.events.status(self.state, message=self.what + text, **share)
