"""All runs of this machine in short, cheap to ask each second however many there are.

What a run that has ended says does not change, so it is read once and known by its files' stamps: in this process, and
beside the runs for the next one. That file is a note only: whose stamps differ is read anew, and without it all are.
What may change is looked at each time: runs that have not ended, and the newest. The others take turns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kto_core import labels, plain_text
from kto_core.errors import ConfigError
from kto_core.guards import bounded
from kto_core.paths import runs_dir

from .events import TERMINAL
from .folders import ELSEWHERE, first_of, list_runs
from .run import Run

Stamp = tuple[int, int, int]  # of `bounded.stamp`

NOTE = ".runs.json"  # in the runs folder
NOTE_BYTES = 1 << 26
WORTH = 50  # runs that are not in the note before it is written
NEWEST, TURN = 30, 100  # runs that are looked at each time, and those whose turn it is
WHOLE = 30.0  # seconds between two lists of the folder that nothing asked for
RECENT = 3.0  # seconds: a folder may change again without another time of change
TOLD = 10.0  # seconds between two times that lines of runs just read are told: the list is sent as a whole
BUDGET = 0.3  # seconds to read runs that are not known yet, each time


@dataclass(frozen=True)
class Brief:
    """What a line of a list says of a run."""

    state: str
    step: int
    total_steps: int
    loss: float | None
    model: str  # or "cannot be read: why"
    preset: str | None
    started: float | None
    updated: float | None
    error: str
    problem: str  # why it cannot be read, or ""
    name: str  # in its settings, or ""
    data: str  # its data set in short
    changed: tuple[tuple[str, str], ...]  # (setting, value) of those that no preset decided
    rate: float | None  # peak learning rate, None while it is being found
    eval_loss: float | None  # of the rows that are held out, the newest
    margin: float | None  # theirs, of rewards
    seconds: float  # of work
    memory: float | None  # GiB reserved on the GPU at most

    @classmethod
    def restored(cls, values: list[Any]) -> Brief:
        """From a note. Raises TypeError, ValueError for what is none."""
        made = cls(*values)
        pairs = tuple((name, value) for name, value in made.changed)
        made = dataclasses.replace(made, changed=pairs)
        texts = [made.state, made.model, made.error, made.problem, made.preset or "", made.name, made.data]
        texts += [text for pair in pairs for text in pair]
        numbers = [made.step, made.total_steps, made.seconds]
        numbers += [made.loss or 0, made.started or 0, made.updated or 0, made.rate or 0, made.eval_loss or 0]
        numbers += [made.margin or 0, made.memory or 0]
        if made.state not in TERMINAL or not all(isinstance(v, str) for v in texts):
            raise ValueError(values)
        if not all(isinstance(v, int | float) and abs(v) < 2**60 for v in numbers):
            raise ValueError(values)
        return made


class Settings(NamedTuple):
    """What a list says of a run's settings."""

    model: str
    preset: str | None
    name: str
    data: str
    changed: tuple[tuple[str, str], ...]
    rate: float | None  # None: it is found, or computed
    problem: str  # why they cannot be read


def brief(r: Run, settings: Settings | None = None) -> Brief:
    """Read a run's folder. What cannot be read is the brief's ``problem``: nothing is raised.

    Args:
        settings: `settings_of` the run, where they are known.
    """
    state = r.glance()
    found = settings or settings_of(r)
    problem = found.problem or state.problem
    model = f"cannot be read: {problem}" if problem else found.model
    used = state.used.get("learning_rate")
    usable = isinstance(used, int | float) and not isinstance(used, bool)
    return Brief(
        state.state, state.step, state.total_steps, state.latest("loss"), model, found.preset, state.started,
        state.updated, state.error or (model if problem else ""), problem, found.name, found.data, found.changed,
        used if usable and found.rate is None else found.rate, state.latest("eval_loss"),
        state.latest("eval_rewards/margins"), state.seconds,
        max((gib for _, gib in state.series("gpu_memory")), default=None),
    )  # fmt: skip


def settings_of(r: Run) -> Settings:
    """What a list says of a run's settings; without them, why they cannot be read."""
    from kto_core.config import sharing

    try:
        found = r.config()
    except ConfigError as e:
        return Settings("", None, "", "", (), None, r.settings_problem(e))
    config, rate = found.config, found.config.learning_rate
    changed = tuple((name, plain_text.cut(value, 100)) for name, value in sharing.changed(found).items())
    return Settings(
        config.model, config.preset, plain_text.one_line(config.run_name), sharing.data_name(config), changed,
        None if isinstance(rate, str) else rate, "",
    )  # fmt: skip


@dataclass
class _Entry:
    run: Run
    files: tuple[Stamp | None, ...] = ()  # stamps of config.yaml and events.jsonl
    folders: tuple[int, ...] = ()  # times of the folder, and of its checkpoints
    settings: Settings | None = None  # `settings_of`
    brief: Brief | None = None  # None: to be read
    label: labels.Label | None = None  # None: to be read
    line: tuple[object, ...] | None = None  # what a list shows of it
    models: tuple[bool, bool] | None = None  # an adapter, a checkpoint
    noted: bool = False

    @property
    def settled(self) -> bool:
        """Nothing changes but by a file."""
        return self.brief is not None and (self.brief.state in TERMINAL or self.files[1] is None)


class RunList:
    """The runs of one runs folder. Safe for several threads."""

    def __init__(self) -> None:
        self.root = runs_dir()
        self.changes = 0  # grows when the list would read differently
        self.file_changes = 0  # grows when a run comes or goes, or something comes into its folder
        self._order: list[_Entry] = []  # newest first
        self._entries: dict[Path, _Entry] = {}
        self._by_id: dict[str, Run] = {}
        self._lock = threading.RLock()
        self._listed: tuple[object, float] = (None, -WHOLE)  # the folder's stamps, and when
        self._turn = self._unnoted = 0
        self._untold, self._told = False, -TOLD  # whether lines were read since, and when
        self._note = _read_note(self.root)

    # -- asking --

    def runs(self) -> list[Run]:
        """Newest first."""
        return [e.run for e in self._order]

    def find(self, run_id: str) -> Run | None:
        return self._by_id.get(run_id)

    def newest(self) -> Run | None:
        return self._order[0].run if self._order else None

    def brief(self, r: Run) -> Brief | None:
        """None of one that was not read yet, or is not listed."""
        found = self._entries.get(r.path)
        return found.brief if found else None

    def folder_time(self, r: Run) -> int:
        """Changes when a file comes into the run's folder, or goes."""
        found = self._entries.get(r.path)
        return found.folders[0] if found and found.folders else 0

    def label(self, r: Run) -> labels.Label:
        """The tags and the note that its user gave it."""
        found = self._entries.get(r.path)
        return found.label or labels.NONE if found else labels.NONE

    def name(self, r: Run) -> str:
        """The one that its user gave it last, or ""."""
        known = self.brief(r)
        return self.label(r).name or (known.name if known else "")

    def title(self, run: Run) -> str:
        """How a list calls a run: by its name, if it has one, and its id."""
        name = self.name(run)
        return f"{name} · {run.id}" if name else run.id

    def models(self) -> list[tuple[Run, bool, bool, str]]:
        """(run, has an adapter, has a checkpoint, why it cannot be read) of those with either, newest first."""
        found = []
        with self._lock:
            for e in self._order:
                if e.models is None:
                    e.models = (e.run.adapter is not None, bool(e.run.checkpoints()))
                if any(e.models):
                    found.append((e.run, *e.models, e.brief.problem if e.brief else ""))
        return found

    def active(self) -> Run | None:
        """As `run.active`, of the runs whose last word is not an end."""
        with self._lock:
            going = [e.run for e in self._order if e.brief is not None and not e.settled]
        return first_of(r for r in going if r.alive())

    # -- looking --

    def look(self, *, whole: bool = False, patient: bool = False) -> None:
        """See what is new.

        Args:
            whole: look at every run now.
            patient: read all that are not known, however long it takes.
        """
        with self._lock:
            self._list(whole)
            for entry in self._order if whole else self._whose_turn():
                self._see(entry)
            self._read(None if patient else time.monotonic() + BUDGET)
            if self._unnoted >= WORTH and self._all_read():  # not at every look: it changes the folder, too
                self._write_note()

    def _list(self, whole: bool) -> None:
        """The folders, where they may have changed."""
        stamps = (bounded.stamp(self.root), bounded.stamp(self.root / ELSEWHERE))
        recent = stamps[0] is not None and abs(time.time() - stamps[0][0] / 1e9) < RECENT
        now = time.monotonic()
        if not (whole or recent or stamps != self._listed[0] or now - self._listed[1] > WHOLE):
            return
        self._listed = (stamps, now)
        found = list_runs()
        if found == [e.run for e in self._order]:
            return
        self._entries = {r.path: self._entries.get(r.path) or _Entry(r) for r in found}
        self._order = list(self._entries.values())
        self._by_id = {r.id: r for r in reversed(found)}
        self.changes += 1
        self.file_changes += 1

    def _whose_turn(self) -> list[_Entry]:
        rest = [e for e in self._order[NEWEST:] if e.settled]
        going = [e for e in self._order[NEWEST:] if not e.settled]
        begin = self._turn if self._turn < len(rest) else 0
        self._turn = begin + TURN
        return self._order[:NEWEST] + going + rest[begin : self._turn]

    def _see(self, e: _Entry) -> None:
        path = e.run.path
        files = (bounded.stamp(path / "config.yaml"), bounded.stamp(path / "events.jsonl"))
        folders = (_time(path), _time(path / "checkpoints"))
        if folders != e.folders:
            e.folders, e.models, e.label = folders, None, None  # a label comes by a new file
            self.file_changes += 1
        if files != e.files:
            if not e.files or files[0] != e.files[0]:
                e.settings = None
            e.files, e.brief, e.noted = files, None, False

    def _read(self, end: float | None) -> None:
        for e in self._order:
            if e.files and e.label is None:
                e.label = labels.read(e.run.path)
                self._tell(e)
            if e.settled or not e.files:
                continue
            known = self._note.get(_name(e.run, self.root)) if e.brief is None else None
            if known is not None and known[0] == e.files:
                e.brief, e.noted = known[1], True
            elif end is not None and e.line is None and time.monotonic() > end:
                break  # the others next time
            else:
                e.settings = e.settings or settings_of(e.run)
                e.brief = brief(e.run, e.settings)
                self._unnoted += self._worth_noting(e)
            self._tell(e)
        if self._untold and (self._all_read() or time.monotonic() - self._told > TOLD):
            self._untold, self._told = False, time.monotonic()
            self.changes += 1

    def _tell(self, e: _Entry) -> None:
        """Note whether the list reads differently by this run."""
        line = _line(e.brief, e.label) if e.brief is not None else e.line
        if line != e.line:
            if e.line is None:
                self._untold = True
            else:
                self.changes += 1
            e.line = line

    def _all_read(self) -> bool:
        return all(e.line is not None for e in self._order)

    # -- the note --

    def _worth_noting(self, e: _Entry) -> bool:
        """It has ended, and its files are those that were read."""
        if e.noted or e.brief is None or e.brief.state not in TERMINAL or e.brief.problem or None in e.files:
            return False
        e.noted = e.files == tuple(bounded.stamp(e.run.path / name) for name in ("config.yaml", "events.jsonl"))
        return e.noted

    def _write_note(self) -> None:
        noted = {
            _name(e.run, self.root): [e.files, dataclasses.astuple(e.brief)]
            for e in self._order
            if e.noted and e.brief is not None
        }
        self._unnoted = 0
        with contextlib.suppress(OSError):  # a folder that cannot be written: they are read again next time
            bounded.put_json(self.root / NOTE, noted)


def _line(b: Brief, label: labels.Label | None) -> tuple[object, ...]:
    """What a list shows of a run; of one that goes on, not its steps."""
    return b.state, b.step if b.state in TERMINAL else 0, b.problem, label


def _time(path: Path) -> int:
    stamp = bounded.stamp(path)
    return stamp[0] if stamp else 0


def _name(r: Run, root: Path) -> str:
    return plain_text.whole(r.path.name if r.path.parent == root else str(r.path))


def _read_note(root: Path) -> dict[str, tuple[tuple[Stamp, ...], Brief]]:
    """What was noted of runs that had ended: name -> (stamps of its files, brief). Whatever is none is left out."""
    try:
        values = bounded.read_json(root / NOTE, NOTE_BYTES)
    except (OSError, bounded.Unreadable):
        return {}
    found = {}
    for name, value in values.items() if isinstance(values, dict) else ():
        with contextlib.suppress(TypeError, ValueError):
            stamps, said = value
            found[name] = (tuple(tuple(stamp) for stamp in stamps), Brief.restored(said))
    return found
