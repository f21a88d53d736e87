"""A file or Hub data set -> rows and a report; check against a model, save, convert, page.

Rows stay compact: only where each record lies is kept (about 25 bytes a row), and a Row is parsed when it is asked for.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import threading
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import sources
from .errors import DataError, DiskError, KTOError
from .jobs import Progress, check_cancel, no_progress
from .report import Issues, Report, histogram, require_trainable, weight_advice, write_issues
from .rows import DroppedRow, Row, parse_all, shorten, to_chatml, to_trl
from .spread import labels_of, split_rows, spread

__all__ = [
    "Issues", "Loaded", "Report", "Row", "Rows", "check", "convert", "histogram", "lengths", "load", "page", "preview",
    "require_trainable", "save", "split_rows", "spread", "weight_advice", "write_issues",
]  # fmt: skip

SHOWN = 400  # characters of a text in the table
FORMS = {"trl": to_trl, "chatml": to_chatml}


class Rows(Sequence[Row]):
    """The kept rows of a source, parsed on demand; slices and `take` are Rows too. Safe for several threads."""

    def __init__(self, store: sources.Store):
        self._store = store
        self._offsets, self._sizes, self._lines = array("Q"), array("Q"), array("Q")
        self._flags = bytearray()  # label + 2 × which row of the record
        self._found: tuple[str, array] = ("", array("Q"))  # the last search

    def _add(self, offset: int, size: int, line: int, side: int, label: bool) -> None:
        self._offsets.append(offset)
        self._sizes.append(size)
        self._lines.append(line)
        self._flags.append(2 * side + label)

    def __len__(self) -> int:
        return len(self._flags)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.take(range(*i.indices(len(self))))
        obj = sources.decode(self.raw(i))[0]
        return parse_all(obj, self._lines[i])[0][self._flags[i] >> 1]

    def raw(self, i: int) -> bytes:
        """The JSON text that row ``i`` was read from."""
        return self._store.read(self._offsets[i], self._sizes[i])

    @property
    def labels(self) -> list[bool]:
        return [bool(f & 1) for f in self._flags]

    def take(self, indices: Sequence[int]) -> Rows:
        new = Rows(self._store)
        for name in ("_offsets", "_sizes", "_lines"):
            old = getattr(self, name)
            setattr(new, name, array("Q", (old[i] for i in indices)))
        new._flags = bytearray(self._flags[i] for i in indices)
        return new

    def search(self, needle: str) -> array:
        """Indices of the rows with ``needle`` in a message, a tool call or a column; case does not matter."""
        if self._found[0] != needle:
            self._found = (needle, array("Q", _search(self, needle)))
        return self._found[1]


@dataclass
class Loaded:
    """A data set in use. ``sha256`` is of the file's bytes, or of the records of a Hub data set."""

    rows: Rows
    report: Report
    source: str
    sha256: str
    split: str = "train"


# --- load and check ---------------------------------------------------------------------------------------------------


def load(
    source: str, split: str = "train", *, progress: Progress = no_progress, cancel: threading.Event | None = None
) -> Loaded:
    """Read a file (JSONL, JSON, CSV, Parquet, .gz of a text form) or a Hub data set (``owner/name``).

    Rows that cannot be used are in the report, with reason and line; whether the rest can be trained on is for
    `require_trainable` to say.

    Raises:
        DataError: the source is missing, cannot be read, or is of no known kind.
    """
    source = str(source)
    store, found = sources.records(source, split, progress, cancel)
    digest = _Digest(source)
    rows, report = Rows(store), Report()
    forms: Counter[str] = Counter()
    columns: dict[str, None] = {}
    said: dict[int, int] = {}  # hash of prompt and completion -> 4 × first line + labels seen (1 true, 2 false)
    for line, offset, raw in found:
        parsed, form, changes = _read(raw, line)
        forms[form] += 1
        if offset >= 0:
            digest.update(raw)
        report.rows += len(parsed)
        for side, row in enumerate(parsed):
            if isinstance(row, DroppedRow):
                report.dropped[row.reason] += 1
                report.issues.add(line, "dropped", row.reason, row.detail)
                if row.reason == "wrong columns" and len(columns) < 50:
                    columns |= dict.fromkeys(row.detail.split(", "))
                continue
            rows._add(offset, len(raw), line, side, row.label)
            for change in changes:
                report.changed[change] += 1
                report.issues.add(line, "changed", change)
            report.row_lengths.append(_characters(row))
            _compare(row, said, report)
    del forms[""]
    report.format = " + ".join(name for name, _ in forms.most_common())
    report.kept = len(rows)
    report.desirable = sum(f & 1 for f in rows._flags)
    report.undesirable = report.kept - report.desirable
    report.fitting = (report.desirable, report.undesirable)
    report.columns = list(columns)
    progress(1.0, f"{report.rows:,} rows read, {report.kept:,} kept")
    return Loaded(rows, report, source, digest.hex(), split)


def _read(raw: bytes | DroppedRow, line: int) -> tuple[list[Row | DroppedRow], str, list[str]]:
    """What one record stands for: rows or the reasons why not, form, changes."""
    if isinstance(raw, DroppedRow):
        return [raw], "", []
    try:
        obj, mended = sources.decode(raw)
    except DroppedRow as e:
        return [e], "", []
    parsed, form, changes = parse_all(obj, line)
    if key := sources.repeated_key(raw, obj):
        return [DroppedRow("key given twice with different values", key)] * len(parsed), form, []
    return parsed, form, mended + changes


def _characters(row: Row) -> int:
    """Length of a row's texts, tool calls as JSON included."""
    n = 0
    for m in (*row.prompt, *row.completion):
        n += len(m["content"] or "")
        if "tool_calls" in m:
            n += len(sources.encode(m["tool_calls"]))
    return n


def _compare(row: Row, said: dict[int, int], report: Report) -> None:
    """Count a row that repeats or contradicts an earlier one."""
    key = hash(sources.encode((row.prompt, row.completion, row.tools)))
    before, bit = said.get(key), 1 if row.label else 2
    if before is None:
        said[key] = 4 * row.line + bit
    elif before & bit:
        report.duplicates += 1
        report.issues.add(row.line, "duplicate", "same prompt, completion and label", before >> 2)
    else:
        said[key] = before | bit
        report.conflicts += 1
        report.issues.add(row.line, "conflict", "same prompt and completion, other label", before >> 2)


class _Digest:
    """sha256 of a file, taken in a thread beside the parsing; of the records where there is no file."""

    def __init__(self, source: str):
        self._hash, self._thread = hashlib.sha256(), None
        if not sources.is_hub(source):
            self._thread = threading.Thread(target=self._read, args=(sources.find(source),), daemon=True)
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


def check(
    loaded: Loaded,
    tokenizer=None,
    max_length: int | None = None,
    *,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> Report:
    """The report with lengths in tokens, and the rows that would be cut or left out at ``max_length`` tokens.

    Without a tokenizer it is the report as loaded, lengths in characters.
    """
    if tokenizer is None:
        return loaded.report
    from .template import encode_iter

    report = replace(loaded.report, issues=loaded.report.issues.copy(), lengths_unit="tokens", truncated=0, too_long=0)
    report.row_lengths, labels, lines = array("I"), loaded.rows.labels, loaded.rows._lines
    fitting = [0, 0]
    for i, e in enumerate(encode_iter(loaded.rows, tokenizer, max_length, progress, cancel)):
        report.row_lengths.append(e.length)
        if e.fate == "too_long":
            report.too_long += 1
            report.issues.add(lines[i], "too_long", "completion longer than the maximum length", f"{e.length} tokens")
            continue
        fitting[0 if labels[i] else 1] += 1
        if e.fate == "truncated":
            report.truncated += 1
            report.issues.add(lines[i], "truncated", "prompt cut from the left", f"{e.length} tokens")
    report.fitting = tuple(fitting)
    return report


def lengths(
    rows: Sequence[Row], tokenizer=None, progress: Progress = no_progress, cancel: threading.Event | None = None
) -> list[int]:
    """Prompt and completion of every row, in tokens, or in characters without a tokenizer."""
    if tokenizer is None:
        return [_characters(r) for r in rows]
    from .template import encode_iter

    return [e.length for e in encode_iter(rows, tokenizer, None, progress, cancel)]


# --- save -------------------------------------------------------------------------------------------------------------


def save(
    rows: Sequence[Row],
    path: str | os.PathLike,
    form: str = "trl",
    *,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> Path:
    """Write rows as JSONL (``.gz``: compressed) in TRL's conversational form or ChatML; beside, then renamed.

    Raises:
        DataError: unknown form, a name that promises another kind of file, or something there that is no file.
        DiskError: the file cannot be written.
    """
    path = Path(path).expanduser().resolve()  # a link stays one
    if form not in FORMS:
        raise DataError(f"There is no form {form}. Use {' or '.join(FORMS)}.")
    if path.suffix.lower() in (".csv", ".tsv", ".parquet") or path.is_dir():
        raise DataError(f"{path.name} cannot be written: rows are saved as JSONL. Choose a name that ends in .jsonl.")
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is no file, so no rows can be put in its place. Choose another name.")
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (gzip.open if path.suffix == ".gz" else open)(part, "wb") as f:
            for n, row in enumerate(rows):
                if n % 2000 == 0:
                    check_cancel(cancel)
                    progress(n / len(rows), f"Saving {path.name}: {n:,} rows")
                f.write(sources.encode(FORMS[form](row)) + b"\n")
        os.replace(part, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(e, OSError) and not isinstance(e, KTOError):
            raise DiskError.of(path, e) from None
        raise
    return path


def convert(
    source: str,
    to: str,
    out: str | os.PathLike,
    split: str = "train",
    *,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> Loaded:
    """`load` and `save` in one. Returns what was loaded, whose report says what was left out.

    Raises:
        DataError: no row can be used, or ``out`` is the source and rows would be lost; or as `load` and `save`.
    """
    loaded = load(source, split, progress=progress, cancel=cancel)
    report = loaded.report
    if not report.kept:
        raise DataError(report.problem)
    if report.dropped and os.path.exists(source) and os.path.exists(out) and os.path.samefile(source, out):
        raise DataError(
            f"{out} is the file that is read, and {sum(report.dropped.values()):,} of its rows cannot be kept: they "
            "would be lost. Choose another name."
        )
    save(loaded.rows, out, to, progress=progress, cancel=cancel)
    return loaded


# --- look -------------------------------------------------------------------------------------------------------------


def page(
    rows: Sequence[Row], page: int = 0, size: int = 50, search: str = "", label: bool | None = None
) -> tuple[list[dict], int]:
    """Page ``page`` (from 0) of the rows that match, for a table, and how many match in all."""
    needle = search.strip()
    if needle:
        hits: Sequence[int] = rows.search(needle) if isinstance(rows, Rows) else list(_search(rows, needle))
    else:
        hits = range(len(rows))
    if label is not None:
        labels = labels_of(rows)
        hits = [i for i in hits if labels[i] is label]
    return [table_row(rows[i], i) for i in hits[page * size : (page + 1) * size]], len(hits)


def preview(source: str, split: str = "train", size: int = 50) -> list[dict]:
    """The first rows that can be used, as `page` gives them, without reading the rest of the file.

    Raises:
        DataError: see `load`.
    """
    store, found = sources.records(str(source), split)
    out: list[dict] = []
    for line, _, raw in found:
        out += [table_row(r, len(out) + k) for k, r in enumerate(r for r in _read(raw, line)[0] if isinstance(r, Row))]
        if len(out) >= size:
            break
    return out[:size]


def table_row(row: Row, index: int) -> dict:
    """A row for a table: its place, label, the beginnings of the last question and of the answer, and what is in it."""
    asked = next((m["content"] for m in reversed(row.prompt) if m["role"] == "user" and m["content"]), None)
    answer = row.completion[0]
    calls = [c.get("function", c) for c in answer.get("tool_calls", ())]
    said = [answer["content"] or "", *(f"{c.get('name')}({_compact(c.get('arguments'))})" for c in calls)]
    return {
        "index": index,
        "line": row.line,
        "label": row.label,
        "prompt": shorten(asked or next((m["content"] for m in reversed(row.prompt) if m["content"]), ""), SHOWN),
        "completion": shorten("\n".join(s for s in said if s), SHOWN),
        "turns": len(row.prompt) + 1,
        "system": any(m["role"] == "system" for m in row.prompt),
        "tools": bool(row.tools) or any("tool_calls" in m or m["role"] == "tool" for m in (*row.prompt, answer)),
        "characters": _characters(row),
        "extra": row.extra,
    }


def _compact(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else sources.encode(arguments or {}).decode("utf-8", "replace")


def _search(rows: Sequence[Row], needle: str) -> Iterator[int]:
    needle = needle.casefold()
    # ASCII that JSON never escapes can be looked for in the raw text first, which spares parsing most rows
    plain = isinstance(rows, Rows) and needle.isascii() and not set(needle) & set('"\\/\x7f')
    quick = needle.encode() if plain else b""
    for i in range(len(rows)):
        if quick:
            raw = rows.raw(i)
            if quick not in raw.lower() and b"\\u" not in raw and raw.isascii():
                continue
        if needle in _text(rows[i]).casefold():
            yield i


def _text(row: Row) -> str:
    """All that a search looks at."""
    parts = [m["content"] or "" for m in (*row.prompt, *row.completion)]
    parts += [_compact(m["tool_calls"]) for m in (*row.prompt, *row.completion) if "tool_calls" in m]
    parts += [v if isinstance(v, str) else str(v) for v in row.extra.values()]
    return "\n".join(parts)
