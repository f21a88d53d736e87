"""What a run's exports are made from, where they lie, and which of them were made from just that."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass
from pathlib import Path

from kto_core import files
from kto_core.errors import ExportError
from kto_core.guards import bounded
from kto_core.jobs import Progress, check_cancel, named, no_progress
from kto_core.models import facts as model_info

from .merging import FACTS

MANIFEST = "manifest.json"  # in exports/gguf: file name -> what it was made of
FORMAT = 2  # changes when the same inputs would give other files


@dataclass(frozen=True)
class Sources:
    """What the exports of a run are made from, looked at once.

    ``adapter`` and ``base`` are folders, ``key`` stands for their content (`key_of`). ``merged`` and ``gguf`` are the
    folders that the exports go into.
    """

    adapter: Path
    base: Path
    key: str
    merged: Path
    gguf: Path

    @classmethod
    def of(cls, run, progress: Progress = no_progress, cancel: threading.Event | None = None) -> Sources:
        """Of a run, whose base is fetched if it is not on this machine.

        Raises:
            ExportError: no adapter, or one that cannot be read.
            ModelError, Cancelled: as in `models.facts.local_folder`.
        """
        adapter = finished_adapter(run)
        base = model_info.local_folder(run.config().config.model, progress, cancel)
        exports = run.path / "exports"
        return cls(adapter, base, key_of(adapter, base, cancel), exports / "merged", exports / "gguf")

    def merge_is_fresh(self, progress: Progress = no_progress, cancel: threading.Event | None = None) -> bool:
        """Whether the merged model is there, whole, and made from these."""
        if merged_facts(self.merged).get("source") != self.key:
            return False
        told = named("Verifying the existing merge", lambda _, text: progress(None, text))
        return not files.problem(self.merged, progress=told, cancel=cancel)

    def gguf_is_fresh(self, file: Path) -> bool:
        """Whether this GGUF file is there, whole, and made from these."""
        entry = records(file.parent).get(file.name, {})
        return entry.get("source") == self.key and file.is_file() and file.stat().st_size == entry.get("size")

    def record(self, file: Path, made_by: str) -> None:
        """Note in the manifest that a GGUF file was made from these, and not checked yet."""
        note(file, source=self.key, size=file.stat().st_size, made_by=made_by, check=None, remarks=[])


def merged_facts(folder: Path) -> dict:
    """``export.json`` of a merged folder (see `merging.merge`), or {}."""
    return bounded.read_dict(folder / FACTS)


def records(folder: Path) -> dict:
    """The manifest of a folder of GGUF files: name -> what it was made from; {} if there is none."""
    return bounded.read_dict(folder / MANIFEST)


def note(file: Path, **facts) -> None:
    """Add to what the manifest says of a GGUF file."""
    known = records(file.parent)
    entry = known.get(file.name, {}) | facts
    files.write_whole(file.parent / MANIFEST, json.dumps(known | {file.name: entry}, indent=1))


def finished_adapter(run) -> Path:
    """The folder of the run's adapter. Raises ExportError if it has none yet."""
    if (adapter := run.adapter) is None:
        raise ExportError(f"Run {run.id} has no finished adapter yet. Let it finish, or resume it.")
    return adapter


def key_of(adapter: Path, base: Path, cancel: threading.Event | None = None) -> str:
    """What exports are made of, as one hash: the adapter's content, and which files the base has."""
    digest = hashlib.sha256(str(FORMAT).encode())
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        digest.update(sha256(adapter / name, cancel).encode())
    for file in sorted([*base.glob("*.safetensors"), *base.glob("*.json"), *base.glob("*.jinja")]):
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def sha256(file: Path, cancel: threading.Event | None = None) -> str:
    """Of a file of the adapter. Raises ExportError if it cannot be read, Cancelled if ``cancel`` was set."""
    digest = hashlib.sha256()
    try:
        with open(file, "rb") as f:
            while block := f.read(1 << 22):
                check_cancel(cancel)
                digest.update(block)
        return digest.hexdigest()
    except OSError as e:
        raise ExportError(f"The adapter's {file.name} is unreadable ({e.strerror}). Train or resume the run.") from e
