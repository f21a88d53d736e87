"""Run folders: create, list, find, delete."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from kto_core import labels
from kto_core.errors import BusyError, DiskError, RunError
from kto_core.files import write_whole
from kto_core.guards import bounded
from kto_core.paths import runs_dir

from . import locks, ranks
from .run import MARK, PATIENCE, Run, wait_for_end, waiting_since

if TYPE_CHECKING:
    from kto_core.config.resolving import Resolved

ELSEWHERE = "elsewhere.json"  # in the runs folder: run folders that lie outside it
OURS = (MARK, "events.jsonl", "dataset.json", "stop", "train.log", "worker.log", labels.FILE)

_registry = threading.Lock()


# ---- finding --------------------------------------------------------------------------------------------------------


def list_runs() -> list[Run]:
    """All runs, newest first: those in the runs folder, and those that were put elsewhere with ``output_dir``."""
    found: dict[Path, int] = {}
    with contextlib.suppress(OSError), os.scandir(runs_dir()) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_dir():
                    path = Path(entry.path)
                    found[path.resolve() if entry.is_symlink() else path] = _made(entry.path)
    for folder in _elsewhere():
        with contextlib.suppress(OSError):
            found[folder.resolve()] = _made(folder)
    return [Run.at(p) for p in sorted(found, key=lambda p: (found[p], p.name), reverse=True)]


def _made(folder: str | Path) -> int:
    """When a run was made, in ns. Raises OSError for a folder that is no run's."""
    with contextlib.suppress(FileNotFoundError):
        return os.lstat(os.path.join(folder, "config.yaml")).st_mtime_ns
    return os.stat(os.path.join(folder, "events.jsonl")).st_mtime_ns  # its settings were lost


def _is_run(folder: Path) -> bool:
    try:
        return bool(folder.is_dir() and _made(folder))
    except (OSError, ValueError):
        return False


def find(name: str) -> Run:
    """The run with that id, or in that folder.

    Raises:
        RunError: there is none.
    """
    name = str(name).strip()
    if name and name not in (".", "..") and not re.search(r"[/\\]", name):
        if _is_run(runs_dir() / name):
            return Run(runs_dir() / name)
        for folder in _elsewhere():
            if folder.name == name and _is_run(folder):
                return Run(folder)
        if "\ufffd" in name and (found := next((r for r in list_runs() if r.id == name), None)):
            return found
    if name and _is_run(Path(name).expanduser()):
        return Run(Path(name).expanduser())
    raise RunError(f"Run {name!r} does not exist. `python -m kto_core runs list` shows all run ids.")


def active(*, settle: bool = False) -> Run | None:
    """The run that trains now, in this process or another one; else the first of those that wait for their turn.

    Args:
        settle: of one that has said its last word wait for its process's end.
    """
    end = time.monotonic() + PATIENCE
    while (found := first_of(run for run in list_runs() if run.alive())) is not None:
        if not (settle and wait_for_end(found, end)):
            break
    return found


def first_of(alive_runs: Iterable[Run]) -> Run | None:
    """Who trains comes before who waits, who waits longer before the others."""
    return min(alive_runs, key=lambda run: waiting_since(run.path) or 0, default=None)


def _elsewhere() -> list[Path]:
    try:
        paths = bounded.read_json(runs_dir() / ELSEWHERE)
    except (OSError, bounded.Unreadable):
        return []
    return [Path(p) for p in paths if isinstance(p, str) and "\0" not in p] if isinstance(paths, list) else []


def _register(path: Path, *, there: bool) -> None:
    """Remember (or forget) a run folder outside the runs folder."""
    if path.parent == runs_dir():
        return
    with _registry:
        paths = [str(p) for p in _elsewhere() if p != path and (p / "config.yaml").is_file()]
        root = runs_dir()
        root.mkdir(parents=True, exist_ok=True)
        write_whole(root / ELSEWHERE, json.dumps(paths + [str(path)] if there else paths, indent=1), sync=True)


# ---- creating and deleting ------------------------------------------------------------------------------------------


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
    made: list[Path] | None = None
    try:
        if (folder / "config.yaml").is_file():
            _make_way(Run(folder))
        elif folder.is_dir() and any(p.name.removesuffix(".part") != "config.yaml" for p in folder.iterdir()):
            raise RunError(  # deleting the run would delete what is there
                f"{folder} contains files that are not part of a run. Choose an --output-dir that is empty or does "
                "not exist yet."
            )
        made = [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        absolute = {f: _absolute(getattr(config, f)) for f in ("data", "adapter", "model")}
        saved = dataclasses.replace(resolved, config=config.model_copy(update=absolute))
        from kto_core.config.resolving import save_config

        save_config(saved, folder / "config.yaml")
        _register(folder, there=True)
    except OSError as e:
        if made is not None:
            _unmake(folder, made)
        raise DiskError(f"The run folder {folder} cannot be created ({e.strerror or e}). Choose another folder.") from e
    return Run(folder)


def _unmake(folder: Path, made: list[Path]) -> None:
    """Nothing half-made stays: the settings, and those folders that were made for them."""
    with contextlib.suppress(OSError):
        for name in ("config.yaml.part", "config.yaml"):
            (folder / name).unlink(missing_ok=True)
        for path in made:
            path.rmdir()


def _new_id(preset: str) -> str:
    name = re.sub(r"[^a-z0-9]+", "", Path(preset).stem.lower())[:20] or "run"
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{secrets.token_hex(2)}"


def _absolute(value: str) -> str:
    """Files of this machine as absolute paths: the run is read from other working directories too."""
    return str(Path(value).expanduser().resolve()) if value and Path(value).expanduser().exists() else value


def _make_way(old: Run) -> None:
    if old.alive():
        raise BusyError(f"Run {old.id} is training in {old.path}. Stop it first, or choose another folder.")
    old.forget()
    if old.checkpoints() or old.adapter:
        os.replace(old.path, old.path.with_name(f"{old.id}-before-{time.strftime('%Y%m%d-%H%M%S')}"))
        return
    for file in [*(old.path / name for name in OURS), *old.path.glob("rank-*.log")]:
        file.unlink(missing_ok=True)
    ranks.forget_errors(old.path)


def delete(run: Run) -> None:
    """Delete a run's folder with everything in it.

    Raises:
        BusyError: it is being trained, or exported.
        RunError: the folder is no run, or cannot be deleted.
    """
    wait_for_end(run)
    if run.alive():
        raise BusyError(f"Run {run.id} is training. Stop it before you delete it.")
    if not os.path.lexists(run.path / "config.yaml"):
        raise RunError(f"{run.path} is not a run folder, so it was not deleted.")
    locks.acquire(run.path, run.id)  # nobody starts it meanwhile
    try:
        with locks.only_one(run):
            shutil.rmtree(run.path)
    except BusyError:
        raise BusyError(
            f"Run {run.id} is being exported. Wait until the export finishes, or cancel it, before you delete the run."
        ) from None
    except OSError as e:
        raise RunError(f"{run.path} cannot be deleted: {e.strerror or e}.") from e
    finally:
        locks.release(run.path)
    run.forget()
    _register(run.path, there=False)
