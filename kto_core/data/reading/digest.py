"""Which data it was: the sha256 that a report of a run names."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from pathlib import Path

from .sources import find, is_hub


class Digest:
    """sha256 of a file, taken in a thread beside the parsing; of the records where there is no file."""

    def __init__(self, source: str):
        self._hash = hashlib.sha256()
        self._thread: threading.Thread | None = None
        if not is_hub(source):
            self._thread = threading.Thread(target=self._read, args=(find(source),), daemon=True)
            self._thread.start()

    def _read(self, path: Path) -> None:
        with contextlib.suppress(OSError), open(path, "rb") as f:
            while block := f.read(2**20):
                self._hash.update(block)

    def update(self, raw: bytes) -> None:
        if not self._thread:
            self._hash.update(raw)

    def hex(self) -> str:
        if self._thread:
            self._thread.join()
        return self._hash.hexdigest()
