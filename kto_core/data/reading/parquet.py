"""Record batches of a Parquet file that small memory holds, whatever the file says.

A value that is repeated stands in such a file once: a kilobyte can mean gigabytes. Texts stay references to that one
value until their row's turn comes, and batches are cut by the bytes that they will take.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kto_core.data.records.rows import DroppedRow, shorten
from kto_core.errors import DataError

from . import bombs

ROWS = 1000  # at most, of one batch
BATCH = 64 * 2**20  # bytes of a batch whose values are written out
ROW = 256 * 2**20  # bytes; a larger row is dropped
EMPTY_ROWS = 5_000_000  # rows that any file may have; more need a byte each
TEXTS = ("STRING", "NONE", "ENUM", "JSON", "BSON")  # what may stay a reference


def batches(path: Path) -> Iterator[Any]:
    """Arrow record batches of at most `BATCH` bytes written out, or a DroppedRow for a row that is too large.

    Raises:
        DataError: no whole Parquet file, or one that unpacks to far more than its size.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            texts = _look(file, path)
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
            for batch in file.iter_batches(batch_size=ROWS):
                yield from _cut(batch)
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as e:
        raise DataError(f"{path.name} is not a complete Parquet file ({shorten(str(e))}). Save it again.") from None


def _look(file: Any, path: Path) -> list[str]:
    """Paths of the columns with texts.

    Raises:
        DataError: by its own numbers a part of the file would take far more memory than its size.
    """
    schema, facts, size = file.schema, file.metadata, path.stat().st_size
    most, total = bombs.allowed(size), 0
    columns = [schema.column(i) for i in range(len(schema))]
    for group in (facts.row_group(i) for i in range(facts.num_row_groups)):
        for i, column in enumerate(columns):
            chunk = group.column(i)
            total += chunk.num_values * (column.length if column.physical_type == "FIXED_LEN_BYTE_ARRAY" else 8)
            if chunk.total_uncompressed_size > most or total > most:
                raise bombs.refuse(path.name)
    if facts.num_rows > max(EMPTY_ROWS, size):
        raise bombs.refuse(path.name)
    return [c.path for c in columns if c.physical_type == "BYTE_ARRAY" and c.logical_type.type in TEXTS]


def _cut(batch: Any) -> Iterator[Any]:
    """A batch in halves of halves until each is small enough."""
    size = written_out(batch)
    if size <= BATCH or (batch.num_rows < 2 and size <= ROW):
        yield batch
    elif batch.num_rows < 2:
        yield DroppedRow(f"row larger than {ROW // 2**20} MiB", f"{size:,} bytes")
    else:
        half = batch.num_rows // 2
        yield from _cut(batch.slice(0, half))
        yield from _cut(batch.slice(half))


def written_out(values: Any) -> int:
    """Bytes of a record batch or an array if every reference were replaced by its value."""
    import pyarrow.compute as compute
    import pyarrow.types as types

    if hasattr(values, "columns"):
        return sum(written_out(column) for column in values.columns)
    kind = values.type
    if types.is_dictionary(kind):
        if not len(values):
            return 0
        sizes = compute.binary_length(values.dictionary).cast("int64")
        return (compute.sum(sizes.take(values.indices)).as_py() or 0) + 8 * len(values)
    if types.is_struct(kind):
        return sum(written_out(part) for part in values.flatten()) + 8 * len(values)
    if types.is_map(kind):
        start, end = (values.offsets[i].as_py() for i in (0, -1))
        parts = (part.slice(start, end - start) for part in (values.keys, values.items))
        return sum(map(written_out, parts)) + 8 * len(values)
    if types.is_nested(kind) and hasattr(values, "flatten"):
        return written_out(values.flatten()) + 8 * len(values)
    if hasattr(values, "storage"):
        return written_out(values.storage)
    return max(int(values.nbytes), 8 * len(values))
