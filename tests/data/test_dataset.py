"""Files of every kind and state, the report, the order of rows, saving, and the table."""

import csv
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kto_core.data import dataset, pages
from kto_core.data.reading import json_text, sources, tables
from kto_core.data.records.rows import Row
from kto_core.data.report import histogram, require_trainable, weight_advice, write_issues
from kto_core.errors import Cancelled, DataError, DiskError

OBJECTS = [
    {"prompt": f"What is {i}?", "completion": f"It is {i} ☂.", "label": i % 3 > 0, "category": "numbers"}
    for i in range(9)
]
ROOT = Path(sources.__file__).parents[3]
LINES = [json.dumps(o, ensure_ascii=False) for o in OBJECTS]


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def jsonl(path: Path, objects) -> Path:
    return write(path, "".join(json.dumps(o) + "\n" for o in objects))


def sums_hold(report) -> bool:
    found = report.to_dict()
    drops = sum(1 for i in report.issues if i["kind"] == "dropped")
    return (
        found["rows"] == found["kept"] + sum(found["dropped"].values())
        and found["kept"] == found["desirable"] + found["undesirable"] == len(report.row_lengths)
        and drops == sum(found["dropped"].values())
    )


# --- the shared data sets ---


def test_nexus(shared_data):
    start = time.process_time()
    loaded = dataset.load(shared_data / "nexus_behaviors.jsonl")
    assert time.process_time() - start < 3
    found = loaded.report.to_dict()
    assert (found["rows"], found["kept"], found["dropped"]) == (4572, 4570, {"no assistant turn": 2})
    assert (found["desirable"], found["undesirable"], found["changed"]) == (2284, 2286, {})
    assert (
        sums_hold(loaded.report)
        and loaded.sha256 == hashlib.sha256((shared_data / "nexus_behaviors.jsonl").read_bytes()).hexdigest()
    )
    raw = [json.loads(line) for line in (shared_data / "nexus_behaviors.jsonl").read_bytes().splitlines()]
    lost = {i["line"] for i in loaded.report.issues}
    for row in loaded.rows:
        obj = raw[row.line - 1]
        assert row.prompt + row.completion == obj["conversations"] and row.label is obj["label"]
        assert row.extra == {k: v for k, v in obj.items() if k not in ("conversations", "label")}
    assert lost == set(range(1, 4573)) - {r.line for r in loaded.rows}


def test_truthfulqa_and_sharegpt(shared_data):
    found = dataset.load(shared_data / "truthfulqa_kto.jsonl").report.to_dict()
    assert (found["rows"], found["kept"], found["desirable"], found["undesirable"]) == (5880, 5880, 2585, 3295)
    loaded = dataset.load(shared_data / "sharegpt_pairs.json")
    found = loaded.report.to_dict()
    assert (found["rows"], found["kept"], found["desirable"]) == (600, 600, 300) and "ShareGPT" in found["format"]
    raw = json.loads((shared_data / "sharegpt_pairs.json").read_bytes())
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    for row in loaded.rows:
        obj = raw[row.line - 1]
        said = [*obj["conversations"], obj["chosen" if row.label else "rejected"]]
        assert [(m["role"], m["content"]) for m in row.prompt + row.completion] == [
            (roles[m["from"]], m["value"]) for m in said
        ]


# --- kinds of files ---


def as_csv(path: Path, **how) -> Path:
    with open(path, "w", encoding=how.pop("encoding", "utf-8"), newline="") as f:
        writer = csv.DictWriter(f, list(OBJECTS[0]), **how)
        writer.writeheader()
        writer.writerows(OBJECTS)
    return path


def as_parquet(path: Path, objects) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(objects), path)
    return path


KINDS = {
    "a.jsonl": lambda p: write(p, "\n".join(LINES)),
    "crlf.jsonl": lambda p: write(p, "\r\n".join(LINES) + "\r\n\r\n"),
    "bom.jsonl": lambda p: write(p, b"\xef\xbb\xbf" + "\n".join(LINES).encode()),
    "utf16.jsonl": lambda p: write(p, "\n".join(LINES).encode("utf-16")),
    "blank.jsonl": lambda p: write(p, "\n\n" + "\n \n".join(LINES) + "\n\n"),
    "a.jsonl.gz": lambda p: write(p, gzip.compress("\n".join(LINES).encode())),
    "noname.gz": lambda p: write(p, gzip.compress("\n".join(LINES).encode())),
    "list.json": lambda p: write(p, json.dumps(OBJECTS, indent=1)),
    "bom.json": lambda p: write(p, b"\xef\xbb\xbf" + json.dumps(OBJECTS).encode()),
    "data.json": lambda p: write(p, json.dumps({"data": OBJECTS})),
    "version.json": lambda p: write(p, json.dumps({"version": "x" * 9000, "data": OBJECTS})),
    "lines.json": lambda p: write(p, "\n".join(LINES)),
    "list.jsonl": lambda p: write(p, json.dumps(OBJECTS)),
    "pretty.jsonl": lambda p: write(p, json.dumps(OBJECTS, indent=2)),
    "list.json.gz": lambda p: write(p, gzip.compress(json.dumps(OBJECTS).encode())),
    "lines.txt": lambda p: write(p, "\n".join(LINES)),
    "a.csv": as_csv,
    "semicolon.csv": lambda p: as_csv(p, delimiter=";"),
    "excel.csv": lambda p: as_csv(p, delimiter="\t", encoding="utf-16"),
    "bom.csv": lambda p: as_csv(p, encoding="utf-8-sig"),
    "a.csv.gz": lambda p: write(p, gzip.compress(as_csv(p.with_name("plain.csv")).read_bytes())),
    "a.parquet": lambda p: as_parquet(p, OBJECTS),
}


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


# --- the report ---


def test_duplicates_and_conflicts(tmp_path):
    q = {"prompt": "Q?", "completion": "A."}
    objects = [{**q, "label": v} for v in (True, True, False, False, True)]
    objects += [{"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}], "label": 1}]
    loaded = dataset.load(jsonl(tmp_path / "a.jsonl", objects))
    found = loaded.report.to_dict()
    assert (found["kept"], found["duplicates"], found["conflicts"]) == (6, 4, 1)
    assert loaded.report.issues[1] == {
        "line": 3, "kind": "conflict", "reason": "same prompt and completion, other label", "detail": "line 1",
    }  # fmt: skip
    assert found["format"] == "prompt/completion/label + conversations/label (ShareGPT)"


@pytest.mark.parametrize("good,bad", [(2585, 3295), (1, 9), (9, 1), (5, 5)])
def test_weights_are_equation_nine(good, bad):
    advice = weight_advice(good, bad)
    for share, weight in zip((1, 1.5), advice["desirable"], strict=True):
        assert weight * good / (1 * bad) == pytest.approx(share)
    for share, weight in zip((1.5, 1), advice["undesirable"], strict=True):
        assert 1 * good / (weight * bad) == pytest.approx(share)
    assert all(low < high for low, high in advice.values())


def test_contract_keys(tmp_path, demo_model):
    from transformers import AutoTokenizer

    objects = [*OBJECTS, {"prompt": "long " * 300, "completion": "A.", "label": True},
               {"prompt": "Q?", "completion": "long " * 300, "label": True}]  # fmt: skip
    loaded = dataset.load(jsonl(tmp_path / "a.jsonl", objects))
    keys = {"rows", "kept", "dropped", "format", "desirable", "undesirable", "duplicates", "conflicts"}
    keys |= {"weights", "lengths"}
    found = loaded.report.to_dict()
    assert keys <= set(found) and not {"truncated", "too_long"} & set(found) and found["lengths_unit"] == "characters"
    assert set(found["lengths"]) == {"p50", "p99", "max"} and found["lengths"]["max"] == 1502
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    report = dataset.check(loaded, tokenizer, 128)
    found = report.to_dict()
    assert (found["truncated"], found["too_long"], found["lengths_unit"], found["kept"]) == (1, 1, "tokens", 11)
    assert {(i["line"], i["kind"]) for i in report.issues} == {(10, "truncated"), (11, "too_long")}
    assert not len(loaded.report.issues) and json.dumps(found)
    assert list(report.row_lengths) == dataset.lengths(loaded.rows, tokenizer) and report.fitting == (7, 3)
    assert "too long" in dataset.check(loaded, tokenizer, 2).problem


def test_issues_files(tmp_path):
    objects = [{"prompt": "Q?", "completion": "A.", "label": v} for v in (True, '=HYPERLINK("x")', False)]
    report = dataset.load(jsonl(tmp_path / "a.jsonl", objects)).report
    read = [json.loads(line) for line in write_issues(report, tmp_path / "out" / "i.jsonl").read_text().splitlines()]
    assert read == list(report.issues) == report.issues[:] and len(read) == 2
    rows = list(csv.DictReader(write_issues(report, tmp_path / "i.csv").read_text().splitlines()))
    assert rows[0]["line"] == "2" and rows[0]["detail"].startswith("'=")
    with pytest.raises(DiskError):
        write_issues(report, tmp_path / "a.jsonl" / "i.csv")


@pytest.mark.parametrize("limit", [None, 1, 100, 101, 512, 10_000])
def test_histogram(limit):
    rng = random.Random(0)
    lengths = [int(rng.lognormvariate(5, 1)) for _ in range(2000)] + [60_000]
    bars = histogram(lengths, limit)
    assert sum(b["count"] for b in bars) == 2001 and len(bars) < 40
    for bar, after in zip(bars, bars[1:], strict=False):
        assert bar["start"] < bar["end"] == after["start"]
    for bar in bars:
        assert bar["count"] == sum(bar["start"] <= n < bar["end"] for n in lengths)
    if limit:
        assert sum(b["count"] for b in bars if b["over"]) == sum(n > limit for n in lengths)
    assert histogram([]) == [] and histogram([0, 0])[0]["count"] == 2


# --- order ---


def labelled(good: int, bad: int) -> list[Row]:
    asked = [{"role": "user", "content": "Q?"}]
    return [Row(asked, [{"role": "assistant", "content": str(i)}], i < good, i) for i in range(good + bad)]


def mixed(rows, size: int) -> float:
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    return sum(len({r.label for r in b}) == 2 for b in batches) / len(batches)


@pytest.mark.parametrize("good,bad", [(700, 300), (300, 700), (500, 500), (750, 250), (701, 302), (60, 62)])
def test_spread_mixes_sorted_input(good, bad):
    rows = labelled(good, bad)
    out = dataset.spread(rows, 4, seed=3)
    assert mixed(rows, 4) < 0.6 and mixed(out, 4) >= 0.95
    assert sorted(r.line for r in out) == [r.line for r in rows]
    assert [r.line for r in out] == [r.line for r in dataset.spread(rows, 4, seed=3)]
    assert good < 5 or [r.line for r in out] != [r.line for r in dataset.spread(rows, 4, seed=4)]


def test_spread_with_few_of_one_label():
    out = dataset.spread(labelled(990, 10), 4, seed=1)
    assert mixed(out, 4) == 10 / 250  # no two of the ten in one micro-batch
    assert len(dataset.spread(labelled(5, 0), 4, 1)) == 5 and len(dataset.spread([], 4, 1)) == 0
    assert sorted(r.line for r in dataset.spread(labelled(7, 6), 1, 0)) == list(range(13))


def test_spread_of_a_file_stays_compact(shared_data):
    loaded = dataset.load(shared_data / "nexus_behaviors.jsonl")
    out = dataset.spread(loaded.rows, 4, seed=0)
    assert isinstance(out, dataset.Rows) and mixed(out, 4) == 1.0
    assert [r.line for r in out] == [r.line for r in dataset.spread(list(loaded.rows), 4, seed=0)]
    assert isinstance(out[:8], dataset.Rows) and out[:8][3] == out[3] == list(out)[3]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_split_never_leaks_a_prompt(shared_data, share):
    for name in ("truthfulqa_kto.jsonl", "nexus_behaviors.jsonl"):
        rows = dataset.load(shared_data / name).rows
        train, test = dataset.split_rows(rows, share, seed=5)
        prompts = [{json.dumps(r.prompt) for r in side} for side in (train, test)]
        assert not prompts[0] & prompts[1]
        assert sorted([r.line for r in train] + [r.line for r in test]) == [r.line for r in rows]
        assert len(test) == pytest.approx(share * len(rows), rel=0.05)
        good = sum(rows.labels) / len(rows)
        assert sum(test.labels) / len(test) == pytest.approx(good, abs=0.02)
        again = dataset.split_rows(rows, share, seed=5)[1]
        other = dataset.split_rows(rows, share, seed=6)[1]
        assert [r.line for r in again] == [r.line for r in test] != [r.line for r in other]


def test_split_of_little():
    rows = labelled(3, 3)  # one prompt
    assert [len(s) for s in dataset.split_rows(rows, 0.5, 0)] == [6, 0]
    assert [len(s) for s in dataset.split_rows(rows, 0, 0)] == [6, 0]
    assert [len(s) for s in dataset.split_rows([], 0.5, 0)] == [0, 0]


# --- saving ---


@pytest.mark.parametrize("name", ["nexus_behaviors.jsonl", "truthfulqa_kto.jsonl", "sharegpt_pairs.json"])
def test_convert_both_ways_loses_nothing(tmp_path, shared_data, name):
    first = dataset.convert(shared_data / name, "trl", tmp_path / "a.jsonl")
    dataset.convert(tmp_path / "a.jsonl", "chatml", tmp_path / "b.jsonl.gz")
    dataset.convert(tmp_path / "b.jsonl.gz", "trl", tmp_path / "c.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()
    again = dataset.load(tmp_path / "b.jsonl.gz").rows
    assert len(again) == first.report.kept
    for a, b in zip(first.rows, again, strict=True):
        assert replace(a, line=0) == replace(b, line=0)
    assert set(json.loads(gzip.decompress((tmp_path / "b.jsonl.gz").read_bytes()).splitlines()[0])) >= {
        "conversations", "label",
    }  # fmt: skip
    assert not list(tmp_path.glob("*.part"))


def test_save_refuses_and_cleans_up(tmp_path, monkeypatch):
    loaded = dataset.load(KINDS["a.jsonl"](tmp_path / "a.jsonl"))
    for form, out in (("alpaca", "b.jsonl"), ("trl", "b.csv"), ("trl", "b.parquet")):
        with pytest.raises(DataError):
            dataset.save(loaded.rows, tmp_path / out, form)
    with pytest.raises(DiskError):
        dataset.save(loaded.rows, tmp_path / "a.jsonl" / "b.jsonl")
    dataset.save(loaded.rows, tmp_path / "a.jsonl", "chatml")  # over its own source
    assert len(dataset.load(tmp_path / "a.jsonl").rows) == 9

    def full(obj):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json_text, "encode", full)
    with pytest.raises(DiskError, match="No space left"):
        dataset.save(loaded.rows, tmp_path / "d.jsonl")
    assert not list(tmp_path.glob("d.jsonl*"))


# --- the table ---


def test_page(shared_data):
    rows = dataset.load(shared_data / "nexus_behaviors.jsonl").rows
    start = time.process_time()  # of this process: the machine may have other work
    found, total = pages.page(rows, 0, search="delete")
    assert time.process_time() - start < 0.3
    every = [i for i, r in enumerate(rows) if "delete" in json.dumps([r.prompt, r.completion, r.extra]).lower()]
    assert total == len(every) and [r["index"] for r in found] == every[:50]
    found = [pages.page(rows, p, search="DELETE")[0] for p in range(total // 50 + 1)]
    assert [r["index"] for p in found for r in p] == every
    good, n = pages.page(rows, 2, 10, label=True)
    assert n == 2284 and len(good) == 10 and all(r["label"] is True for r in good)
    bad, m = pages.page(rows, 0, 50, "delete", False)
    assert m + pages.page(rows, 0, 50, "delete", True)[1] == total
    assert pages.page(rows, 999) == ([], 4570) and pages.page(rows, search="no such words here")[1] == 0
    assert pages.page(list(rows), 1, 7, "delete", None) == (pages.page(rows, 1, 7, "delete")[0], total)
    call = next(r for r in pages.page(rows, 0)[0] if r["tools"])
    assert call["completion"] and call["turns"] >= 2 and call["line"] >= 1 and isinstance(call["system"], bool)


@pytest.mark.parametrize("needle", ["café", "CAFÉ", "ß", "strasse", "a/b", 'say "x"', "tab\t", "€", "kelvin", "1.5"])
def test_search_finds_what_is_written_in_any_way(tmp_path, needle):
    texts = ["Café", "straße STRASSE", "a/b", 'say "x"', "tab\there", "5 € \u212aelvin"]
    objects = [{"prompt": t, "completion": "A.", "label": True, "score": 1.5} for t in texts]
    rows = dataset.load(jsonl(tmp_path / "a.jsonl", objects)).rows  # with \u escapes
    raw = dataset.load(write(tmp_path / "b.jsonl", "\n".join(json.dumps(o, ensure_ascii=False) for o in objects))).rows
    want = pages.page(list(rows), search=needle)
    assert pages.page(rows, search=needle) == pages.page(raw, search=needle) == want and want[1]


# --- size ---


@pytest.mark.slow
def test_a_million_rows(tmp_path):
    """500 MB of JSONL: check under 60 s and 2 GiB, first page of the preview under 3 s."""
    rng, words = random.Random(1), ["the", "model", "answers", "briefly", "when", "asked", "about", "rows", "of", "it"]
    with open(tmp_path / "a.jsonl", "w") as f:
        for i in range(1_000_000):
            p, c = " ".join(rng.choices(words, k=40)), " ".join(rng.choices(words, k=40))
            f.write(json.dumps({"prompt": f"{i} {p}", "completion": c, "label": i % 3 > 0, "n": i % 7}) + "\n")
    code = (
        "import resource, sys, time; from kto_core.data import dataset, pages; s = time.monotonic();"
        "assert len(pages.preview(sys.argv[1])) == 50; first = time.monotonic() - s;"
        "loaded = dataset.load(sys.argv[1]); assert loaded.report.kept == 1_000_000; loaded.report.to_dict();"
        "print(first, time.monotonic() - s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    )
    told = subprocess.run([sys.executable, "-c", code, tmp_path / "a.jsonl"], check=True, capture_output=True, cwd=ROOT)
    first, whole, gib = map(float, told.stdout.split())
    assert first < 3 and whole < 60 and gib < 2
