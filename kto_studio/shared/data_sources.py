"""The data sets a user can pick, by id, and their loaded rows, kept in memory.

Ids: ``example:NAME`` (examples/), ``file:NAME`` (the data folder: uploads, chat feedback), ``hub:REPO@SPLIT``.
The browser sends ids, never paths. This module knows nothing of the page.
"""

from __future__ import annotations

import filecmp
import re
import shutil
import threading
from collections import OrderedDict
from pathlib import Path

from kto_core import paths
from kto_core.errors import DataError, DiskError
from kto_core.files import beside
from kto_core.jobs import Progress, no_progress

from . import readings

TEXT = (".jsonl", ".json", ".csv", ".tsv")
SUFFIXES = (*TEXT, ".parquet", *(s + ".gz" for s in TEXT))
EXAMPLE = "short_answers.jsonl"
SPLIT = re.compile(r"[\w.+\-\[\]:%]{1,60}")
NONE = "No dataset is selected. Choose one in the Data tab."
KEEP = 6  # loaded data sets kept in memory

_loaded: OrderedDict[tuple, object] = OrderedDict()
_lock = threading.Lock()


def default() -> str:
    """The example that is selected when a page opens for the first time; "" if there is none."""
    examples = [p.name for p in _files(paths.EXAMPLES)]
    return f"example:{EXAMPLE if EXAMPLE in examples else examples[0]}" if examples else ""


def choices() -> list[tuple[str, str]]:
    """(label, id) of every file that can be picked: examples first, then the data folder, newest first."""
    examples = [(f"Example: {p.name}", f"example:{p.name}") for p in _files(paths.EXAMPLES)]
    own = sorted(_files(paths.data_dir()), key=lambda p: -p.stat().st_mtime)
    return examples + [(p.name, f"file:{p.name}") for p in own]


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if suffix(p.name) and p.is_file())
    except OSError:
        return []


def suffix(name: str) -> str:
    """The ending of a file we can read, ``.jsonl.gz`` whole; "" for any other."""
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.lower().endswith(s)), "")


def hub_id(repo: str, split: str) -> str:
    """The id of a Hub data set.

    Raises:
        DataError: the name cannot be one.
    """
    repo, split = repo.strip(), split.strip() or "train"
    if not _is_hub(repo):
        raise DataError("Enter the dataset's Hub id as owner/name, for example trl-lib/kto-mix-14k.")
    if not SPLIT.fullmatch(split):
        raise DataError("Enter the split as it is named on the Hub, for example train or train[:1000].")
    return f"hub:{repo}@{split}"


def _is_hub(repo: str) -> bool:
    """Whether a name can only be a Hub id: no file or folder of this machine answers to it."""
    return paths.is_hub_dataset(repo) and not suffix(repo) and not Path(repo).exists()


def name(data_id: str) -> str:
    """The short name shown to the user."""
    kind, _, rest = (data_id or "").partition(":")
    return rest.replace("@", ", split ") if kind == "hub" else rest


def locate(data_id: str) -> tuple[str, str]:
    """(source, split) as `kto_core.data.dataset.load` takes them.

    Raises:
        DataError: unknown id, or the file is gone.
    """
    kind, _, rest = (data_id or "").partition(":")
    if kind == "hub" and "@" in rest:
        repo, _, split = rest.partition("@")
        hub_id(repo, split)
        return repo, split
    folder = {"example": paths.EXAMPLES, "file": paths.data_dir()}.get(kind)
    if folder is None or not rest or rest != Path(rest).name:
        raise DataError(NONE)
    path = folder / rest
    if not path.is_file():
        raise DataError(f"{rest} no longer exists. Choose another dataset, or upload it again.")
    return str(path), "train"


def add_upload(temporary: str) -> str:
    """Keep an uploaded file in the data folder (a run reads it again when it is resumed); returns its id.

    The same file again is the same id; another file of that name gets a number.

    Raises:
        DataError: not a kind of file that can be read.
        DiskError: the folder cannot be written.
    """
    source = Path(temporary)
    ending = suffix(source.name)
    if not ending:
        raise DataError(f"{source.name} has an unsupported file type. Use {', '.join(TEXT)} (also as .gz) or .parquet.")
    stem = re.sub(r"[^\w.-]+", "_", source.name[: -len(ending)]).lstrip(".") or "data"
    folder = paths.data_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            target = folder / f"{stem}{'' if number == 1 else f'-{number}'}{ending}"
            if not target.exists():
                with beside(target) as part:
                    shutil.copyfile(source, part)
                return f"file:{target.name}"
            if _same(source, target):
                return f"file:{target.name}"
            number += 1
    except OSError as e:
        raise DiskError(
            f"{source.name} cannot be saved in the data folder: {e.strerror}. Free up disk space, or set "
            "KTO_STUDIO_DATA to a writable folder."
        ) from None


def _same(a: Path, b: Path) -> bool:
    return filecmp.cmp(a, b, shallow=False)


def key(data_id: str) -> tuple:
    """What decides the rows: source, split, a file's time and size, how it is read.

    Raises like `locate`, and OSError.
    """
    source, split = locate(data_id)
    reading = tuple(readings.of(data_id).items())
    if data_id.startswith("hub:"):
        return source, split, *reading
    stat = Path(source).stat()
    return source, split, stat.st_mtime_ns, stat.st_size, *reading


def load(data_id: str, progress: Progress = no_progress, cancel: threading.Event | None = None):
    """The `kto_core.data.dataset.Loaded` of an id, from memory when the file has not changed.

    Raises:
        DataError: see `locate` and `kto_core.data.dataset.load`.
    """
    from kto_core.data import dataset

    if (held := peek(data_id)) is not None:
        return held
    key_ = key(data_id)
    loaded = dataset.load(key_[0], key_[1], **readings.keywords(data_id), progress=progress, cancel=cancel)
    with _lock:
        _loaded[key_] = loaded
        while len(_loaded) > KEEP:
            _loaded.popitem(last=False)
    return loaded


def peek(data_id: str):
    """The Loaded of an id if it is in memory and the file has not changed, else None. Never reads a file."""
    try:
        key_ = key(data_id)
    except (DataError, OSError):
        return None
    with _lock:
        if key_ in _loaded:
            _loaded.move_to_end(key_)
        return _loaded.get(key_)
