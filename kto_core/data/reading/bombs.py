"""How much a file may unpack to: a small file of a stranger must fill neither the memory nor the disk."""

from __future__ import annotations

import gzip
import threading

from kto_core.errors import DataError
from kto_core.jobs import check_cancel

HARMLESS = 64 * 2**20  # bytes that any .gz may unpack to
SPOOL = 2**30  # bytes that the records of any file may take
PACKED = 300  # times its size; text packs to a third or a twentieth
ITEM = 64  # bytes that a value of parsed JSON takes at least, a text or an object


def refuse(name: str) -> DataError:
    return DataError(
        f"{name} unpacks to more than {PACKED} times its size, which is unusual for text. Unpack it, check "
        "it, and use the unpacked file."
    )


def allowed(size: int) -> int:
    """Bytes that the records of a file of ``size`` bytes may take when they are spooled."""
    return max(SPOOL, PACKED * size)


def refuse_gzip(packed: gzip.GzipFile, name: str, size: int, cancel: threading.Event | None) -> None:
    """Read to the end, keep nothing, and go back to the beginning.

    Raises:
        DataError: it unpacks to far more than text does.
    """
    if size * 1100 < HARMLESS:  # gzip packs nothing better
        return
    total = 0
    while block := packed.read(2**20):
        check_cancel(cancel)
        total += len(block)
        if total > max(HARMLESS, PACKED * size):
            raise refuse(name)
    packed.seek(0)


def require_memory(raw: bytes, name: str) -> None:
    """Before a JSON text is parsed whole.

    Raises:
        DataError: its objects would not fit into the memory that is free.
    """
    import psutil

    values = sum(raw.count(mark) for mark in (b",", b"[", b"{", b":"))
    if len(raw) + ITEM * values > psutil.virtual_memory().available:
        raise DataError(f"{name} does not fit in memory. Save it as JSONL, which is read line by line.")
