"""The event log of a run: append, read, fold into a RunState, thin for a plot. Standard library only.

One JSON object a line: ``{"t": unix seconds, "kind": …, ...}``; kinds: status, metric, log, checkpoint, error, used.
Writers append whole lines; a torn last line (a writer that died, or is writing now) is left for the next read.
This module knows nothing of run folders, processes or models.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

STATES = ("preparing", "training", "stopping", "finished", "stopped", "failed", "interrupted")
TERMINAL = ("finished", "stopped", "failed", "interrupted")


class EventLog:
    """Appends events to one file; safe for several threads of one process and for several processes (O_APPEND)."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._lock = threading.Lock()

    def append(self, kind: str, **fields) -> dict:
        """Append one event and return it. Values must be JSON; NaN and infinities become null."""
        event = {"t": round(time.time(), 3), "kind": kind, **{k: _finite(v) for k, v in fields.items()}}
        line = json.dumps(event, ensure_ascii=False, default=str) + "\n"
        with self._lock, open(self.path, "ab+") as f:
            if f.tell() and not _ends_whole(f):  # a writer before us died in the middle of a line
                line = "\n" + line
            f.write(line.encode("utf-8", "backslashreplace"))  # names of files may be no Unicode
        return event

    def status(self, state: str, **fields) -> dict:
        assert state in STATES, state
        return self.append("status", state=state, **fields)

    def log(self, text: str, level: str = "info") -> dict:
        return self.append("log", text=text, level=level)

    def metric(self, step: int, **values) -> dict:
        return self.append("metric", step=step, **values)


def _ends_whole(f) -> bool:
    f.seek(-1, os.SEEK_END)
    return f.read(1) == b"\n"


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: str | os.PathLike, offset: int = 0) -> tuple[list[dict], int]:
    """Events that start at or after byte ``offset``, and the offset to go on from.

    A missing file has no events. A line without its newline is not consumed; a broken line inside is skipped.
    A file shorter than ``offset`` (replaced) is read from its beginning.
    """
    try:
        with open(path, "rb") as f:
            size = f.seek(0, os.SEEK_END)
            if size < offset:
                offset = 0
            f.seek(offset)
            data = f.read()
    except FileNotFoundError:
        return [], 0
    end = data.rfind(b"\n") + 1
    events = []
    for line in data[:end].splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_event(event):
            events.append(event)
    return events, offset + end


def _is_event(event) -> bool:
    """Of the right types; numbers that are none would break every reader."""
    if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
        return False
    return all(isinstance(event.get(name) or 0, int | float) for name in ("t", "step", "resumed_from"))


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
    metrics: list[dict] = field(default_factory=list)  # each has "step" and "t"
    logs: list[dict] = field(default_factory=list)  # each has "t", "text", "level"
    phases: list[dict] = field(default_factory=list)  # each has "t" and "text": what status events said, numbers apart
    checkpoints: list[dict] = field(default_factory=list)  # each has "step", "path" and "t"
    used: dict = field(default_factory=dict)  # what took the place of ``auto``, and the like; of the newest start
    error: str = ""
    _series: dict = field(default_factory=dict, repr=False, compare=False)  # metric -> (metrics looked at, points)

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one metric, in order of steps; rows without it are left out."""
        known, points = self._series.get(name, (0, []))
        new = [(m["step"], m[name]) for m in self.metrics[known:] if isinstance(m.get(name), int | float)]
        points = points + new if new else points  # never changed in place: other threads have it
        self._series[name] = (len(self.metrics), points)
        return points

    def latest(self, name: str) -> float | None:
        for m in reversed(self.metrics):
            if isinstance(m.get(name), int | float):
                return m[name]
        return None


def fold(events: Iterable[dict], state: RunState | None = None) -> RunState:
    """Fold events into ``state`` (changed in place) or a new RunState.

    A status event with ``resumed_from`` drops the metrics after that step: a resumed run logs them again.
    """
    state = state or RunState()
    for e in events:
        t, kind = e.get("t"), e["kind"]
        state.started = state.started or t
        state.updated = t or state.updated
        if kind == "status":
            _fold_status(state, e)
        elif kind == "metric":
            # names interned: of a long run they would take more memory than its numbers
            state.metrics.append({sys.intern(k): v for k, v in e.items() if k != "kind"})
            state.step = max(state.step, int(e.get("step") or 0))
            state.epoch = e.get("epoch") or state.epoch
            state.eta = e.get("eta", state.eta)
        elif kind == "log":
            state.logs.append({"t": t, "text": str(e.get("text", "")), "level": e.get("level", "info")})
        elif kind == "checkpoint":
            state.checkpoints.append({"step": e.get("step"), "path": e.get("path"), "t": t})
        elif kind == "used":
            state.used = {k: v for k, v in e.items() if k not in ("kind", "t")}
        elif kind == "error":
            state.error = str(e.get("message", ""))
            state.logs.append({"t": t, "text": state.error, "level": "error"})
    return state


def _fold_status(state: RunState, e: dict) -> None:
    state.state = e.get("state", state.state)
    state.message = e.get("message", "")
    state.prepared = e.get("fraction")
    phase = state.message.split(":")[0] if "fraction" in e else state.message
    if phase and (not state.phases or state.phases[-1]["text"] != phase):
        state.phases.append({"t": e.get("t"), "text": phase})
    state.total_steps = e.get("total_steps") or state.total_steps
    if state.state not in TERMINAL:
        state.error = ""
    if "resumed_from" in e:  # steps after the checkpoint will come again
        step = int(e["resumed_from"] or 0)
        state.metrics = [m for m in state.metrics if m.get("step", 0) <= step]
        state._series = {}
        state.checkpoints = [c for c in state.checkpoints if (c["step"] or 0) <= step]
        state.step = step
    if state.terminal:
        state.eta = None


def thin(points: list, limit: int = 400) -> list:
    """At most ``limit`` of ``points``, evenly spread, first and last kept."""
    if len(points) <= limit:
        return list(points)
    return [points[round(i * (len(points) - 1) / (limit - 1))] for i in range(limit)]
