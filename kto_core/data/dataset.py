"""A file or Hub data set -> rows and a report; check against a model, save, convert, page.

Rows stay compact: only where each record lies is kept (about 28 bytes a row), and a Row is parsed when it is asked for.
"""

from __future__ import annotations

import gzip
import json
import os
import threading
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast, overload

from kto_core.config import column_map
from kto_core.config.thresholds import disorder
from kto_core.data.reading import json_text, sources
from kto_core.data.reading.digest import Digest
from kto_core.data.reading.record_rows import rows_of_record
from kto_core.data.reading.store import Store
from kto_core.data.records.labels import READ_FROM
from kto_core.data.records.names import holds, is_noted
from kto_core.data.records.rows import PLAIN, DroppedRow, Labels, Row, parse_all, to_chatml, to_trl
from kto_core.errors import DataError, DiskError, KTOError, MapError
from kto_core.files import beside, write_whole
from kto_core.jobs import Progress, check_cancel, no_progress

from .as_seen import Seen
from .contrast import Contrast
from .order import spread
from .report import Issues, Report, histogram, require_trainable, weight_advice, write_issues
from .row_text import characters, find
from .splitting import split_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kto_core.data.rendering.style import Style

__all__ = [
    "Issues", "Loaded", "Report", "Row", "Rows", "check", "convert", "histogram", "lengths", "load",
    "require_trainable", "save", "split_rows", "spread", "weight_advice", "write_issues",
]  # fmt: skip

FORMS = {"trl": to_trl, "chatml": to_chatml}


class Rows(Sequence[Row]):
    """The kept rows of a source, parsed on demand; slices and `take` are Rows too. Safe for several threads."""

    def __init__(self, store: Store, labels: Labels = PLAIN):
        self._store, self._labels = store, labels
        self._offsets, self._sizes, self._lines = array("Q"), array("Q"), array("Q")
        self._flags = array("I")  # label + 2 × which row of the record
        self._found: tuple[str, array[int]] = ("", array("Q"))  # the last search

    def _add(self, offset: int, size: int, line: int, side: int, label: bool) -> None:
        self._offsets.append(offset)
        self._sizes.append(size)
        self._lines.append(line)
        self._flags.append(2 * side + label)

    def __len__(self) -> int:
        return len(self._flags)

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> Rows: ...
    def __getitem__(self, i: int | slice) -> Row | Rows:
        if isinstance(i, slice):
            return self.take(range(*i.indices(len(self))))
        obj = json_text.decode(self.raw(i))[0]
        return cast(Row, parse_all(obj, self._lines[i], self._labels)[0][self._flags[i] >> 1])  # `load` adds rows only

    def raw(self, i: int) -> bytes:
        """The JSON text that row ``i`` was read from."""
        return self._store.read(self._offsets[i], self._sizes[i])

    @property
    def labels(self) -> list[bool]:
        return [bool(f & 1) for f in self._flags]

    def take(self, indices: Sequence[int]) -> Rows:
        new = Rows(self._store, self._labels)
        for name in ("_offsets", "_sizes", "_lines"):
            old = getattr(self, name)
            setattr(new, name, array("Q", (old[i] for i in indices)))
        new._flags = array("I", (self._flags[i] for i in indices))
        return new

    def search(self, needle: str) -> array[int]:
        """Indices of the rows with ``needle`` in a message, a tool call or a column; case does not matter."""
        if self._found[0] != needle:
            self._found = (needle, array("Q", find(self, needle, self.raw)))
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
    source: str,
    split: str = "train",
    *,
    good_from: float | None = None,
    bad_to: float | None = None,
    columns: str = "",
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> Loaded:
    """Read a file (JSONL, JSON, CSV, Parquet, .gz of a text form) or a Hub data set (``owner/name``).

    Rows that cannot be used are in the report, with reason and line; whether the rest can be trained on is for
    `require_trainable` to say.

    Args:
        good_from, bad_to: where labels that are numbers on a scale begin and cease to be good and bad; see `Labels`.
        columns: which column is which, as `column_map.parse` reads it; what is not named is recognized.

    Raises:
        DataError: the source is missing, cannot be read, or is of no known kind; or thresholds or columns do not fit.
    """
    if problem := disorder(good_from, bad_to) or column_map.wrong(columns):
        raise DataError(problem)
    labels = Labels(good_from, bad_to, column_map.parse(columns))
    while (loaded := _load(str(source), split, labels, progress, cancel)) is None:
        labels = labels.again()
    if problem := labels.columns.missing():
        raise MapError(problem)
    if loaded.report.kept and (problem := labels.misfit()):
        raise DataError(problem)
    return loaded


def _load(source: str, split: str, labels: Labels, progress: Progress, cancel: threading.Event | None) -> Loaded | None:
    """`load` with labels read in one way; None if a row shows that those before it have to be read in another."""
    store, found = sources.records(source, split, progress, cancel)
    digest = Digest(source)
    rows, report, contrast = Rows(store), Report(), Contrast()
    forms: Counter[str] = Counter()
    said: dict[int, int] = {}  # hash of prompt and completion -> 4 × first line + labels seen (1 true, 2 false)
    for line, offset, raw in found:
        parsed, form, changes = rows_of_record(raw, line, labels)
        if labels.stale:
            return None
        forms[form] += 1
        if isinstance(raw, bytes):  # what was dropped while it was read has none
            digest.update(raw)
        report.rows += len(parsed)
        for side, row in enumerate(parsed):
            if isinstance(row, DroppedRow):
                report.dropped[row.reason] += 1
                report.issues.add(line, "dropped", row.reason, row.detail)
                continue
            rows._add(offset, len(cast(bytes, raw)), line, side, row.label)
            for change in changes:
                report.changed[change] += 1
                report.issues.add(line, "changed", change)
            for column, value in row.extra.items():
                if holds(value) and READ_FROM + column not in changes and not is_noted(column, row.extra):
                    report.unused[column] += 1
            report.row_lengths.append(characters(row))
            contrast.add(row)
            _compare(row, said, report)
    labels.close()
    if labels.stale:
        return None
    del forms[""]
    report.format = " + ".join(name for name, _ in forms.most_common())
    if store.origin:
        report.format = f"{store.origin}: {report.format}" if report.format else store.origin
    report.kept = len(rows)
    report.desirable = sum(f & 1 for f in rows._flags)
    report.undesirable = report.kept - report.desirable
    report.fitting = (report.desirable, report.undesirable)
    report.columns, report.mapping = labels.columns.names, labels.columns.mapping(list(column_map.TARGETS))
    report.mapped, report.scale, report.scales = dict(labels.columns.given), labels.summary(), labels.scale_columns()
    report.answers, report.categories = contrast.lengths(), contrast.categories()
    rows._labels = labels.settled()
    progress(1.0, f"{report.rows:,} rows read, {report.kept:,} kept")
    return Loaded(rows, report, source, digest.hex(), split)


def _compare(row: Row, said: dict[int, int], report: Report) -> None:
    """Count a row that repeats or contradicts an earlier one."""
    key = hash(json_text.encode((row.prompt, row.completion, row.tools)))
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


def check(
    loaded: Loaded,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    *,
    style: Style | None = None,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> Report:
    """The report with lengths in tokens, and the rows that would be cut or left out at ``max_length`` tokens.

    What the model's chat template leaves out is in it too. ``style``: how rows are rendered, None for the defaults.

    Without a tokenizer it is the report as loaded, lengths in characters.
    """
    if tokenizer is None:
        return loaded.report
    from kto_core.data.rendering.style import PLAIN
    from kto_core.data.rendering.template import encode_iter

    report = replace(loaded.report, issues=loaded.report.issues.copy(), lengths_unit="tokens")
    report.changed, style = report.changed.copy(), style or PLAIN
    report.row_lengths, labels, lines = array("I"), loaded.rows.labels, loaded.rows._lines
    report.seen = Seen(style.train_thoughts)
    fitting, truncated, too_long = [0, 0], 0, 0
    for i, e in enumerate(encode_iter(loaded.rows, tokenizer, max_length, progress, cancel, style)):
        report.row_lengths.append(e.length)
        report.seen.count(lines[i], e.changes, e.refused, e.thought)
        for change in e.changes:
            report.changed[change] += 1
            report.issues.add(lines[i], "changed", change)
        if e.fate == "refused":
            report.issues.add(lines[i], "refused", e.refused)
            continue
        if e.fate == "too_long":
            too_long += 1
            report.issues.add(lines[i], "too_long", "completion longer than the maximum length", f"{e.length} tokens")
            continue
        fitting[0 if labels[i] else 1] += 1
        if e.fate == "truncated":
            truncated += 1
            report.issues.add(lines[i], "truncated", "prompt cut from the left", f"{e.length} tokens")
    report.fitting, report.truncated, report.too_long = (fitting[0], fitting[1]), truncated, too_long
    return report


def lengths(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> list[int]:
    """Prompt and completion of every row, in tokens, or in characters without a tokenizer."""
    if tokenizer is None:
        return [characters(r) for r in rows]
    from kto_core.data.rendering.template import encode_iter

    return [e.length for e in encode_iter(rows, tokenizer, None, progress, cancel)]


# --- save -------------------------------------------------------------------------------------------------------------


def save(
    rows: Sequence[Row],
    path: str | os.PathLike[str],
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
        raise DataError(f"Unknown format {form}. Use {' or '.join(FORMS)}.")
    if path.suffix.lower() in (".csv", ".tsv", ".parquet") or path.is_dir():
        raise DataError(f"Rows are saved as JSONL, so {path.name} must end in .jsonl. Choose another name.")
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is not a regular file, so it cannot be replaced. Choose another name.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path) as part, (gzip.open if path.suffix == ".gz" else open)(part, "wb") as f:
            for n, row in enumerate(rows):
                if n % 2000 == 0:
                    check_cancel(cancel)
                    progress(n / len(rows), f"Saving {path.name}: {n:,} rows")
                f.write(json_text.encode(FORMS[form](row)) + b"\n")
    except OSError as e:
        if isinstance(e, KTOError):
            raise
        raise DiskError.of(path, e) from None
    return path


def convert(
    source: str,
    to: str,
    out: str | os.PathLike[str],
    split: str = "train",
    *,
    good_from: float | None = None,
    bad_to: float | None = None,
    columns: str = "",
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> Loaded:
    """`load` and `save` in one. Returns what was loaded, whose report says what was left out.

    Where columns or thresholds were given, they are kept in ``OUT.reading.json``, beside the rows that they made.

    Raises:
        DataError: no row can be used, or ``out`` is the source and rows would be lost; or as `load` and `save`.
    """
    loaded = load(source, split, good_from=good_from, bad_to=bad_to, columns=columns, progress=progress, cancel=cancel)
    report = loaded.report
    if not report.kept:
        raise DataError(report.problem)
    if report.dropped and os.path.exists(source) and os.path.exists(out) and os.path.samefile(source, out):
        raise DataError(
            f"{out} is also the input file, and {sum(report.dropped.values()):,} of its rows would be lost. Choose "
            "another output file."
        )
    path = save(loaded.rows, out, to, progress=progress, cancel=cancel)
    if given := {
        k: v for k, v in (("good_from", good_from), ("bad_to", bad_to), ("map", columns)) if v not in (None, "")
    }:
        kept = {"source": source, "split": split, "sha256": loaded.sha256, **given, "mapping": report.mapping}
        write_whole(f"{path}.reading.json", json.dumps(kept, ensure_ascii=False, indent=1))
    return loaded
