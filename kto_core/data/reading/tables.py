"""Records of tables: CSV files, Arrow batches (Parquet, Hub data sets), one dict a row.

This module knows nothing of prompts and labels, except for the columns that may hold messages as text.
"""

from __future__ import annotations

import csv
import io
import json
import socket
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from kto_core.data.records.rows import COLUMNS, DroppedRow, shorten
from kto_core.data.records.turns import NOT_UTF8
from kto_core.errors import DataError

from .cells import may_hold, messages

_MESSAGES = tuple(sorted(COLUMNS - {"label", "tools"}))
_UNREACHABLE = "{source} is not a local file, and the Hub cannot be reached. Check the network, or choose a file."
_NETWORK = ("ConnectionError", "ConnectError", "ConnectTimeout", "ReadTimeout", "OfflineModeIsEnabled")


def is_broken(value: object) -> bool:
    """Whether text read with ``surrogateescape`` had bytes that are not UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
        return False
    except UnicodeEncodeError:
        return True


class _Lines:
    """Lines for a csv.reader, of which all but the first that it took for a record can be given back."""

    def __init__(self, file: Iterator[str]):
        self._file = file
        self._back: deque[str] = deque()
        self._taken: list[str] = []
        self.number = 0  # of the line before the record's first

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._back.popleft() if self._back else next(self._file)
        self._taken.append(line)
        return line

    def begin(self) -> int:
        """A record begins: the number of its first line."""
        self.number += len(self._taken)
        self._taken = []
        return self.number + 1

    def give_back(self) -> None:
        """All but the first line are read again, as records of their own."""
        self._back.extendleft(reversed(self._taken[1:]))
        del self._taken[1:]

    def peek(self) -> str:
        """The first line that is not blank."""
        for line in self._file:
            if line.strip():
                self._back.append(line)
                return line
            self.number += 1
        return ""


def csv_rows(file: BinaryIO, name: str) -> Iterator[tuple[int, object]]:
    """Rows as dicts, each with the number of the line it begins on. Cells with a list of messages are decoded.

    A quote that is opened and never closed would take all lines up to the next one into its cell: only its own line is
    dropped.
    """
    csv.field_size_limit(2**31 - 1)
    lines = _Lines(io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline=""))
    rows = csv.reader(lines, delimiter=_delimiter(lines.peek()), strict=True)
    header = None
    while True:
        line = lines.begin()
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as e:
            lines.give_back()
            yield line, DroppedRow("not valid CSV", str(e))
            continue
        if not cells or cells == [""]:
            continue
        if header is None:
            header = [c.strip() for c in cells]
            if twice := sorted({c for c in header if header.count(c) > 1}):
                raise DataError(f"{name} has the column {shorten(twice[0])} twice. Rename one of them.")
            continue
        if len(cells) > len(header):
            yield line, DroppedRow("more cells than columns", f"{len(cells)} cells, {len(header)} columns")
            continue
        row: dict[str, Any] = dict(zip(header, cells, strict=False))
        if any(not c.isascii() and is_broken(c) for c in cells):
            yield line, DroppedRow(NOT_UTF8, "perhaps Windows-1252, as Excel saves CSV; save it as CSV UTF-8")
            continue
        yield line, _unpacked(row)


def _unpacked(row: dict[str, Any]) -> dict[str, Any] | DroppedRow:
    """A row whose texts of messages are messages, or the reason why one of them cannot be read."""
    for column, cell in row.items():
        if cell.__class__ is str and may_hold(cell):
            try:
                row[column] = messages(cell)
            except DroppedRow as e:
                return e
    return row


def _delimiter(header: str) -> str:
    """The one that finds most of the columns we know, else most columns."""

    def score(d: str) -> tuple[int, int]:
        cells = [c.strip().strip('"') for c in header.split(d)]
        return sum(c in COLUMNS for c in cells), len(cells)

    return max(",;\t|", key=score)


# --- Arrow and the Hub ------------------------------------------------------------------------------------------------


def arrow_rows(batches: Iterable[Any]) -> Iterator[dict[str, Any] | DroppedRow]:
    for batch in batches:
        if isinstance(batch, DroppedRow):
            yield batch
            continue
        for row in batch.to_pylist():
            for column in (*_MESSAGES, "tools"):
                if isinstance(row.get(column), list | dict):
                    row[column] = _without_null(row[column])
            yield _unpacked(row)


def _without_null(value: object) -> object:
    """Arrow gives all structs of a column the same fields: those that a row did not have are null."""
    if isinstance(value, list):
        return [_without_null(v) for v in value]
    if isinstance(value, dict):
        return {k: _without_null(v) for k, v in value.items() if v is not None or k == "content"}
    return value


def hub_batches(source: str, split: str) -> Iterator[Any]:
    """Arrow batches of one split of a Hub data set (``owner/name`` or ``owner/name:config``).

    Raises:
        DataError: not found, no network, unknown split or configuration.
    """
    import datasets

    repo, _, config = source.partition(":")
    cached = Path(datasets.config.HF_DATASETS_CACHE, repo.replace("/", "___"))
    if not (Path(repo).exists() or cached.exists() or _reachable()):
        raise DataError(_UNREACHABLE.format(source=source))
    try:
        found = datasets.load_dataset(repo, config or None, split=split)
    except Exception as e:  # every layer of the library has errors of its own
        raise DataError(_hub_problem(e, source, split)) from e
    return (table for table in found.with_format("arrow").iter(1000))


def _reachable() -> bool:
    """Whether something answers at the Hub's address; the library itself would try for half a minute."""
    from huggingface_hub import constants

    url = urlsplit(constants.ENDPOINT)
    if constants.is_offline_mode():
        return False
    if getproxies().get(url.scheme) and not proxy_bypass(url.hostname or ""):
        return True  # for the library to find out
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=5).close()
        return True
    except OSError:
        return False


def _hub_problem(e: Exception, source: str, split: str) -> str:
    text = str(e)
    chain: BaseException | None = e
    names: list[str] = []
    while chain is not None and len(names) < 10:
        names.append(type(chain).__name__)
        chain = chain.__cause__ or chain.__context__
    if "Unknown split" in text:
        known = text.partition("Should be one of")[2].strip(" .")
        return f"{source} has no split {split}. Available splits: {known.strip('[]') or 'unknown'}."
    if "Config name is missing" in text or "BuilderConfig" in text:
        return (
            f"{source} has several configurations. Choose one with {source.partition(':')[0]}:NAME. "
            f"{shorten(text, 300)}"
        )
    if any(n in _NETWORK for n in names):
        return _UNREACHABLE.format(source=source)
    if "NotFound" in names[0]:
        return (
            f"{source} is neither a local file nor a Hub dataset that you can access. Check the name. For a private "
            "or gated dataset, log in with `hf auth login`."
        )
    return f"{source} cannot be loaded from the Hub: {shorten(text, 200) or names[0]}. Check the name and the split."
