"""Records of a file or a Hub data set, one JSON text each: JSONL, JSON, CSV, Parquet, .gz of the text forms.

`records` gives every record once, in order; `Store` gives the bytes of any of them again later. What cannot be read as
a record comes as a `DroppedRow` with its line. This module knows nothing of prompts and labels.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import tempfile
import threading
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import orjson

from .errors import DataError, DiskError
from .jobs import Progress, check_cancel, no_progress
from .rows import DroppedRow, shorten
from .tables import arrow_rows, csv_rows, hub_batches, is_broken, parquet_batches

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
IN_MEMORY = 64 * 2**20  # bytes of a data set held in memory; a larger one is read from its file when needed
MAX_LINE = 256 * 2**20  # bytes; a longer line is dropped
HARMLESS = 64 * 2**20  # bytes that any file may unpack to
PACKED = 300  # times its size; text packs to a third or a twentieth
MAX_DEPTH = 200  # levels of lists and objects; a record nested deeper is dropped
_EVERY = 2000  # records between two looks at progress and cancel
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")

Record = tuple[int, int, "bytes | DroppedRow"]  # line, offset in the store (-1 without), JSON bytes


class Store:
    """Bytes by offset: of the source file itself, or of a spool that records were written to.

    Args:
        file: binary, readable, seekable.
        path: given if it is a file of the user's, which may change under us.
    """

    def __init__(self, file, path: Path | None = None):
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
                raise DiskError(f"The temporary folder has no room for the data set: {e.strerror}. Make some.") from e
            self._end += len(raw)
            return offset

    def read(self, offset: int, size: int) -> bytes:
        """Raises DataError if the user's file was changed since it was loaded."""
        with self._lock:
            if self._seen and self._stamp() != self._seen:
                raise DataError(f"{self._path.name} was changed while it was in use. Load it again.")
            self._file.seek(offset)
            return self._file.read(size)


def spool() -> Store:
    return Store(tempfile.SpooledTemporaryFile(max_size=IN_MEMORY))  # noqa: SIM115 - lives as long as the rows do


# --- decoding one record ----------------------------------------------------------------------------------------------


def decode(raw: bytes) -> tuple[object, list[str]]:
    """The object of a JSON text, and names of the changes made.

    Raises:
        DroppedRow: not JSON, or not UTF-8.
    """
    with contextlib.suppress(orjson.JSONDecodeError):
        obj = _shallow(raw, orjson.loads(raw))
        if not (isinstance(obj, dict) and any(v.__class__ is float and abs(v) >= 2**63 for v in obj.values())):
            return obj, []
    try:  # the standard library reads what the quick parser refuses or rounds: NaN, half surrogates, huge numbers
        obj = json.loads(raw.decode())
    except UnicodeDecodeError as e:
        raise DroppedRow("not valid UTF-8", f"byte {e.start + 1}") from None
    except RecursionError:
        raise DroppedRow("nested too deeply", f"more than {MAX_DEPTH} levels") from None
    except ValueError as e:
        raise DroppedRow("not JSON", shorten(str(e))) from None
    clean = _mend(_shallow(raw, obj))
    return clean, [] if clean == obj or obj != obj else ["broken Unicode replaced"]


def _shallow(raw: bytes, obj: object) -> object:
    """``obj``, if it is nested no deeper than can be written again."""
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH:
        level = [obj]
        for _ in range(MAX_DEPTH):
            level = [v for o in level if isinstance(o, dict | list) for v in (o.values() if isinstance(o, dict) else o)]
        if level:
            raise DroppedRow("nested too deeply", f"more than {MAX_DEPTH} levels")
    return obj


def _mend(value):
    """Half surrogate pairs, which no tokenizer takes, become U+FFFD."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_mend(v) for v in value]
    if isinstance(value, dict):
        return {_mend(k): _mend(v) for k, v in value.items()}
    return value


def encode(obj: object) -> bytes:
    """One line of JSON without its newline. NaN becomes null."""
    try:
        return orjson.dumps(obj, default=_plain, option=orjson.OPT_NON_STR_KEYS)
    except orjson.JSONEncodeError:  # numbers beyond 64 bits, half surrogate pairs
        return json.dumps(obj, default=_plain).encode()


def _plain(value: object) -> object:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


_quoted: dict[str, bytes] = {}


def repeated_key(raw: bytes, obj: object) -> str:
    """A key that a record gives twice with different values (a parser keeps the last in silence); "" if none.

    Looks for top-level keys first, since a whole second parse of every record would cost too much.
    """
    if not isinstance(obj, dict):
        return ""
    for key in obj:
        quoted = _quoted.get(key)
        if quoted is None:
            quoted = json.dumps(key, ensure_ascii=False).encode("utf-8", "replace")
            if len(_quoted) < 1000:
                _quoted[key] = quoted
        if raw.count(quoted) > 1:
            break
    else:
        return ""
    found: list[str] = []

    def pairs(items):
        out = {}
        for k, v in items:
            if k in out and out[k] != v:
                found.append(k)
            out[k] = v
        return out

    try:
        json.loads(raw, object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        return ""
    return found[0] if found else ""


# --- files ------------------------------------------------------------------------------------------------------------


def is_hub(source: str) -> bool:
    """Whether a source that is no file can be a Hub id (``owner/name`` or ``owner/name:config``)."""
    name = source.lower().removesuffix(".gz")
    named = len(source) < 200 and _HUB_ID.fullmatch(source) and not name.endswith(SUFFIXES)
    return bool(named) and not Path(source).exists()


def find(source: str) -> Path:
    """The file of a source.

    Raises:
        DataError: missing, a folder, or not readable.
    """
    if not source.strip():
        raise DataError("No data set was named. Give a JSONL, JSON, CSV or Parquet file, or a Hub id like owner/name.")
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            raise DataError(f"{source} is a folder. Name a file in it.")
        if not path.exists():
            raise DataError(f"{source} is not there. Check the name and the folder.")
        if not path.is_file():
            raise DataError(f"{source} is not a plain file. Name a JSONL, JSON, CSV or Parquet file.")
        with open(path, "rb"):
            return path
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or e
        raise DataError(f"{source} cannot be read: {why}. Check its permissions.") from None


def records(
    source: str, split: str = "train", progress: Progress = no_progress, cancel: threading.Event | None = None
) -> tuple[Store, Iterator[Record]]:
    """The store of a source and its records, read while they are taken.

    Raises:
        DataError: at once, or while records are taken: the source cannot be read.
    """
    if is_hub(source):
        store = spool()
        progress(None, f"Getting {source} from the Hub…")
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
        found = _spooled(store, enumerate(arrow_rows(parquet_batches(path)), 1))
        return store, _watch(found, lambda: None, path.name, progress, cancel)

    def done() -> float | None:
        return file.tell() / size if size and not file.closed else None

    text: io.BufferedIOBase = file
    if head[:2] == b"\x1f\x8b":
        text = gzip.GzipFile(fileobj=file)
        try:
            _refuse_bomb(text, path.name, size, cancel)
            head = text.read(4096)
        except (OSError, EOFError, zlib.error) as e:
            raise DataError(f"{path.name} is not a whole gzip file ({e}). Compress it again.") from None
        text.seek(0)
        kind = _kind(path.with_suffix(""), head)
    if head[:2] in _UTF16:
        text = _recode(text, path.name)
    if kind == "csv":
        store = spool()
        found = _spooled(store, csv_rows(text, path.name))
    elif _is_lines(text, path.name):
        if text is file:
            store = Store(io.BytesIO(file.read())) if size <= IN_MEMORY else Store(open(path, "rb", 0), path)  # noqa: SIM115
            text.seek(0)
            found = _lines(file, None)
        else:
            store = spool()
            found = _lines(text, store)
    else:
        store = spool()
        found = _spooled(store, enumerate(_json_items(text, path.name), 1))
    return store, _watch(found, done, path.name, progress, cancel)


def _refuse_bomb(packed: gzip.GzipFile, name: str, size: int, cancel) -> None:
    """A small file that unpacks to far more than text does would fill the memory or the disk. Nothing is kept here."""
    if size * 1100 < HARMLESS:  # gzip packs nothing better
        return
    total = 0
    while block := packed.read(2**20):
        check_cancel(cancel)
        total += len(block)
        if total > max(HARMLESS, PACKED * size):
            raise DataError(
                f"{name} unpacks to more than {PACKED} times its size, which text does not. Unpack it and look at it; "
                "a file that is really that repetitive can be given unpacked."
            )
    packed.seek(0)


def _kind(path: Path, head: bytes) -> str:
    """ "parquet", "csv" or "json" by name, or by the first bytes where the name does not say."""
    suffix = path.suffix.lower()
    if head[:4] == b"PAR1":
        return "parquet"
    if suffix == ".parquet" and head:
        raise DataError(f"{path.name} is not a Parquet file. Save it again, or rename it to what it is.")
    if suffix in (".csv", ".tsv"):
        return "csv"
    if suffix in (".json", ".jsonl", ".gz", ".ndjson") or head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[", b""):
        return "json"
    raise DataError(f"{path.name} is of no known kind. Use {', '.join(SUFFIXES)}, or .gz of a text form.")


def _is_lines(file, name: str) -> bool:
    """Whether JSON text is one object a line, whatever the file's name. Leaves the file at its beginning."""
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
        finally:
            file.seek(0)
    return more or isinstance(whole, dict) and not isinstance(whole.get("data"), list)


def _recode(file, name: str) -> io.BytesIO:
    """UTF-16 (what spreadsheets save as "Unicode text") as UTF-8."""
    try:
        return io.BytesIO(file.read().decode("utf-16").encode())
    except UnicodeError as e:
        raise DataError(f"{name} begins like UTF-16 but is not ({e.reason}). Save it as UTF-8.") from None


def _watch(found: Iterable[Record], done, name: str, progress: Progress, cancel) -> Iterator[Record]:
    """Progress, cancel, and errors of reading as DataErrors."""
    try:
        for n, record in enumerate(found):
            if n % _EVERY == 0:
                check_cancel(cancel)
                progress(done(), f"Reading {name}: {n:,} records")
            yield record
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise DataError(f"{name} is not a whole gzip file ({e}). Compress it again.") from None
    except OSError as e:
        raise DataError(f"{name} cannot be read to its end: {e.strerror or e}. Copy it again.") from None
    except MemoryError:
        raise DataError(f"{name} does not fit into memory. Save it as JSONL, which is read line by line.") from None


def _lines(file, store: Store | None) -> Iterator[Record]:
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


def _spooled(store: Store, items: Iterable[tuple[int, object]]) -> Iterator[Record]:
    for row, item in items:
        if isinstance(item, DroppedRow):
            yield row, -1, item
        else:
            try:
                raw = encode(item)
            except RecursionError:
                yield row, -1, DroppedRow("nested too deeply", f"more than {MAX_DEPTH} levels")
            else:
                yield row, store.append(raw), raw


def _json_items(file, name: str) -> Iterator[object]:
    """Items of a JSON list, of {"data": […]}, or a single object."""
    raw = file.read().removeprefix(b"\xef\xbb\xbf")
    if not raw.strip():
        return
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
            raise DataError(f"{name} is not valid JSON ({why}). Save it again, or as one object a line.") from None
    del raw
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        whole = whole["data"]
    if isinstance(whole, dict):
        whole = [whole]
    if not isinstance(whole, list):
        raise DataError(f"{name} holds no list of rows. Wanted: a list of objects, or one under the key data.")
    whole.reverse()
    while whole:  # from the end, so that memory is given back on the way
        item = whole.pop()
        yield DroppedRow("not valid UTF-8") if broken and is_broken(item) else item
