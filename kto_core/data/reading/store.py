"""Where the bytes of records lie: in the file itself, or in a spool."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from typing import BinaryIO, cast

from kto_core.errors import DataError, DiskError

IN_MEMORY = 64 * 2**20  # bytes of a data set held in memory; a larger one is read from its file when needed


class Store:
    """Bytes by offset: of the source file itself, or of a spool that records were written to.

    Args:
        file: binary, readable, seekable.
        path: given if it is a file of the user's, which may change under us.

    Attributes:
        origin: the program whose export was turned into records; "" if records are as the source has them.
    """

    def __init__(self, file: BinaryIO, path: Path | None = None):
        self.origin = ""
        self._file, self._path, self._lock, self._end = file, path, threading.Lock(), 0
        self._seen = self._stamp() if path else None

    def _stamp(self) -> tuple[int, int]:
        stat = os.fstat(self._file.fileno())
        return stat.st_size, stat.st_mtime_ns

    def append(self, raw: bytes) -> int:
        with self._lock:
            offset = self._end
            try:
                self._file.seek(offset)
                self._file.write(raw)
            except OSError as e:
                raise DiskError(
                    f"The temporary folder has no space for the dataset: {e.strerror}. Free up disk space."
                ) from e
            self._end += len(raw)
            return offset

    def read(self, offset: int, size: int) -> bytes:
        """Raises DataError if the user's file was changed since it was loaded."""
        with self._lock:
            if self._path and self._stamp() != self._seen:
                raise DataError(f"{self._path.name} changed while it was in use. Load it again.")
            self._file.seek(offset)
            return self._file.read(size)


def spool() -> Store:
    return Store(cast(BinaryIO, tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)))  # noqa: SIM115 - lives as long as the rows do
