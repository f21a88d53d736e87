"""The event log of a run: append, read, fold into a RunState, thin for a plot. Standard library only.

One JSON object a line: ``{"t": unix seconds, "kind": …, ...}``; kinds: status, metric, log, checkpoint, error, used.
``clock`` has seconds of the clock that nobody sets; ``gap`` says that nobody worked on the run before this event.
Writers append whole lines; a torn last line (a writer that died, or is writing now) is left for the next read.
`event_reader` decides which line is an event.
This module knows nothing of run folders, processes or models.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from . import event_reader
from .event_reader import MARKS, STATES

TERMINAL = ("finished", "stopped", "failed", "interrupted")
STARTING, WAITING = "Starting.", "Waiting: "  # how messages begin
JUMP = 86_400  # seconds between two events: more is a clock that was set


class EventLog:
    """Appends events to one file; safe for several threads of one process and for several processes (O_APPEND)."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._lock = threading.Lock()

    def append(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Append one event and return it. Values must be JSON; NaN and infinities become null."""
        event = {"t": round(time.time(), 3), "kind": kind, **{k: _finite(v) for k, v in fields.items()}}
        event["clock"] = round(time.monotonic(), 3)
        line = json.dumps(event, ensure_ascii=False, default=str) + "\n"
        with self._lock, open(self.path, "ab+") as f:
            if f.tell() and not _ends_whole(f):  # a writer before us died in the middle of a line
                line = "\n" + line
            f.write(line.encode("utf-8", "backslashreplace"))  # names of files may be no Unicode
        return event

    def status(self, state: str, **fields: Any) -> dict[str, Any]:
        assert state in STATES, state
        return self.append("status", state=state, **fields)

    def begin(self) -> dict[str, Any]:
        """Somebody starts to work on the run: whatever was before has ended."""
        return self.status("preparing", message=STARTING, gap=True)

    def log(self, text: str, level: str = "info") -> dict[str, Any]:
        return self.append("log", text=text, level=level)

    def metric(self, step: int, **values: Any) -> dict[str, Any]:
        return self.append("metric", step=step, **values)


def _ends_whole(f: BinaryIO) -> bool:
    f.seek(-1, os.SEEK_END)
    return f.read(1) == b"\n"


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: str | os.PathLike[str], offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Events that start at or after byte ``offset``, and the offset to go on from.

    A missing file has no events. A line without its newline is not consumed; one that is no event is skipped.
    A file shorter than ``offset`` (replaced) is read from its beginning.
    """
    try:
        size = os.stat(path).st_size
        start = offset if size >= offset else 0
        end, events = start, []
        for event, end in event_reader.events(path, start, size):  # noqa: B007 - the last one is returned
            if isinstance(event["kind"], str):
                events.append(event)
    except FileNotFoundError:
        return [], 0
    return events, end


def catch_up(path: str | os.PathLike[str], offset: int, end: int, state: RunState) -> int:
    """Fold what lies between two bytes of a log into ``state``; the offset to go on from.

    Raises:
        OSError: the file cannot be opened or read.
    """
    behind = offset
    for event, behind in event_reader.events(path, offset, end, sample=True):  # noqa: B007 - the last one is returned
        fold((event,), state)
    return behind


def state_of(path: str | os.PathLike[str]) -> RunState:
    """What a log says now. Raises OSError, but a missing one says nothing."""
    state = RunState()
    with contextlib.suppress(FileNotFoundError):
        catch_up(path, 0, os.stat(path).st_size, state)
    return state


Item = TypeVar("Item")


class Recent(list[Item]):
    """The newest items of many, and how many there were."""

    KEPT = 1000

    def __init__(self, items: Iterable[Item] = ()):
        super().__init__(items)
        self.total = len(self)

    def add(self, item: Item) -> bool:
        """Whether some that were kept on purpose went."""
        self.append(item)
        self.total += 1
        if len(self) >= 2 * self.KEPT:
            del self[: -self.KEPT]
        return False

    def drop(self, wrong: Callable[[Item], bool]) -> None:
        """Take some out; they stay counted."""
        self[:] = [item for item in self if not wrong(item)]


class Rows(Recent[dict[str, Any]]):
    """Metric rows. Of a long run older ones go, so that those that stay are about evenly spread over the steps.

    Rows that begin with the same metric are thinned together: the few evaluations are not lost among the steps.
    """

    KEPT = 16_384
    SAME = 4096

    def add(self, item: dict[str, Any]) -> bool:
        """Whether older rows went."""
        self.append(item)
        self.total += 1
        if len(self) < self.KEPT:
            return False
        old, new = self[: -Recent.KEPT], self[-Recent.KEPT :]
        span = (max(r["step"] for r in old) - min(r["step"] for r in old)) / self.SAME
        many = {name for name, n in Counter(map(_first, old)).items() if n > self.SAME}
        last: dict[str, int] = {}
        kept = []
        for row in old:
            name = _first(row)
            if name not in many or not 0 <= row["step"] - last.get(name, row["step"] - span) < span:
                last[name] = row["step"]
                kept.append(row)
        self[:] = (kept if len(kept) <= 3 * self.KEPT // 4 else old[::2]) + new
        return True


def _first(row: dict[str, Any]) -> str:
    return next((name for name in row if name not in ("t", "step")), "")


@dataclass
class RunState:
    """What the events of a run say. Pure data; `fold` builds it."""

    state: str = "preparing"
    message: str = ""
    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    eta: float | None = None  # seconds
    prepared: float | None = None  # share done of what the message says, while it prepares
    started: float | None = None  # unix time of the first event
    updated: float | None = None  # unix time of the last event
    seconds: float = 0.0  # of work: stops and the time in the queue are left out
    metrics: Rows = field(default_factory=Rows)  # each has "step" and "t"; see `Rows`
    logs: Recent[dict[str, Any]] = field(default_factory=Recent)  # each has "t", "text", "level"
    checkpoints: Recent[dict[str, Any]] = field(default_factory=Recent)  # each has "step", "path" and "t"
    # (kind, one of these) in the order of the file, for `run_log`
    told: Recent[tuple[str, dict[str, Any]]] = field(default_factory=Recent)
    # what took the place of ``auto``, and the like; of the newest start
    used: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    skipped: int = 0  # lines that are no events
    problem: str = ""  # why the run cannot be read, if so
    # metric -> (metrics looked at, points)
    _series: dict[str, tuple[int, list[tuple[int, float]]]] = field(default_factory=dict, repr=False, compare=False)
    _phase: str = field(default="", repr=False, compare=False)
    # clock and time of the last event
    _clock: tuple[float | None, float | None] = field(default=(None, None), repr=False, compare=False)

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL

    def worked(self) -> float:
        """`seconds` and those since the last event, for who works on the run now."""
        clock = self._clock[0]
        return self.seconds + (max(0.0, time.monotonic() - clock) if clock is not None else 0.0)

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one metric, in order of steps; rows without it are left out."""
        known, points = self._series.get(name, (0, []))
        rows = self.metrics[known:]
        new = [(m["step"], m[name]) for m in rows if isinstance(m.get(name), int | float)]
        points = points + new if new else points  # never changed in place: other threads have it
        self._series[name] = (known + len(rows), points)
        return points

    def latest(self, name: str) -> float | None:
        for m in reversed(self.metrics):
            if (value := _number(m.get(name))) is not None:
                return value
        return None


def fold(events: Iterable[dict[str, Any]], state: RunState | None = None) -> RunState:
    """Fold events into ``state`` (changed in place) or a new RunState.

    A status event with ``resumed_from`` drops the metrics after that step: a resumed run logs them again.
    """
    state = state or RunState()
    for e in events:
        t, kind = e.get("t"), e["kind"]
        if kind is event_reader.BAD:
            state.skipped += 1
            continue
        _fold_time(state, e)
        state.started = state.started or t
        state.updated = t or state.updated
        if kind == "status":
            _fold_status(state, e)
        elif kind == "metric":
            # names interned: of a long run they would take more memory than its numbers
            row = {sys.intern(k): v for k, v in e.items() if k not in ("kind", *MARKS)}
            if state.metrics.add(row):
                state._series = {}
            state.told.add(("metric", row))
            state.step = max(state.step, int(e.get("step") or 0))
            state.epoch = _number(e.get("epoch")) or state.epoch
            state.eta = _number(e.get("eta", state.eta))
        elif kind is event_reader.PASSED:
            state.metrics.total += e["rows"]
            state.told.total += e["rows"]
            state.step = max(state.step, e["step"])
        elif kind == "log":
            _log(state, {"t": t, "text": str(e.get("text", "")), "level": e.get("level", "info")})
        elif kind == "checkpoint":
            found = {"step": e.get("step"), "path": e.get("path"), "t": t}
            state.checkpoints.add(found)
            state.told.add(("checkpoint", found))
        elif kind == "used":
            state.used = {k: v for k, v in e.items() if k not in ("kind", "t", *MARKS)}
        elif kind == "error":
            state.error = str(e.get("message", ""))
            _log(state, {"t": t, "text": state.error, "level": "error"})
    return state


def _log(state: RunState, entry: dict[str, Any]) -> None:
    state.logs.add(entry)
    state.told.add(("log", entry))


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) else None


def _fold_time(state: RunState, e: dict[str, Any]) -> None:
    """Add the time since the event before, if the run worked through it.

    By the machine's clock that nobody sets, where events have it; else by the time of day, whose jumps are left out.
    """
    clock, t = e.get("clock"), e.get("t")
    clock_before, t_before = state._clock
    if clock is None and clock_before is not None and e["kind"] is event_reader.PASSED:
        return  # the next event has it
    state._clock = (clock, t or t_before)
    if e.get("gap") or e.get("state") == "interrupted":
        return
    if e.get("state") == "preparing" and e.get("message") == STARTING and "clock" not in e:  # of an earlier version
        return
    if state.started is None or state.terminal or state.message.startswith(WAITING):
        return
    if clock is not None and clock_before is not None:
        passed, most = clock - clock_before, float("inf")
    else:
        passed, most = (t or 0) - (t_before or t or 0), JUMP
    if 0 < passed < most:
        state.seconds += passed


def _fold_status(state: RunState, e: dict[str, Any]) -> None:
    state.state = e.get("state", state.state)
    state.message = e.get("message") or ""
    state.prepared = e.get("fraction")
    phase = state.message.split(":")[0] if "fraction" in e else state.message
    if phase and state._phase != phase:
        state._phase = phase
        state.told.add(("phase", {"t": e.get("t"), "text": phase}))
    state.total_steps = e.get("total_steps") or state.total_steps
    if state.state not in TERMINAL:
        state.error = ""
    if "resumed_from" in e:  # steps after the checkpoint will come again
        step = int(e["resumed_from"] or 0)

        def later(row: dict[str, Any]) -> bool:
            return (row.get("step") or 0) > step

        state.metrics.drop(later)
        state.checkpoints.drop(later)
        state.told.drop(lambda told: told[0] in ("metric", "checkpoint") and later(told[1]))
        state._series = {}
        state.step = step
    if state.terminal:
        state.eta = None
        state.seconds = e.get("seconds") or state.seconds  # what its last message says


def thin(points: list[Item], limit: int = 400) -> list[Item]:
    """At most ``limit`` of ``points``, evenly spread, first and last kept."""
    if len(points) <= limit:
        return list(points)
    return [points[round(i * (len(points) - 1) / (limit - 1))] for i in range(limit)]


def spaced(points: list[tuple[int, float]], limit: int = 400) -> list[tuple[int, float]]:
    """At most ``limit`` of ``points`` (in order of steps), evenly spread over the steps; first and last are kept."""
    if len(points) <= limit:
        return list(points)
    first, last = points[0][0], points[-1][0]
    wanted = (first + (last - first) * i / (limit - 1) for i in range(limit))
    at = {min(bisect_left(points, step, key=lambda p: p[0]), len(points) - 1) for step in wanted}
    return [points[i] for i in sorted(at | {0, len(points) - 1})]
