"""What a data set is like: counts, reasons, lengths, weight advice, and whether it can be trained on.

This module knows nothing of files and rows; `dataset` fills it.
"""

from __future__ import annotations

import csv
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, overload

from kto_core.data.records.labels import SCALE
from kto_core.data.records.mapping import example
from kto_core.data.records.rows import WANTED, shorten
from kto_core.data.records.turns import NEEDS_EYES, NOT_UTF8
from kto_core.errors import DataError, DiskError
from kto_core.files import beside

from .as_seen import Seen
from .contrast import hint

UNREADABLE = {NOT_UTF8, "not JSON", "not valid CSV"}  # reasons that say nothing of the columns
UNKNOWN_COLUMNS = ("wrong columns", "no prompt column")  # reasons whose detail names the columns found
KINDS = ("dropped", "changed", "duplicate", "conflict", "refused", "too_long", "truncated")


class Issues(Sequence[dict[str, Any]]):
    """All issues of a data set, in order of finding; each reads as ``{"line", "kind", "reason", "detail"}``.

    None is left out, however many there are: one takes about 20 bytes and its detail (80 characters at most).
    """

    def __init__(self) -> None:
        self._lines, self._codes = array("Q"), array("H")
        self._details: list[str | int] = []
        self._known: dict[tuple[str, str], int] = {}
        self._names: list[tuple[str, str]] = []

    def add(self, line: int, kind: str, reason: str, detail: str | int = "") -> None:
        """``detail`` as a number is the line this one is like."""
        code = self._known.get((kind, reason))
        if code is None:
            code = self._known[kind, reason] = len(self._names)
            self._names.append((kind, reason))
        self._lines.append(line)
        self._codes.append(code)
        self._details.append(detail)

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, i: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, i: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, i: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        kind, reason = self._names[self._codes[i]]
        detail = self._details[i]
        detail = f"line {detail}" if isinstance(detail, int) else detail
        return {"line": self._lines[i], "kind": kind, "reason": reason, "detail": detail}

    def copy(self) -> Issues:
        new = Issues()
        new._lines, new._codes, new._details = self._lines[:], self._codes[:], self._details[:]
        new._known, new._names = dict(self._known), list(self._names)
        return new


@dataclass
class Report:
    """Counts of one data set. A pair counts as two rows, so that ``rows == kept + sum(dropped.values())`` always.

    Attributes:
        dropped: reason -> rows; changed: reason -> rows kept with that change.
        format: the shapes found, most frequent first, joined by " + ".
        duplicates: rows that say again what an earlier row said, with the same label; they are kept.
        conflicts: prompts with a completion that has both labels; their rows are kept.
        lengths: p50, p99 and max of ``row_lengths`` (prompt and completion together).
        lengths_unit: "characters", or "tokens" once a tokenizer has counted.
        row_lengths: one number a kept row, in order.
        truncated, too_long: rows whose prompt is cut, and rows left out of training; None without a model.
        columns: names of all columns of the source's records, up to 200.
        mapping: what rows are made of (`column_map.TARGETS`, ``ranked``) -> the columns it was read from.
        mapped: what of it the owner of the data said, target -> column.
        scale: how labels that are numbers on a scale were read, or what to do if they were not; "" without a scale.
        scales: columns that are, or may be, a scale -> number -> how often it is there.
        answers, categories: what else sets good rows apart from bad ones, see `contrast.Contrast`; {} without.
        unused: columns that hold something and are not trained on -> kept rows that have them.
        fitting: (desirable, undesirable) kept rows that are neither too long nor refused.
        seen: what the model's chat template makes of the rows; None without a model.
    """

    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    format: str = ""
    desirable: int = 0
    undesirable: int = 0
    duplicates: int = 0
    conflicts: int = 0
    row_lengths: array[int] = field(default_factory=lambda: array("I"))
    lengths_unit: str = "characters"
    truncated: int | None = None
    too_long: int | None = None
    columns: list[str] = field(default_factory=list)
    mapping: dict[str, list[str]] = field(default_factory=dict)
    mapped: dict[str, str] = field(default_factory=dict)
    scale: str = ""
    scales: dict[str, dict[float, int]] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)
    categories: dict[str, Any] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)
    fitting: tuple[int, int] = (0, 0)
    seen: Seen | None = None
    issues: Issues = field(default_factory=Issues)

    @property
    def lengths(self) -> dict[str, Any]:
        return percentiles(self.row_lengths)

    @property
    def problem(self) -> str:
        """Why this data cannot be trained on, in a sentence with what to do; "" if it can."""
        if not self.rows:
            return f"The dataset is empty. Each row needs {WANTED}."
        if SCALE in self.dropped and not (self.desirable and self.undesirable):
            return self.scale
        if not self.kept:
            if sum(self.dropped[r] for r in UNKNOWN_COLUMNS) == self.rows:
                found = ", ".join(self.columns) or "none"
                return (
                    f"No row has the required columns. Found: {found}. Required: {WANTED}. Say which column is which, "
                    f"for example with {example(self.columns)}."
                )
            if self.dropped.get(NEEDS_EYES) == self.rows:
                return f"All {self.rows:,} rows have {NEEDS_EYES}. Choose a dataset of text, or remove them."
            why = "; ".join(f"{reason}: {count:,}" for reason, count in self.dropped.most_common(3))
            remedy = f"Each row needs {WANTED}." if set(self.dropped) - UNREADABLE else "Save the file again, as UTF-8."
            return f"None of the {self.rows:,} rows can be used ({why}). {remedy}"
        good, bad = self.fitting
        if not good + bad:
            if self.seen and self.seen.refused == self.kept:
                return f"The model's chat template cuts the answers of all {self.kept:,} rows. Choose another model."
            return f"All {self.kept:,} rows are too long. Raise the maximum length, or shorten the answers."
        if not good or not bad:
            have, lack = ("good", "bad") if good else ("bad", "good")
            cut = f" after dropping the {self.too_long:,} that are too long" if self.too_long else ""
            return (
                f"All rows are {have}{cut}. KTO needs both good and bad rows. Add {lack} rows (label "
                f"{'false' if good else 'true'})."
            )
        return ""

    @property
    def left_out(self) -> dict[str, int]:
        """Why rows are not trained on -> how many; with ``sum(fitting)`` it makes ``rows``."""
        counts = {"dropped": self.rows - self.kept, "too long": self.too_long or 0}
        refused = self.kept - sum(self.fitting) - counts["too long"]
        return {why: n for why, n in (counts | {"cut by the chat template": refused}).items() if n > 0}

    @property
    def warnings(self) -> list[str]:
        """What can be trained on, but is hardly meant; one sentence each."""
        lost = self.dropped.get(NOT_UTF8, 0)
        utf8 = f"{lost:,} rows are lost because the file is not all UTF-8. Save it again, as UTF-8." if lost else ""
        return [said for said in (utf8, hint(self.answers)) if said]

    def to_dict(self) -> dict[str, Any]:
        """The object that ``data check --json`` prints."""
        out = {
            "rows": self.rows,
            "kept": self.kept,
            "dropped": dict(self.dropped.most_common()),
            "changed": dict(self.changed.most_common()),
            "unused": dict(self.unused.most_common()),
            "format": self.format,
            "columns": self.columns,
            "mapping": self.mapping,
            "desirable": self.desirable,
            "undesirable": self.undesirable,
            "duplicates": self.duplicates,
            "conflicts": self.conflicts,
            "weights": weight_advice(*self.fitting),
            "lengths": self.lengths,
            "lengths_unit": self.lengths_unit,
        }
        for name in ("answers", "categories", "warnings"):
            if found := getattr(self, name):
                out[name] = found
        if self.mapped:
            out["mapped"] = self.mapped
        if self.scale:
            out["scale"] = self.scale
        if self.truncated is not None:
            out |= {"truncated": self.truncated, "too_long": self.too_long}
        if self.seen is not None:
            out |= self.seen.to_dict()
        return out


def require_trainable(report: Report) -> None:
    """Raises DataError: no row can be used, or all have one label."""
    if problem := report.problem:
        raise DataError(problem)


def weight_advice(desirable: int, undesirable: int) -> dict[str, list[float]]:
    """Ranges of ``desirable_weight`` (the other weight at 1) and of ``undesirable_weight`` (likewise).

    KTO paper (arXiv 2402.01306 v5), Eq. 9: λ_D·n_D / (λ_U·n_U) in [1, 3/2]. Take one of the two, never both.
    With one label missing there is nothing to balance: [1, 1].
    """
    if not desirable or not undesirable:
        return {"desirable": [1.0, 1.0], "undesirable": [1.0, 1.0]}
    ratio = undesirable / desirable
    return {"desirable": [ratio, 1.5 * ratio], "undesirable": [1 / (1.5 * ratio), 1 / ratio]}


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """p50, p99 (nearest rank) and max; zeros without rows."""
    ordered = sorted(lengths)
    if not ordered:
        return {"p50": 0, "p99": 0, "max": 0}
    n = len(ordered)
    return {"p50": ordered[(n * 50 + 99) // 100 - 1], "p99": ordered[(n * 99 + 99) // 100 - 1], "max": ordered[-1]}


def histogram(lengths: Sequence[int], max_length: int | None = None, bins: int = 30) -> list[dict[str, Any]]:
    """Bars ``{"start", "end", "count", "over"}``, start <= length < end, of round widths; the last holds all above p99.

    A bar never straddles ``max_length``: ``over`` says whether its rows are longer.
    """
    if not lengths:
        return []
    top, highest = percentiles(lengths)["p99"], max(lengths)
    width = next(w * 10**k for k in range(12) for w in (1, 2, 5) if w * 10**k * bins > top)
    edges = list(range(0, (top // width + 1) * width + 1, width))
    if highest >= edges[-1]:
        edges.append(highest + 1)
    if max_length and 0 < max_length + 1 < edges[-1]:
        edges = sorted({*edges, max_length + 1})
    counts = [0] * (len(edges) - 1)
    ordered = sorted(lengths)
    i = 0
    for n in ordered:
        while n >= edges[i + 1]:
            i += 1
        counts[i] += 1
    return [
        {"start": edges[i], "end": edges[i + 1], "count": c, "over": bool(max_length and edges[i] > max_length)}
        for i, c in enumerate(counts)
    ]


def write_issues(report: Report, path: str | os.PathLike[str]) -> Path:
    """All issues as JSONL, or as CSV if the name ends so; written beside and renamed.

    Raises:
        DiskError: the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path) as part, open(part, "w", encoding="utf-8", newline="") as f:
            if path.suffix.lower() == ".csv":
                _csv(report.issues, f)
            else:
                f.writelines(json.dumps(i, ensure_ascii=False) + "\n" for i in report.issues)
    except OSError as e:
        raise DiskError.of(path, e) from None
    return path


def _csv(issues: Iterator[dict[str, Any]] | Issues, file: TextIO) -> None:
    writer = csv.DictWriter(file, ["line", "kind", "reason", "detail"])
    writer.writeheader()
    for issue in issues:
        detail = shorten(issue["detail"])
        if detail[:1] in ("=", "+", "-", "@"):  # a spreadsheet would run it as a formula
            detail = "'" + detail
        writer.writerow({**issue, "detail": detail})


def lopsided(fitting: tuple[int, int], desirable_weight: float, undesirable_weight: float) -> str:
    """What weights outside Eq. 9's range do to the rows that train, in a sentence; "" where they are inside it.

    Args:
        fitting: as in `Report`.
    """
    good, bad = desirable_weight * fitting[0], undesirable_weight * fitting[1]
    if not good or not bad or 1.0 <= round(good / bad, 1) <= 1.5:  # a few rows off the range ask for no change
        return ""
    side = "desirable" if good < bad else "undesirable"
    low, high = weight_advice(*fitting)[side]
    return (
        f"The loss is lopsided: with these weights, {fitting[0]:,} good and {fitting[1]:,} bad rows count "
        f"{good / bad:.2g} to 1. The KTO paper (Eq. 9) recommends {side}_weight from {low:.3g} to {high:.3g}, with the "
        "other weight at 1."
    )
