"""Records of a file or a Hub data set, one JSON text each: JSONL, JSON, CSV, Parquet, .gz of the text forms.

`records` gives every record once, in order; `Store` gives the bytes of any of them again later. What cannot be read as
a record comes as a `DroppedRow` with its line. This module knows nothing of prompts and labels.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import orjson

from kto_core.data.importers import known
from kto_core.data.records.rows import DroppedRow, shorten
from kto_core.data.records.turns import NOT_UTF8
from kto_core.errors import DataError
from kto_core.jobs import Progress, check_cancel, no_progress
from kto_core.paths import is_hub_dataset

from . import bombs, parquet, tops
from .json_text import MAX_DEPTH, decode, encode
from .store import IN_MEMORY, Store, spool
from .tables import arrow_rows, csv_rows, hub_batches, is_broken

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
MAX_LINE = 256 * 2**20  # bytes; a longer line is dropped
CUT = (EOFError, zlib.error, OSError)  # a compressed file that ends early
_PEEK = 20  # records that are looked at to know a program's export
_EVERY = 2000  # records between two looks at progress and cancel
_UTF16 = (b"\xff\xfe", b"\xfe\xff")

Record = tuple[int, int, "bytes | DroppedRow"]  # line, offset in the store (-1 without), JSON bytes


# --- files ------------------------------------------------------------------------------------------------------------


def is_hub(source: str) -> bool:
    """Whether a source that is no file can be a Hub id (``owner/name`` or ``owner/name:config``)."""
    name = source.lower().removesuffix(".gz")
    named = len(source) < 200 and is_hub_dataset(source) and not name.endswith(SUFFIXES)
    return named and not Path(source).exists()


def find(source: str) -> Path:
    """The file of a source.

    Raises:
        DataError: missing, a folder, or not readable.
    """
    if not source.strip():
        raise DataError(
            "No dataset is selected. Choose a JSONL, JSON, CSV or Parquet file, or a Hub id like owner/name."
        )
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            raise DataError(f"{source} is a folder. Choose a file in it.")
        if not path.exists():
            raise DataError(f"{source} does not exist. Check the name and the folder.")
        if not path.is_file():
            raise DataError(f"{source} is not a regular file. Choose a JSONL, JSON, CSV or Parquet file.")
        with open(path, "rb"):
            return path
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or e
        raise DataError(f"{source} is unreadable: {why}. Check its permissions.") from None


def records(
    source: str, split: str = "train", progress: Progress = no_progress, cancel: threading.Event | None = None
) -> tuple[Store, Iterator[Record]]:
    """The store of a source and its records, read while they are taken.

    Raises:
        DataError: at once, or while records are taken: the source cannot be read.
    """
    if is_hub(source):
        store = spool()
        progress(None, f"Downloading {source} from the Hub…")
        dicts = arrow_rows(hub_batches(source, split))
        return store, _watch(_spooled(store, enumerate(dicts, 1)), lambda: None, source, progress, cancel)
    path = find(source)
    size = path.stat().st_size
    file = open(path, "rb")  # noqa: SIM115 - the store keeps it
    head = file.read(4096)
    file.seek(0)
    kind = _kind(path, head)
    if kind == "parquet":
        store = spool()
        found = _spooled(store, enumerate(arrow_rows(parquet.batches(path)), 1), path)
        return store, _watch(found, lambda: None, path.name, progress, cancel)

    def done() -> float | None:
        return file.tell() / size if size and not file.closed else None

    text: BinaryIO = file
    if head[:2] == b"\x1f\x8b":
        unpacked = gzip.GzipFile(fileobj=file)
        try:
            bombs.refuse_gzip(unpacked, path.name, size, cancel)
            head = unpacked.read(4096)
        except (OSError, EOFError, zlib.error) as e:
            raise DataError(f"{path.name} is not a complete gzip file ({e}). Compress it again.") from None
        unpacked.seek(0)
        text = cast(BinaryIO, unpacked)
        kind = _kind(path.with_suffix(""), head)
    if head[:2] in _UTF16:
        text = _recode(text, path.name)
    if kind == "csv":
        store = spool()
        found = _spooled(store, csv_rows(text, path.name), path)
    elif _is_lines(text, path.name):
        if _is_export(text):
            store = spool()
            found = _spooled(store, _objects(text), path)
        elif text is file:
            store = Store(io.BytesIO(file.read())) if size <= IN_MEMORY else Store(open(path, "rb", 0), path)  # noqa: SIM115
            text.seek(0)
            found = _lines(file, None)
        else:
            store = spool()
            found = _lines(text, store)
    else:
        store = spool()
        found = _spooled(store, enumerate(_json_items(text, path.name), 1), path)
    return store, _watch(found, done, path.name, progress, cancel)


def _kind(path: Path, head: bytes) -> str:
    """ "parquet", "csv" or "json" by name, or by the first bytes where the name does not say."""
    suffix = path.suffix.lower()
    if head[:4] == b"PAR1":
        return "parquet"
    if suffix == ".parquet" and head:
        raise DataError(f"{path.name} is not a Parquet file. Save it again, or correct its file extension.")
    if suffix in (".csv", ".tsv"):
        return "csv"
    if suffix in (".json", ".jsonl", ".gz", ".ndjson") or head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[", b""):
        return "json"
    raise DataError(
        f"{path.name} has an unsupported file type. Use {', '.join(SUFFIXES)}, or a text format compressed as .gz."
    )


def _is_lines(file: BinaryIO, name: str) -> bool:
    """Whether JSON text is one object a line, whatever the file's name. Leaves the file at its beginning."""
    try:
        return _reads_as_lines(file, name)
    except CUT:  # the reading that follows meets it again
        return True
    finally:
        file.seek(0)


def _reads_as_lines(file: BinaryIO, name: str) -> bool:
    lines = iter(lambda: file.readline(MAX_LINE), b"")
    first = next((s for line in lines if (s := line.removeprefix(b"\xef\xbb\xbf").strip())), b"")
    more = any(not line.isspace() for line in lines)
    file.seek(0)
    try:
        whole = orjson.loads(first)
    except orjson.JSONDecodeError:
        if not name.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson")):
            return False
        if first[:1] not in (b"[", b"{"):
            return True
        try:  # a list or a pretty-printed object under the wrong name, or a broken first line?
            orjson.loads(file.read().removeprefix(b"\xef\xbb\xbf"))
            return False
        except orjson.JSONDecodeError:
            return True
    return more or isinstance(whole, dict) and (known.find(whole) is not None or tops.rows_of(whole) is None)


def _is_export(file: BinaryIO) -> bool:
    """Whether one of the first lines is an object of another program's export. Leaves the file at its beginning."""
    found = False
    with contextlib.suppress(*CUT):  # the reading that follows meets it again
        found = any(known.find(obj) for _, obj in itertools.islice(_objects(file), _PEEK))
    file.seek(0)
    return found


def _objects(file: BinaryIO) -> Iterator[tuple[int, object]]:
    """The objects of JSONL, or why a line has none."""
    for line, _, raw in _lines(file, None):
        try:
            yield line, raw if isinstance(raw, DroppedRow) else decode(raw)[0]
        except DroppedRow as e:
            yield line, e


def _recode(file: BinaryIO, name: str) -> io.BytesIO:
    """UTF-16 (what spreadsheets save as "Unicode text") as UTF-8."""
    try:
        return io.BytesIO(file.read().decode("utf-16").encode())
    except UnicodeError as e:
        raise DataError(
            f"{name} starts like UTF-16 but is not valid UTF-16 ({getattr(e, 'reason', e)}). Save it as UTF-8."
        ) from None


def _watch(
    found: Iterable[Record],
    done: Callable[[], float | None],
    name: str,
    progress: Progress,
    cancel: threading.Event | None,
) -> Iterator[Record]:
    """Progress, cancel, and errors of reading as DataErrors."""
    try:
        for n, record in enumerate(found):
            if n % _EVERY == 0:
                check_cancel(cancel)
                progress(done(), f"Reading {name}: {n:,} records")
            yield record
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise DataError(f"{name} is not a complete gzip file ({e}). Compress it again.") from None
    except OSError as e:
        raise DataError(f"{name} cannot be read completely: {e.strerror or e}. Copy it again.") from None
    except MemoryError:
        raise DataError(f"{name} does not fit in memory. Save it as JSONL, which is read line by line.") from None


def _lines(file: BinaryIO, store: Store | None) -> Iterator[Record]:
    """Lines of JSONL. Without a store the offsets are those of the file."""
    offset = line = 0
    while raw := file.readline(MAX_LINE):
        size, start = len(raw), offset
        line += 1
        whole = raw.endswith(b"\n") or size < MAX_LINE
        while not whole:
            more = file.readline(MAX_LINE)
            size += len(more)
            whole = more.endswith(b"\n") or len(more) < MAX_LINE
        offset += size
        if line == 1 and raw.startswith(b"\xef\xbb\xbf"):
            raw = raw[3:]
            start += 3
        if size > MAX_LINE:
            yield line, -1, DroppedRow(f"line longer than {MAX_LINE // 2**20} MiB", f"{size:,} bytes")
        elif not raw.isspace() and raw:
            yield line, store.append(raw) if store else start, raw


def _spooled(store: Store, items: Iterable[tuple[int, object]], path: Path | None = None) -> Iterator[Record]:
    """Records put into the store. Those of a file (``path``) may not take much more room than the file."""
    left = bombs.allowed(path.stat().st_size) if path else None
    for row, item in _imported(store, items):
        if isinstance(item, DroppedRow):
            yield row, -1, item
        else:
            try:
                raw = encode(item)
            except RecursionError:
                yield row, -1, DroppedRow("nested too deeply", f"more than {MAX_DEPTH} levels")
            else:
                if path and left is not None and (left := left - len(raw)) < 0:
                    raise bombs.refuse(path.name)
                yield row, store.append(raw), raw


def _imported(store: Store, items: Iterable[tuple[int, object]]) -> Iterator[tuple[int, object]]:
    """Plain records in place of another program's objects, if one of the first records is such an object."""
    rest = iter(items)
    first = list(itertools.islice(rest, _PEEK))
    importer = next((found for _, item in first if (found := known.find(item))), None)
    if importer is None:
        yield from first
        del first
        yield from rest
        return
    store.origin = importer.name
    items = itertools.chain(first, rest)
    for row, item in importer.gather(items) if importer.gather else items:
        if isinstance(item, DroppedRow):
            yield row, item
        else:
            for record in known.plain(item):
                yield row, record


def _json_items(file: BinaryIO, name: str) -> Iterator[object]:
    """Items of a JSON list, rows that an object stands for (see `tops`), or a single object."""
    raw = file.read().removeprefix(b"\xef\xbb\xbf")
    if not raw.strip():
        return
    bombs.require_memory(raw, name)
    broken = False
    try:
        whole = orjson.loads(raw)
    except orjson.JSONDecodeError:
        try:
            text = raw.decode("utf-8", "surrogateescape")
            broken = bool(re.search("[\udc80-\udcff]", text))
            whole = json.loads(text)
        except (ValueError, RecursionError) as e:
            why = shorten(str(e))
            raise DataError(
                f"{name} is not valid JSON ({why}). Save it again, or as JSONL with one object per line."
            ) from None
    del raw
    if isinstance(whole, dict):
        rows = None if known.find(whole) else tops.rows_of(whole)
        whole = [whole] if rows is None else list(rows)
    if not isinstance(whole, list):
        raise DataError(
            f"{name} does not contain a list of rows. It must be a list of objects, or an object with the list under "
            "the key data."
        )
    whole.reverse()
    while whole:  # from the end, so that memory is given back on the way
        item = whole.pop()
        yield DroppedRow(NOT_UTF8) if broken and is_broken(item) else item
