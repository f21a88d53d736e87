"""Small files that mean gigabytes: refused, or cut, before they fill memory or disk."""

import gzip
import json
import resource

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kto_core.data import dataset
from kto_core.data.reading import bombs, parquet, sources
from kto_core.errors import DataError

TEXT = "x" * 2**20


@pytest.fixture
def small(monkeypatch):
    """The limits, so that a test need not write gigabytes."""
    monkeypatch.setattr(bombs, "SPOOL", 8 * 2**20)
    monkeypatch.setattr(parquet, "ROW", 4 * 2**20)
    monkeypatch.setattr(parquet, "BATCH", 2 * 2**20)


def write(path, **columns):
    pq.write_table(pa.table(columns), path, compression="zstd")
    return path


def repeated(text, n: int):
    return pa.DictionaryArray.from_arrays(pa.array([0] * n, pa.int32()), [text])


def nested(n: int, turns: int = 1):
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    return pa.array([[{"role": "user", "content": TEXT}] * turns] * n, kind)


def memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_a_text_that_is_repeated_fills_nothing(tmp_path, small):
    n = 20_000
    file = write(tmp_path / "a.parquet", prompt=repeated(TEXT, n), completion=["a"] * n, label=[True] * n)
    assert file.stat().st_size < 3000
    before = memory()
    with pytest.raises(DataError, match="unpacks to more than"):
        dataset.load(file)
    assert memory() - before < 300_000  # KiB; twenty gigabytes it would be


def test_nested_texts_count_as_well(tmp_path, small):
    file = write(tmp_path / "a.parquet", messages=nested(30), label=[True] * 30)
    with pytest.raises(DataError, match="unpacks to more than"):
        dataset.load(file)


def test_a_row_of_its_own_may_be_too_large(tmp_path, small):
    file = write(tmp_path / "a.parquet", messages=nested(1, 6), label=[True])
    report = dataset.load(file).report
    assert report.kept == 0 and any("row larger than 4 MiB" in reason for reason in report.dropped)


def test_batches_hold_what_they_may(tmp_path, small):
    file = write(tmp_path / "a.parquet", messages=nested(7), label=[True] * 7)
    sizes = [parquet.written_out(b) for b in parquet.batches(file)]
    assert len(sizes) == 7 and max(sizes) <= parquet.BATCH


def test_numbers_that_are_repeated(tmp_path, small, monkeypatch):
    monkeypatch.setattr(parquet, "EMPTY_ROWS", 1000)
    with pytest.raises(DataError, match="unpacks to more than"):
        list(parquet.batches(write(tmp_path / "rows.parquet", prompt=pa.nulls(50_000, pa.int8()))))
    many = pa.ListArray.from_arrays([0, 2**21], pa.nulls(2**21, pa.int8()))
    with pytest.raises(DataError, match="unpacks to more than"):
        list(parquet.batches(write(tmp_path / "list.parquet", prompt=many)))
    wide = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), pa.array([b"x" * 10**6], pa.binary(10**6)))
    with pytest.raises(DataError, match="unpacks to more than"):
        list(parquet.batches(write(tmp_path / "fixed.parquet", prompt=wide.cast(pa.binary(10**6)))))


def test_a_name_that_every_row_repeats(tmp_path, small):
    """A CSV's header is written into each of its records."""
    file = tmp_path / "a.csv"
    file.write_text("prompt,completion,label," + "n" * 100_000 + "\n" + "a,b,1,\n" * 20_000)
    with pytest.raises(DataError, match="unpacks to more than"):
        dataset.load(file)


def test_json_that_does_not_fit_into_memory(tmp_path, monkeypatch):
    import psutil

    raw = b"[" + b"{}," * 100_000 + b"{}]"
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(raw))
    free = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free._replace(available=10_000_000))
    with pytest.raises(DataError, match="does not fit in memory"):
        dataset.load(tmp_path / "a.json.gz")


def test_what_people_have_is_read_as_before(tmp_path):
    """All kinds of columns, word for word; a system prompt that every row repeats is no bomb."""
    system = {"role": "system", "content": "Be brief. " * 500}
    rows = [
        {"messages": [system, {"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a" * (i + 1)}],
         "label": bool(i % 2), "number": i, "nothing": None, "pairs": [("k", str(i))], "bytes": b"1234",
         "floats": [0.5, None], "kind": "x"}
        for i in range(2500)
    ]  # fmt: skip
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.large_string())]))
    schema = pa.schema(
        [("messages", turns), ("label", pa.bool_()), ("number", pa.int64()), ("nothing", pa.null()),
         ("pairs", pa.map_(pa.string(), pa.string())), ("bytes", pa.binary(4)), ("floats", pa.list_(pa.float64())),
         ("kind", pa.dictionary(pa.int8(), pa.string()))]
    )  # fmt: skip
    for compression in ("none", "zstd"):
        file = tmp_path / f"{compression}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, compression=compression)
        assert [r for batch in parquet.batches(file) for r in batch.to_pylist()] == rows
        loaded = dataset.load(file)
        assert len(loaded.rows) == 2500 and loaded.rows[7].prompt[0] == system


def test_the_records_of_a_parquet_file_are_those_of_its_json(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "é" * i, "label": i % 3 == 0} for i in range(1500)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    _, found = sources.records(str(tmp_path / "a.parquet"))
    assert [json.loads(raw) for _, _, raw in found] == rows
