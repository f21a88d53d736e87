"""Run folders: create, start, stop, resume, list, find, delete. Everything is read from the folder, so that a reload, a
second window, the command line and a restarted app see the same.

A run is alive while somebody holds its lock (`kto_core.alive`). One whose last status is not terminal and whose lock is
free was killed: `Run.state` then says ``interrupted`` and writes it down once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from . import alive, checkpoints, ranks, run_queue
from .errors import BusyError, DiskError, RunError
from .events import EventLog, RunState, fold, read
from .paths import runs_dir
from .run_workers import in_process, in_thread, supervised
from .stopping import STOP_NOW

if TYPE_CHECKING:
    from .config import Resolved

ELSEWHERE = "elsewhere.json"  # in the runs folder: run folders that lie outside it
OURS = ("waiting", "events.jsonl", "dataset.json", "stop", "train.log", "worker.log")


@dataclasses.dataclass
class _Folded:
    """What is known of a run's events: the state up to ``offset`` of the file with that inode."""

    state: RunState = dataclasses.field(default_factory=RunState)
    offset: int = 0
    inode: int = 0
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


_folded: dict[Path, _Folded] = {}
_registry = threading.Lock()


class Run:
    """One run folder. Cheap to make; equal when the folder is the same."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).resolve()

    @property
    def id(self) -> str:
        return self.path.name

    def __eq__(self, other) -> bool:
        return isinstance(other, Run) and other.path == self.path

    def __hash__(self) -> int:
        return hash(self.path)

    def __repr__(self) -> str:
        return f"Run({self.id})"

    # -- reading --

    def config(self) -> Resolved:
        """The run's config.yaml. Raises ConfigError."""
        from .config import load_config

        return load_config(self.path / "config.yaml")

    def state(self) -> RunState:
        """What the events say, folded incrementally; with nothing new this takes well under a millisecond."""
        known = _folded.setdefault(self.path, _Folded())
        with known.lock:
            state = self._catch_up(known)
            if state.terminal or state.started is None:
                return state
            if self.alive():
                if state.state != "stopping" and (self.path / "stop").exists():
                    return dataclasses.replace(state, state="stopping", message="Finishing this step, then saving.")
                return state
            if not supervised(self.path):  # else its supervisor is about to say how it ended
                self._mark_interrupted(known, "the process that trained is gone.")
            return self._catch_up(known)

    def note_interrupted(self, reason: str) -> None:
        """Write down that training ended without a terminal status (for the supervisor of a child)."""
        known = _folded.setdefault(self.path, _Folded())
        with known.lock:
            if not self._catch_up(known).terminal:
                self._mark_interrupted(known, reason)

    def _catch_up(self, known: _Folded) -> RunState:
        file = self.path / "events.jsonl"
        try:
            stat = file.stat()
        except OSError:
            known.state, known.offset, known.inode = RunState(), 0, 0
            return known.state
        if stat.st_ino != known.inode or stat.st_size < known.offset:  # another file: begin anew
            known.state, known.offset, known.inode = RunState(), 0, stat.st_ino
        if stat.st_size > known.offset:
            events, known.offset = read(file, known.offset)
            fold(events, known.state)
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
                message = error or f"Interrupted {at}: {reason} Resume goes on."
                events = EventLog(self.path / "events.jsonl")
                try:
                    if error:
                        events.append("error", message=error)
                    events.status(state, message=message)
                except OSError as e:  # shown all the same; who looks when there is room again writes it down
                    message = f"Interrupted {at}: its folder cannot be written ({e.strerror}). Mend that, then resume."
                known.state.state, known.state.message = state, message
        finally:
            alive.release(self.path)

    def alive(self) -> bool:
        """True while a thread or process trains this run."""
        return alive.is_alive(self.path)

    def dataset(self) -> dict:
        """The run's dataset.json, or {} before it is written."""
        try:
            facts = json.loads((self.path / "dataset.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}

    def checkpoints(self) -> list[Path]:
        """Folders of the checkpoints that were written to their end, oldest first."""
        return checkpoints.find_all(self.path / "checkpoints")

    @property
    def adapter(self) -> Path | None:
        """Folder of the finished adapter, or None."""
        for name in ("adapter", "adapter.old"):  # .old: killed between the two renames that replace it
            if (self.path / name / checkpoints.MANIFEST).is_file():
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
            raise RunError(f"Run {self.id} does not run. `runs list` shows what does.")
        file = self.path / "stop"
        try:
            again = file.exists()
            part = self.path / f"stop.{secrets.token_hex(4)}.part"  # two may press Stop at once
            part.write_text(STOP_NOW if again else "")
            os.replace(part, file)
        except OSError as e:
            part.unlink(missing_ok=True)
            raise DiskError.of(file, e) from e

    def delete(self) -> None:
        """Delete the folder with everything in it.

        Raises:
            BusyError: it is being trained, or exported.
            RunError: the folder is no run, or cannot be deleted.
        """
        if self.alive():
            raise BusyError(f"Run {self.id} is being trained. Stop it before you delete it.")
        if not (self.path / "config.yaml").is_file():
            raise RunError(f"{self.path} is not a run's folder, so it is not deleted.")
        from .export_checks import only_one

        alive.acquire(self.path, self.id)  # nobody starts it meanwhile
        try:
            with only_one(self):
                shutil.rmtree(self.path)
        except BusyError:
            raise BusyError(
                f"Run {self.id} is being exported. Wait for it, or cancel it, before you delete it."
            ) from None
        except OSError as e:
            raise RunError(f"{self.path} cannot be deleted: {e.strerror or e}.") from e
        finally:
            alive.release(self.path)
        _folded.pop(self.path, None)
        _register(self.path, there=False)


# ---- finding --------------------------------------------------------------------------------------------------------


def list_runs() -> list[Run]:
    """All runs, newest first: those in the runs folder, and those that were put elsewhere with ``output_dir``."""
    root = runs_dir()
    folders = [p for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
    found = {}
    for folder in [*folders, *_elsewhere()]:
        with contextlib.suppress(OSError):
            found[folder.resolve()] = (folder / "config.yaml").stat().st_mtime
    return [Run(p) for p in sorted(found, key=lambda p: (found[p], p.name), reverse=True)]


def find(name: str) -> Run:
    """The run with that id, or in that folder.

    Raises:
        RunError: there is none.
    """
    name = str(name).strip()
    if name and name not in (".", "..") and not re.search(r"[/\\]", name):
        if (runs_dir() / name / "config.yaml").is_file():
            return Run(runs_dir() / name)
        for folder in _elsewhere():
            if folder.name == name and (folder / "config.yaml").is_file():
                return Run(folder)
    if name and (Path(name).expanduser() / "config.yaml").is_file():
        return Run(Path(name).expanduser())
    raise RunError(f"There is no run {name!r}. `python -m kto_core runs list` shows the ids.")


def active() -> Run | None:
    """The run that trains now, in this process or another one; else the first of those that wait for their turn."""
    return _first(run for run in list_runs() if run.alive())


def _first(alive_runs: Iterable[Run]) -> Run | None:
    """Who trains comes before who waits, who waits longer before the others."""
    return min(alive_runs, key=lambda run: run_queue.since(run.path) or 0, default=None)


def _blocker(waiting: Run) -> str:
    """What has to end before a waiting run begins, or ""."""
    from .hardware import owner

    other = _first(run for run in list_runs() if run == waiting or run.alive())
    if other is not None and other != waiting:
        return f"run {other.id} comes first."
    return holder.sentence() if (holder := owner()) is not None else ""


def _elsewhere() -> list[Path]:
    try:
        paths = json.loads((runs_dir() / ELSEWHERE).read_text(encoding="utf-8"))
        return [Path(p) for p in paths if isinstance(p, str)]
    except (OSError, ValueError, TypeError):
        return []


def _register(path: Path, *, there: bool) -> None:
    """Remember (or forget) a run folder outside the runs folder."""
    if path.parent == runs_dir():
        return
    with _registry:
        paths = [str(p) for p in _elsewhere() if p != path and (p / "config.yaml").is_file()]
        root = runs_dir()
        root.mkdir(parents=True, exist_ok=True)
        part = root / (ELSEWHERE + ".part")
        part.write_text(json.dumps(paths + [str(path)] if there else paths, indent=1), encoding="utf-8")
        os.replace(part, root / ELSEWHERE)


# ---- creating and starting ------------------------------------------------------------------------------------------


def create(resolved: Resolved) -> Run:
    """A new run folder with its config.yaml: ``output_dir`` if that is set, else ``runs/<date>-<preset>-<xxxx>``.

    A run that lies in ``output_dir`` already and has something to lose is moved aside, not overwritten.

    Raises:
        BusyError: that run is being trained.
        DiskError: the folder cannot be made.
        RunError: it holds files that are no run's.
    """
    config = resolved.config
    folder = (
        Path(config.output_dir).expanduser().resolve() if config.output_dir else runs_dir() / _new_id(config.preset)
    )
    try:
        if (folder / "config.yaml").is_file():
            _make_way(Run(folder))
        elif folder.is_dir() and any(p.name.removesuffix(".part") != "config.yaml" for p in folder.iterdir()):
            raise RunError(  # deleting the run would delete what is there
                f"{folder} has files that belong to no run. Choose an --output-dir that is empty or does not exist yet."
            )
        folder.mkdir(parents=True, exist_ok=True)
        absolute = {f: _absolute(getattr(config, f)) for f in ("data", "adapter", "model")}
        saved = dataclasses.replace(resolved, config=config.model_copy(update=absolute))
        from .config import save_config

        save_config(saved, folder / "config.yaml")
        _register(folder, there=True)
    except OSError as e:
        raise DiskError(f"The run's folder {folder} cannot be made ({e.strerror or e}). Choose another place.") from e
    return Run(folder)


def _new_id(preset: str) -> str:
    name = re.sub(r"[^a-z0-9]+", "", Path(preset).stem.lower())[:20] or "run"
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{secrets.token_hex(2)}"


def _absolute(value: str) -> str:
    """Files of this machine as absolute paths: the run is read from other working directories too."""
    return str(Path(value).expanduser().resolve()) if value and Path(value).expanduser().exists() else value


def _make_way(old: Run) -> None:
    if old.alive():
        raise BusyError(f"Run {old.id} is being trained in {old.path}. Stop it first, or choose another folder.")
    _folded.pop(old.path, None)
    if old.checkpoints() or old.adapter:
        os.replace(old.path, old.path.with_name(f"{old.id}-before-{time.strftime('%Y%m%d-%H%M%S')}"))
        return
    for file in [*(old.path / name for name in OURS), *old.path.glob("rank-*.log")]:
        file.unlink(missing_ok=True)
    ranks.forget_errors(old.path)


def start(run: Run, *, block: bool = False, queue: bool = False) -> None:
    """Train ``run`` in the background (a thread, or its own process as configured); goes on from its checkpoints.

    Args:
        block: return when it has ended.
        queue: wait for what trains now (in state ``preparing``, as long as this process lives) instead of BusyError.

    Raises:
        BusyError: a run trains already, or something else owns the GPU.
        ConfigError: the run's config.yaml is not valid.
    """
    from .hardware import owner

    config = run.config().config
    with _starting():  # two that start at once would both see nobody
        if (other := active()) is not None and (other == run or not queue):
            raise BusyError(f"Run {other.id} is training. Stop it or wait for its end, then start this one.")
        if (holder := owner()) is not None and not queue:
            raise BusyError(holder.sentence())
        alive.acquire(run.path, run.id)
    try:
        (run.path / "stop").unlink(missing_ok=True)
        run_queue.leave(run.path)  # of a process that died while it waited
        ranks.forget_errors(run.path)
        EventLog(run.path / "events.jsonl").status("preparing", message="Starting.")
        worker = in_process if config.worker == "process" or config.needs_process else in_thread
        if other or holder:
            thread = run_queue.begin_later(run, lambda: _blocker(run), lambda: worker(run, config))
        else:
            thread = worker(run, config)
    except BaseException as e:
        with contextlib.suppress(OSError):
            EventLog(run.path / "events.jsonl").status("failed", message=f"It could not be started: {e}")
        alive.release(run.path)
        if isinstance(e, OSError):
            raise DiskError(f"The run's folder {run.path} cannot be written ({e.strerror or e}).") from e
        raise
    if block:
        thread.join()


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """One start at a time on this machine."""
    runs_dir().mkdir(parents=True, exist_ok=True)
    with open(runs_dir() / ".start.lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def resume(run: Run, *, block: bool = False, queue: bool = False) -> Run:
    """Go on with a stopped, failed or interrupted run from its newest whole checkpoint (or from the start).

    A finished run whose adapter was lost or damaged gets it again from its last checkpoint.

    Raises:
        BusyError: see `start`.
        RunError: it has finished.
    """
    if run.alive():
        raise BusyError(f"Run {run.id} is being trained already.")
    state = run.state()
    whole = run.adapter is not None and not checkpoints.problem(run.adapter)
    if state.state == "finished" and state.step >= state.total_steps and whole:
        raise RunError(f"Run {run.id} has finished all {state.total_steps:,} steps. Start a new run to train more.")
    start(run, block=block, queue=queue)
    return run
