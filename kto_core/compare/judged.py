"""The verdicts of all runs in short, cheap to ask again however many there are.

Kept by the stamps of the verdict and of the adapter that it is about, in this process and in a note beside the runs
for the next one. A note that is of another form is not used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kto_core import plain_text
from kto_core.guards import bounded
from kto_core.verdict import judging, keeping

NOTE = ".verdicts.json"  # in the runs folder
NOTE_BYTES = 1 << 24
WORTH = 20  # verdicts that are not in the note before it is written


@dataclass(frozen=True)
class Short:
    """A verdict in a line of a table.

    Attributes:
        word: of `judging.WORDS`. margin: of rewards, on rows that were not trained on; interval: its 95 % interval.
        loss: on the same rows.
    """

    word: str
    margin: float | None = None
    interval: tuple[float, float] | None = None
    loss: float | None = None

    @classmethod
    def restored(cls, values: list[Any]) -> Short:
        """From a note. Raises TypeError, ValueError for what is none."""
        word, margin, interval, loss = values
        pair = None if interval is None else (float(interval[0]), float(interval[1]))
        numbers = [margin, loss, *(pair or ())]
        if word not in judging.WORDS or not all(v is None or math.isfinite(v) for v in numbers):
            raise ValueError(values)
        return cls(word, margin, pair, loss)


class Judged:
    """What is known of the verdicts of one runs folder. Safe for several threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[Path, tuple[object, list, Short | None]] = {}  # the cheap stamp, the true one, the verdict
        self._note = _read_note(root)
        self._unnoted = 0
        self._unread: set[Path] = set()
        self._lock = threading.Lock()

    def of(self, run, stamp: object = None, end: float | None = None) -> Short | None:
        """The verdict on a `run.Run`; None: not judged, or not read yet.

        Args:
            stamp: changes when a file comes into the run's folder: with the same one nothing is looked at.
            end: of `time.monotonic`; past it, what is not known stays unread.
        """
        known = self._known.get(run.path)
        if known is not None and stamp is not None and known[0] == stamp:
            return known[2]
        key = _plain(keeping.key(run))
        if known is None or known[1] != key:
            noted = self._note.get(plain_text.whole(str(run.path))) if known is None and key[0] else None
            if noted is not None and noted[0] == key:
                known = (stamp, key, noted[1])
            elif key[0] and end is not None and time.monotonic() > end:
                self._unread.add(run.path)
                return known[2] if known else None
            else:
                known = (stamp, key, short(run) if key[0] else None)
                self._unnoted += bool(key[0])
        self._unread.discard(run.path)
        self._known[run.path] = (stamp, *known[1:])
        return known[2]

    def pending(self, run) -> bool:
        """Whether its verdict was not read for want of time."""
        return run.path in self._unread

    def keep(self) -> None:
        """Write the note, if that is worth it."""
        with self._lock:
            if self._unnoted < WORTH:
                return
            self._unnoted = 0
            said = {
                plain_text.whole(str(path)): [key, dataclasses.astuple(verdict)]
                for path, (_, key, verdict) in list(self._known.items())
                if verdict is not None
            }
            with contextlib.suppress(OSError):
                bounded.put_json(self.root / NOTE, said)


def short(run) -> Short | None:
    """Read a run's verdict."""
    found = keeping.read(run)
    if found is None:
        return None
    interval = found["margin_interval"]
    return Short(
        found["verdict"]["word"],
        found["rewards/margins"],
        (interval[0], interval[1]) if interval else None,
        found["loss"],
    )


def _plain(key: tuple) -> list:
    """As JSON has it."""
    return [list(stamp) if stamp else None for stamp in key]


def _read_note(root: Path) -> dict[str, tuple[list, Short]]:
    try:
        values = bounded.read_json(root / NOTE, NOTE_BYTES)
    except (OSError, bounded.Unreadable):
        return {}
    found = {}
    for path, value in values.items() if isinstance(values, dict) else ():
        with contextlib.suppress(TypeError, ValueError, IndexError, OverflowError):
            key, said = value
            found[path] = (key, Short.restored(said))
    return found
