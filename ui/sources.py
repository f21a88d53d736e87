"""The data sets a user can pick, by id, and their loaded rows, kept in memory.

Ids: ``example:NAME`` (examples/), ``file:NAME`` (the data folder: uploads, chat feedback), ``hub:REPO@SPLIT``.
The browser sends ids, never paths. This module knows nothing of the page.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections import OrderedDict
from pathlib import Path

from kto_core import paths
from kto_core.errors import DataError, DiskError
from kto_core.jobs import Progress, no_progress

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
EXAMPLE = "short_answers.jsonl"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
KEEP = 3  # loaded data sets kept in memory

_loaded: OrderedDict[tuple, object] = OrderedDict()
_lock = threading.Lock()


def default() -> str:
    return f"example:{EXAMPLE}"


def choices() -> list[tuple[str, str]]:
    """(label, id) of every file that can be picked: examples first, then the data folder, newest first."""
    examples = [(f"Example: {p.name}", f"example:{p.name}") for p in _files(paths.EXAMPLES)]
    own = sorted(_files(paths.data_dir()), key=lambda p: -p.stat().st_mtime)
    return examples + [(p.name, f"file:{p.name}") for p in own]


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    except OSError:
        return []


def hub_id(repo: str, split: str) -> str:
    """The id of a Hub data set.

    Raises:
        DataError: the name cannot be one.
    """
    repo, split = repo.strip(), split.strip() or "train"
    if not HUB_ID.fullmatch(repo):
        raise DataError("Type the data set's Hub id as owner/name, for example trl-lib/kto-mix-14k.")
    return f"hub:{repo}@{split}"


def name(data_id: str) -> str:
    """The short name shown to the user."""
    kind, _, rest = (data_id or "").partition(":")
    return rest.replace("@", ", split ") if kind == "hub" else rest


def locate(data_id: str) -> tuple[str, str]:
    """(source, split) as `kto_core.dataset.load` takes them.

    Raises:
        DataError: unknown id, or the file is gone.
    """
    kind, _, rest = (data_id or "").partition(":")
    if kind == "hub" and "@" in rest:
        repo, _, split = rest.rpartition("@")
        return repo, split
    folder = {"example": paths.EXAMPLES, "file": paths.data_dir()}.get(kind)
    if folder is None or not rest or rest != Path(rest).name:
        raise DataError("Choose a data set in the Data tab first.")
    path = folder / rest
    if not path.is_file():
        raise DataError(f"{rest} is not there any more. Choose another data set, or upload it again.")
    return str(path), "train"


def id_of(source: str, split: str = "train") -> str:
    """The id whose `locate` gives this source; "" where none does (a run made elsewhere)."""
    path = Path(source)
    if source and path.parent == paths.EXAMPLES:
        return f"example:{path.name}"
    if source and path.parent == paths.data_dir():
        return f"file:{path.name}"
    return f"hub:{source}@{split}" if source and HUB_ID.fullmatch(source) else ""


def add_upload(temporary: str) -> str:
    """Keep an uploaded file in the data folder (a run reads it again when it is resumed); returns its id.

    The same file again is the same id; another file of that name gets a number.

    Raises:
        DataError: not a kind of file that can be read.
        DiskError: the folder cannot be written.
    """
    source = Path(temporary)
    if source.suffix.lower() not in SUFFIXES:
        raise DataError(f"{source.name}: only {', '.join(SUFFIXES)} files can be read.")
    stem = re.sub(r"[^\w.-]+", "_", source.stem) or "data"
    folder = paths.data_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            target = folder / f"{stem}{'' if number == 1 else f'-{number}'}{source.suffix.lower()}"
            if not target.exists():
                part = target.with_name(target.name + ".part")
                shutil.copyfile(source, part)
                part.replace(target)
                return f"file:{target.name}"
            if _same(source, target):
                return f"file:{target.name}"
            number += 1
    except OSError as e:
        raise DiskError(
            f"{source.name} cannot be kept in the data folder: {e.strerror}. Make room, or set "
            "KTO_STUDIO_DATA to a folder that can be written."
        ) from None


def _same(a: Path, b: Path) -> bool:
    return a.stat().st_size == b.stat().st_size and a.read_bytes() == b.read_bytes()


def _key(data_id: str) -> tuple:
    source, split = locate(data_id)
    if data_id.startswith("hub:"):
        return source, split
    stat = Path(source).stat()
    return source, split, stat.st_mtime_ns, stat.st_size


def load(data_id: str, progress: Progress = no_progress, cancel: threading.Event | None = None):
    """The `kto_core.dataset.Loaded` of an id, from memory when the file has not changed.

    Raises:
        DataError: see `locate` and `kto_core.dataset.load`.
    """
    from kto_core import dataset

    if (held := peek(data_id)) is not None:
        return held
    key = _key(data_id)
    loaded = dataset.load(key[0], key[1], progress=progress, cancel=cancel)
    with _lock:
        _loaded[key] = loaded
        while len(_loaded) > KEEP:
            _loaded.popitem(last=False)
    return loaded


def peek(data_id: str):
    """The Loaded of an id if it is in memory and the file has not changed, else None. Never reads a file."""
    try:
        key = _key(data_id)
    except (DataError, OSError):
        return None
    with _lock:
        if key in _loaded:
            _loaded.move_to_end(key)
        return _loaded.get(key)
