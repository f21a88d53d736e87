"""A run, which is its folder. Everything is read from there, so that a reload, a second window, the command line and a
restarted app see the same. `folders` makes, lists, finds and deletes them, `start` begins the training.

A run is alive while somebody holds its lock (`locks`). One whose last status is not terminal and whose lock is free
was killed: `Run.state` then says ``interrupted`` and writes it down once.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kto_core import files, plain_text
from kto_core.errors import BusyError, ConfigError, DiskError, RunError
from kto_core.guards import bounded

from . import checkpoints, ranks
from . import locks as alive
from .events import EventLog, RunState, catch_up
from .stopping import STOP_NOW

if TYPE_CHECKING:
    from kto_core.config.resolving import Resolved

MARK = "waiting"  # in a run's folder, while it waits for its turn
PATIENCE = 20.0  # seconds that a process may take to end after its run's last word


@dataclasses.dataclass
class _Folded:
    """What is known of a run's events: the state up to ``offset`` of the file with that inode."""

    state: RunState = dataclasses.field(default_factory=RunState)
    offset: int = 0
    stamp: tuple[int, int, int] | None = None  # of the file, when it was read last
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


KEPT = 64  # runs whose state stays in memory
_folded: dict[Path, _Folded] = {}  # the one that was asked for last at the end
_registry = threading.Lock()


def _known(path: Path) -> _Folded:
    with _registry:
        known = _folded[path] = _folded.pop(path) if path in _folded else _Folded()
        while len(_folded) > KEPT:
            del _folded[next(iter(_folded))]
        return known


class Run:
    """One run folder. Cheap to make; equal when the folder is the same."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).resolve()

    @property
    def id(self) -> str:
        return plain_text.whole(self.path.name)  # a name on disk may be no Unicode

    @classmethod
    def at(cls, path: Path) -> Run:
        """The run of a path that is resolved already."""
        run = cls.__new__(cls)
        run.path = path
        return run

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and other.path == self.path

    def __hash__(self) -> int:
        return hash(self.path)

    def __repr__(self) -> str:
        return f"Run({self.id})"

    # -- reading --

    def config(self) -> Resolved:
        """The run's config.yaml. Raises ConfigError."""
        from kto_core.config.resolving import load_config

        return load_config(self.path / "config.yaml")

    def problem(self) -> str:
        """Why the run cannot be read, in one line; "" if it can."""
        try:
            self.config()
        except ConfigError as e:
            return self.settings_problem(e)
        return self.glance().problem

    def settings_problem(self, e: ConfigError) -> str:
        """What `config` raised, as `problem` says it."""
        said = getattr(e, "why", "") or e.problems[0].replace(f" ({self.path / 'config.yaml'})", "")
        return plain_text.one_line(f"config.yaml: {said.rstrip('.')}", 300)

    def state(self) -> RunState:
        """What the events say, folded incrementally; with nothing new this takes well under a millisecond.

        Events that cannot be read make it ``failed``, with the reason in ``problem`` and ``error``.
        """
        known = _known(self.path)
        with known.lock:
            state = self._catch_up(known)
            if state.terminal or state.started is None:
                return state
            if self.alive():
                if state.state != "stopping" and os.path.exists(self.path / "stop"):
                    return dataclasses.replace(state, state="stopping", message="Finishing this step, then saving.")
                return state
            if not alive.supervised(self.path):  # else its supervisor is about to say how it ended
                self._mark_interrupted(known, "the training process ended.")
            return self._catch_up(known)

    def glance(self) -> RunState:
        """`state` for a list: of a run that has ended nothing stays in memory."""
        fresh = self.path not in _folded
        state = self.state()
        if fresh and state.terminal:
            _folded.pop(self.path, None)
        return state

    def note_interrupted(self, reason: str) -> None:
        """Write down that training ended without a terminal status (for the supervisor of a child)."""
        known = _known(self.path)
        with known.lock:
            if not self._catch_up(known).terminal:
                self._mark_interrupted(known, reason)

    def _catch_up(self, known: _Folded) -> RunState:
        file = self.path / "events.jsonl"
        stamp = bounded.stamp(file)
        if stamp is None or known.stamp is None or stamp[2] != known.stamp[2] or stamp[1] < known.offset:
            known.state, known.offset = RunState(), 0  # none, or another file: begin anew
        if stamp is not None and stamp != known.stamp:
            try:
                known.offset = catch_up(file, known.offset, stamp[1], known.state)
                if known.state.skipped and known.state.started is None:
                    raise OSError(0, "none of its lines is an event")
            except OSError as e:
                why = f"events.jsonl: {bounded.reason(e)}"
                text = f"This run cannot be read: {why}."
                known.state, stamp = RunState("failed", text, error=text, problem=why), None
        known.stamp = stamp
        return known.state

    def _mark_interrupted(self, known: _Folded, reason: str) -> None:
        """Under the run's lock, so that nobody who trains is contradicted and two readers write it once.

        An error that a rank above 0 left makes it a failure: the main process waited for that one, and was ended.
        """
        try:
            alive.acquire(self.path, self.id)
        except (BusyError, DiskError):  # begun again meanwhile, or a folder that cannot be written
            known.state.state = known.state.state if self.alive() else "interrupted"
            return
        try:
            if not self._catch_up(known).terminal:
                at = f"after step {known.state.step:,}" if known.state.step else "before the first step"
                error = ranks.first_error(self.path)
                state = "failed" if error else "interrupted"
                message = error or f"Interrupted {at}: {reason} Press Resume to continue."
                events = EventLog(self.path / "events.jsonl")
                try:
                    if error:
                        events.append("error", message=error, gap=True)
                    events.status(state, message=message, gap=True)
                except OSError as e:  # shown all the same; who looks when there is room again writes it down
                    message = (
                        f"Interrupted {at}: its folder is not writable ({e.strerror}). Fix this, then press Resume."
                    )
                known.state.state, known.state.message = state, message
        finally:
            alive.release(self.path)

    def forget(self) -> None:
        """Drop what is known of the events: the folder goes, or begins anew."""
        _folded.pop(self.path, None)

    def alive(self) -> bool:
        """True while a thread or process trains this run."""
        return alive.is_alive(self.path)

    def dataset(self) -> dict[str, Any]:
        """The run's dataset.json, or {} before it is written."""
        return bounded.read_dict(self.path / "dataset.json")

    def checkpoints(self) -> list[Path]:
        """Folders of the checkpoints that were written to their end, oldest first."""
        return checkpoints.find_all(self.path / "checkpoints")

    @property
    def adapter(self) -> Path | None:
        """Folder of the finished adapter, or None."""
        for name in ("adapter", "adapter.old"):  # .old: killed between the two renames that replace it
            if bounded.is_file(self.path / name / files.MANIFEST):
                return self.path / name
        return None

    # -- changing --

    def stop(self) -> None:
        """Ask the run to finish its step, save and stop; called again, to end at once.

        Raises:
            RunError: it does not run.
        DiskError: its folder cannot be written.
        """
        if not self.alive():
            raise RunError(f"Run {self.id} is not running. `runs list` shows all runs.")
        file = self.path / "stop"
        try:
            again = file.exists()
            part = self.path / f"stop.{secrets.token_hex(4)}.part"  # two may press Stop at once
            part.write_text(STOP_NOW if again else "")
            os.replace(part, file)
        except OSError as e:
            part.unlink(missing_ok=True)
            raise DiskError.of(file, e) from e


# ---- waiting --------------------------------------------------------------------------------------------------------


def wait_for_end(run: Run, end: float | None = None) -> bool:
    """Wait while a run is over and its process is not: it holds the lock until it has ended. Whether it has."""
    end = end or time.monotonic() + PATIENCE
    while (there := run.alive()) and run.state().terminal and time.monotonic() < end:
        time.sleep(0.05)
    return not there


def waiting_since(run_dir: Path) -> int | None:
    """When the run began to wait (ns since the epoch), or None if it does not wait."""
    try:
        return int(bounded.read_text(run_dir / MARK, 100))
    except (OSError, ValueError, bounded.Unreadable):
        return None


def stop_waiting(run_dir: Path) -> None:
    """The run does not wait any more."""
    (run_dir / MARK).unlink(missing_ok=True)
