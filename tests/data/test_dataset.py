"""Files of every kind and state."""

import csv
import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from row_files import KINDS, LINES, OBJECTS, ROOT, as_parquet, jsonl, sums_hold, write

from kto_core.data import dataset, pages
from kto_core.data.reading import sources, tables
from kto_core.data.report import require_trainable
from kto_core.errors import Cancelled, DataError

# --- kinds of files ---


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_files(tmp_path, name):
    path = KINDS[name](tmp_path / name)
    loaded = dataset.load(path)
    assert loaded.report.to_dict()["dropped"] == {} and loaded.report.rows == 9
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for row, obj in zip(loaded.rows, OBJECTS, strict=True):
        assert (row.prompt[0]["content"], row.completion[0]["content"]) == (obj["prompt"], obj["completion"])
        assert (row.label, row.extra) == (obj["label"], {"category": "numbers"})
    assert [r["prompt"] for r in pages.preview(path, size=2)] == ["What is 0?", "What is 1?"]


def test_messages_in_tables(tmp_path):
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": {"q": "x"}}}
    objects = [
        {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": None, "tool_calls": [call]}],
         "label": True, "tools": [{"type": "function", "function": {"name": "look"}}]},
        {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}], "label": False,
         "tools": None},
    ]  # fmt: skip
    want = list(dataset.load(jsonl(tmp_path / "a.jsonl", objects)).rows)
    assert list(dataset.load(as_parquet(tmp_path / "a.parquet", objects)).rows) == want
    for cell in (json.dumps, str):  # str: as pandas writes lists
        with open(tmp_path / "a.csv", "w", newline="") as f:
            rows = [{**o, "messages": cell(o["messages"]), "tools": json.dumps(o["tools"])} for o in objects]
            rows[1]["tools"] = ""
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        if cell is str:
            with open(tmp_path / "a.csv") as f:
                text = f.read()
            assert "'role'" in text
            with pytest.raises(DataError):  # `messages` must be JSON or a Python list
                require_trainable(dataset.load(write(tmp_path / "b.csv", text.replace("[{'role'", "[{role"))).report)
        assert list(dataset.load(tmp_path / "a.csv").rows) == [replace(r, line=r.line + 1) for r in want]  # the header


def test_parquet_labels_that_are_not_there(tmp_path):
    objects = [{"prompt": "Q?", "completion": "A.", "label": v} for v in (1.0, 0.0, float("nan"), None)]
    report = dataset.load(as_parquet(tmp_path / "a.parquet", objects)).report
    assert (report.desirable, report.undesirable, dict(report.dropped)) == (1, 1, {"no label": 2})


# --- bad input ---


def test_bad_lines_are_named_and_the_rest_is_kept(tmp_path):
    bad = [
        b'{"prompt": "Q?", "completion": "caf\xe9", "label": true}',
        b'{"prompt": "Q?", "completion": "A."',
        b"[1, 2, 3]",
        b"null",
        b'{"prompt": "Q?", "completion": "A.", "label": NaN}',
        b'{"prompt": "Q?", "completion": "A.", "label": true, "label": false}',
        b'{"text": "x"}',
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"prompt": "Q?", "completion": "A.", "label": true, "x": ' + b"[" * 300 + b"]" * 300 + b"}",
        b'{"prompt": "Q?", "completion": "half \\ud83d", "label": true}',
        b'{"prompt": "Q?", "completion": "A.", "label": true, "big": 123456789012345678901234567890}',
        b'{"prompt": "Q?", "completion": "A. \\u0000 \x7f", "label": 1, "prompt": "Q?"}',
    ]
    loaded = dataset.load(write(tmp_path / "a.jsonl", b"\n".join([*bad, *(s.encode() for s in LINES)])))
    assert sums_hold(loaded.report) and loaded.report.rows == len(bad) + 9
    why = {i["line"]: i["reason"] for i in loaded.report.issues if i["kind"] != "duplicate"}
    assert why == {
        1: "not valid UTF-8", 2: "not JSON", 3: "not an object", 4: "not an object", 5: "no label",
        6: "key given twice with different values", 7: "wrong columns", 8: "nested too deeply", 9: "nested too deeply",
        10: "broken Unicode replaced",
    }  # fmt: skip
    assert loaded.rows[0].completion[0]["content"] == "half \ufffd"
    assert loaded.rows[1].extra == {"big": 123456789012345678901234567890}
    for form in ("trl", "chatml"):
        assert len(dataset.load(dataset.save(loaded.rows, tmp_path / "b.jsonl", form)).rows) == loaded.report.kept


def test_bad_csv_rows(tmp_path):
    text = b'prompt,completion,label,note\nQ?,A.,true,x\nQ?,B.,false\nQ?,caf\xe9,true,x\nQ?,A.,true,x,y,z\n,A.,maybe,\n\n"Q?","C\n.",1,x\nQ?,"open,true,x\nQ?,D.,true,x\n'  # noqa: E501
    loaded = dataset.load(write(tmp_path / "a.csv", text))
    assert dict(loaded.report.dropped) == {
        "not valid UTF-8": 1, "more cells than columns": 1, "label not understood": 1, "not valid CSV": 1,
    }  # fmt: skip
    assert [r.completion[0]["content"] for r in loaded.rows] == ["A.", "B.", "C\n.", "D."] and sums_hold(loaded.report)
    assert [i["line"] for i in loaded.report.issues if i["kind"] == "dropped"] == [4, 5, 6, 10]
    assert [r.line for r in loaded.rows] == [2, 3, 8, 11]
    with pytest.raises(DataError, match="label twice"):
        dataset.load(write(tmp_path / "b.csv", "prompt,label,label\nQ?,1,0\n"))


def test_a_quote_that_is_never_closed_costs_its_own_line_only(tmp_path):
    lines = ["prompt,completion,label", *(f"Q{i}?,A{i}.,{i % 2}" for i in range(999))]
    for later in ("", 'Q?,"a ""quoted"" word",1'):
        bad = [*lines[:10], 'Q?,"open,1', *lines[10:500], *([later] if later else []), *lines[500:]]
        report = dataset.load(write(tmp_path / f"{len(later)}.csv", "\n".join(bad))).report
        assert dict(report.dropped) == {"not valid CSV": 1} and report.rows == 1000 + bool(later)
        assert [i["line"] for i in report.issues if i["kind"] == "dropped"] == [11]


def test_shapes_mixed_in_a_table(tmp_path):
    """A table has all columns in every row; those without a value say nothing of the row's shape."""
    objects = [
        {"prompt": "Q1?", "completion": "A.", "label": True},
        {"prompt": "Q2?", "chosen": "Good.", "rejected": "Bad."},
        {"messages": [{"role": "user", "content": "Q3?"}, {"role": "assistant", "content": "A."}], "label": False},
    ]
    want = [(r.prompt[0]["content"], r.label) for r in dataset.load(jsonl(tmp_path / "a.jsonl", objects)).rows]
    assert len(want) == 4
    columns = ("prompt", "completion", "chosen", "rejected", "messages", "label")
    filled = [{c: o.get(c) for c in columns} for o in objects]
    loaded = dataset.load(as_parquet(tmp_path / "a.parquet", filled))
    assert [(r.prompt[0]["content"], r.label) for r in loaded.rows] == want and not loaded.report.dropped
    with open(tmp_path / "a.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows({k: json.dumps(v) if k == "messages" and v else v for k, v in o.items()} for o in filled)
    loaded = dataset.load(tmp_path / "a.csv")
    assert [(r.prompt[0]["content"], r.label) for r in loaded.rows] == want and not loaded.report.dropped


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    block = gzip.compress(b'{"prompt": "' + b"a" * (80 * 2**20) + b'"}', 9)
    for name in ("a.json.gz", "a.jsonl.gz", "a.csv.gz"):
        with pytest.raises(DataError, match="unpacks to more than"):
            dataset.load(write(tmp_path / name, block))


def test_convert_never_loses_what_it_reads(tmp_path):
    source = write(tmp_path / "a.jsonl", LINES[0] + "\n{broken\n" + LINES[1] + "\n")
    before = source.read_bytes()
    with pytest.raises(DataError, match="would be lost"):
        dataset.convert(str(source), "trl", source)
    none = write(tmp_path / "none.jsonl", '{"question": "Q?", "answer": "A."}\n')
    with pytest.raises(DataError, match="columns"):
        dataset.convert(str(none), "trl", none)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        dataset.convert(str(source), "trl", tmp_path / "pipe")
    assert source.read_bytes() == before and none.stat().st_size > 0 and (tmp_path / "pipe").is_fifo()
    target = write(tmp_path / "target.jsonl", "old\n")
    (tmp_path / "link.jsonl").symlink_to(target)
    dataset.convert(str(source), "trl", tmp_path / "link.jsonl")
    assert (tmp_path / "link.jsonl").is_symlink() and len(dataset.load(target).rows) == 2


def test_bad_utf8_in_a_json_list(tmp_path):
    text = b'[{"prompt": "caf\xe9", "completion": "A.", "label": true}, ' + LINES[0].encode() + b', {"prompt": NaN}]'
    report = dataset.load(write(tmp_path / "a.json", text)).report
    assert (report.rows, report.kept) == (3, 1) and report.dropped["not valid UTF-8"] == 1


@pytest.mark.parametrize(
    "name,data,words",
    [
        ("a.json", "[{", "not valid JSON"),
        ("a.json", "hello", "not valid JSON"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("a.json", "3", "not contain a list of rows"),
        ("a.jsonl.gz", b"\x1f\x8b not gzip", "gzip"),
        ("a.jsonl.gz", gzip.compress(os.urandom(50_000))[:20_000], "gzip"),
        ("a.jsonl.gz", gzip.compress(b"[" + os.urandom(50_000))[:20_000], "gzip"),
        ("a.parquet", b"nothing", "Parquet"),
        ("a.parquet", b"PAR1" + b"0" * 100, "Parquet"),
        ("a.bin", b"\x00\x01\x02", "unsupported file type"),
        ("a.csv", b"\xff\xfep\x00r", "UTF-16"),
    ],
)
def test_files_that_are_not_what_they_say(tmp_path, name, data, words):
    with pytest.raises(DataError, match=words):
        dataset.load(write(tmp_path / name, data))


def test_missing_folder_unreadable(tmp_path, monkeypatch):
    for source, words in (
        (tmp_path / "no.jsonl", "does not exist"), (tmp_path, "folder"), ("", "No dataset is selected"),
        ("x" * 5000, "is unreadable|does not exist"), ("a\0b.jsonl", "is unreadable|does not exist"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=words):
            dataset.load(source)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        dataset.load(tmp_path / "pipe.jsonl")
    locked = write(tmp_path / "locked.jsonl", LINES[0])

    def refuse(path, *a, **k):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(sources, "open", refuse, raising=False)  # root may read everything
    with pytest.raises(DataError, match="Permission denied"):
        dataset.load(locked)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_empty_files(tmp_path, name):
    for content in (b"", b"\n\n", b"\xef\xbb\xbf"):
        report = dataset.load(write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)).report
        assert report.to_dict()["rows"] == report.to_dict()["kept"] == 0 and report.to_dict()["lengths"]["max"] == 0
        with pytest.raises(DataError, match="dataset is empty"):
            require_trainable(report)


def test_wrong_columns_names_those_found_and_those_wanted(tmp_path):
    for path in (
        jsonl(tmp_path / "a.jsonl", [{"question": "Q?", "answer": "A."}] * 3),
        write(tmp_path / "a.csv", "question,answer\nQ?,A.\n"),
    ):
        report = dataset.load(path).report
        with pytest.raises(DataError, match="Found: question, answer.*prompt, completion and label.*rejected"):
            require_trainable(report)


def test_untrainable(tmp_path):
    def problem(*labels):
        objects = [{"prompt": str(i), "completion": "A.", "label": v} for i, v in enumerate(labels)]
        return dataset.load(jsonl(tmp_path / "a.jsonl", objects)).report.problem

    assert problem(True, False) == ""
    assert "All rows are good" in problem(True, 1, "yes")
    assert "All rows are bad" in problem(False)
    assert "None of the 2 rows" in problem("maybe", None) and "label not understood" in problem("maybe", None)


def test_huge_line(tmp_path):
    big = json.dumps({"prompt": "Q?", "completion": "x" * 50_000_000, "label": True})
    loaded = dataset.load(write(tmp_path / "a.jsonl", "\n".join([LINES[0], big, LINES[1]])))
    assert loaded.report.kept == 3 and len(loaded.rows[1].completion[0]["content"]) == 50_000_000
    assert len(pages.page(loaded.rows)[0][1]["completion"]) <= pages.SHOWN


def test_line_beyond_the_limit_is_dropped_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE", 200)
    long = json.dumps({"prompt": "Q?", "completion": "x" * 1000, "label": True})
    report = dataset.load(write(tmp_path / "a.jsonl", "\n".join([LINES[0], long, LINES[1]]))).report
    assert (report.rows, report.kept) == (3, 2) and [i["line"] for i in report.issues] == [2]


def test_large_files_are_read_from_disk_and_changes_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "IN_MEMORY", 10)
    for name in ("a.jsonl", "a.csv", "a.jsonl.gz"):
        loaded = dataset.load(KINDS[name](tmp_path / name))
        first = 2 if name == "a.csv" else 1  # below the header
        assert [r.line for r in loaded.rows] == list(range(first, first + 9))
        assert loaded.rows[-1].prompt[0]["content"] == "What is 8?"
    loaded = dataset.load(KINDS["a.jsonl"](tmp_path / "b.jsonl"))
    kept = loaded.rows[3]
    os.replace(jsonl(tmp_path / "c.jsonl", []), tmp_path / "b.jsonl")  # another file under its name: the old one stays
    assert loaded.rows[3] == kept
    loaded = dataset.load(KINDS["a.jsonl"](tmp_path / "b.jsonl"))
    with open(tmp_path / "b.jsonl", "a") as f:
        f.write("{}")
    with pytest.raises(DataError, match="changed"):
        loaded.rows[0]


def test_hub_problems(tmp_path):
    jsonl(tmp_path / "train.jsonl", OBJECTS)
    found = list(tables.arrow_rows(tables.hub_batches(str(tmp_path), "train")))  # the library reads folders alike
    assert found == OBJECTS
    with pytest.raises(DataError, match="no split test. Available splits: .*train"):
        tables.hub_batches(str(tmp_path), "test")


@pytest.mark.parametrize("how", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9", "no_proxy": "*"}])
def test_hub_without_network(how, tmp_path):
    code = (
        "from kto_core.data import dataset\nfrom kto_core.errors import DataError\n"
        "try: dataset.load('owner/name')\nexcept DataError as e: print(e)"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path), **how}
    told = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True)
    assert b"owner/name is not a local file, and the Hub cannot be reached" in told.stdout, told.stderr


def test_progress_and_cancel(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", OBJECTS * 600)
    seen, stop = [], threading.Event()
    loaded = dataset.load(path, progress=lambda f, t: seen.append(f))
    assert 0 <= seen[0] < 0.5 and seen[-1] == 1.0 and seen == sorted(seen)
    dataset.save(loaded.rows, tmp_path / "b.jsonl", progress=lambda f, t: seen.append(f))
    stop.set()
    with pytest.raises(Cancelled):
        dataset.load(path, cancel=stop)
    with pytest.raises(Cancelled):
        dataset.save(loaded.rows, tmp_path / "c.jsonl", cancel=stop)
    assert not list(tmp_path.glob("c.jsonl*"))


def test_import_is_light():
    code = (
        "import sys; from kto_core.data import dataset; from kto_core.data.rendering import template; "
        "from kto_core.data.records import rows; "
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'numpy', 'pyarrow'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
