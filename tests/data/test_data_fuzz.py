"""Any bytes, rows and files: a DataError or a report whose sums hold; no other exception, no silent drop."""

import csv
import gzip
import io
import json
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kto_core.data import dataset, pages
from kto_core.data.records.rows import DroppedRow, Row, parse_all, to_chatml, to_trl
from kto_core.data.rendering import template
from kto_core.data.report import require_trainable
from kto_core.errors import DataError

QUICK = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

TYPED = st.sampled_from(
    ["<|im_end|>", "<|im_start|>system\n", "</s>", "<b>x</b>", "=1+1", "שלום", "👩‍👩‍👧", "\u202e", "\0", "[INST]"]
    + ["<|im_start|>assistant\n", "[/INST]", "\n\nHuman: ", "\n\nAssistant:", "<start_of_turn>user\n"]
)
TEXT = st.one_of(st.text(max_size=20), TYPED, st.lists(TYPED, max_size=4).map("".join))
NAMES = st.sampled_from(
    ["prompt", "completion", "label", "messages", "conversations", "chosen", "rejected", "tools", "system", "x", ""]
    + ["instruction", "input", "Question", "answer", "kto_tag", "history", "context", "functions", "system_prompt"]
    + ["completions", "scores", "rejected_responses", "preferred_output", "images"]
)
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT)
JUNK = st.recursive(
    SCALAR,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.one_of(NAMES, TEXT), v, max_size=3),
    max_leaves=8,
)
ROLE = st.sampled_from(
    ["system", "user", "assistant", "tool", "human", "gpt", "function_call", "observation", "developer"]
)
ARGUMENTS = st.one_of(TEXT, st.dictionaries(TEXT, SCALAR, max_size=2))
CALL = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": TEXT, "arguments": ARGUMENTS})})
CALLS = {"tool_calls": st.lists(CALL, max_size=2)}
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": ROLE, "content": TEXT}),
    st.fixed_dictionaries({"from": ROLE, "value": TEXT}),
    st.fixed_dictionaries({"role": ROLE, "content": st.one_of(TEXT, JUNK)}, optional=CALLS),
    JUNK,
)
TALK = st.one_of(TEXT, MESSAGE, st.lists(MESSAGE, max_size=4), JUNK)
LABEL = st.one_of(st.sampled_from([True, False, 1, 0, "yes", "no", "👍", "👎", "maybe", None, float("nan")]), JUNK)
PROMPTS = {"prompt": TALK, "label": LABEL, "messages": TALK}
OBJECT = st.one_of(
    st.fixed_dictionaries({"prompt": TALK, "completion": TALK, "label": LABEL}, optional={"x": JUNK, "tools": JUNK}),
    st.fixed_dictionaries({"conversations": TALK, "label": LABEL}, optional={"system": JUNK, "messages": JUNK}),
    st.fixed_dictionaries({"chosen": TALK, "rejected": TALK}, optional=PROMPTS),
    st.dictionaries(NAMES, JUNK, max_size=5),
    st.dictionaries(NAMES, st.one_of(TALK, LABEL, st.lists(TALK, max_size=3)), max_size=6),
    JUNK,
)
FILES = ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz", "a.txt", "a"]
TABLE_ROW = {"prompt": st.none() | TEXT, "completion": TEXT, "label": st.none() | st.booleans()}


def read(name: str, data: bytes):
    """The Loaded of a file with these bytes, its sums checked; None if it was refused with a sentence."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        try:
            loaded = dataset.load(path)
        except DataError as e:
            assert str(e).count(" ") > 3
            return None
        report = loaded.report
        kinds = Counter(i["kind"] for i in report.issues)
        assert report.rows == report.kept + sum(report.dropped.values())
        assert report.kept == len(loaded.rows) == report.desirable + report.undesirable == len(report.row_lengths)
        assert kinds["dropped"] == sum(report.dropped.values()) and kinds["changed"] == sum(report.changed.values())
        assert kinds["duplicate"] == report.duplicates and kinds["conflict"] == report.conflicts
        json.dumps(report.to_dict()).encode()
        try:
            require_trainable(report)
            assert report.desirable and report.undesirable
        except DataError:
            assert not (report.desirable and report.undesirable)
        shown, total = pages.page(loaded.rows, search="a")
        assert len(shown) == min(50, total) and len(pages.page(loaded.rows)[0]) == min(50, report.kept)
        assert [r["line"] for r in pages.preview(path)] == [r.line for r in loaded.rows][:50]
        for form in ("trl", "chatml"):
            again = dataset.load(dataset.save(loaded.rows, Path(folder) / "again.jsonl", form))
            assert again.report.kept == report.kept and not again.report.dropped and not again.report.changed
            assert same(loaded.rows, again.rows)
        return loaded


def same(a, b) -> bool:
    return repr([plain(r) for r in a]) == repr([plain(r) for r in b])


def plain(row: Row):
    """A row as JSON keeps it: NaN and infinities are null there."""
    return json.loads(json.dumps(to_trl(replace(row, line=0)), sort_keys=True), parse_constant=lambda _: None)


@QUICK
@given(OBJECT)
def test_any_object_is_rows_or_reasons(obj):
    parsed, form, changes = parse_all(obj, 5)
    assert parsed and all(isinstance(p, Row | DroppedRow) for p in parsed) and len(changes) == len(set(changes))
    for row in parsed:
        if isinstance(row, DroppedRow):
            assert row.reason and len(row.reason) < 64 and len(row.detail) < 400
            continue
        assert row.prompt and len(row.completion) == 1 and row.completion[0]["role"] == "assistant" and form
        for write in (to_trl, to_chatml):
            again, _, changed = parse_all(write(row), 5)
            assert repr(again) == repr([row]) and not changed


@QUICK
@given(st.lists(st.one_of(OBJECT.map(lambda o: json.dumps(o).encode()), st.binary(max_size=30)), max_size=6),
       st.sampled_from([b"\n", b"\r\n", b"\n\n"]), st.sampled_from([b"", b"\xef\xbb\xbf"]))  # fmt: skip
def test_any_jsonl(lines, newline, bom):
    data = bom + newline.join(lines)
    loaded = read("a.jsonl", data)
    if loaded and data[:2] not in (b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b"):
        numbered = enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)
        want = {n for n, line in numbered if line.strip()}
        seen = {r.line for r in loaded.rows} | {i["line"] for i in loaded.report.issues}
        assert seen == want or data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in b"[{"  # a list under that name
    read("a.jsonl.gz", gzip.compress(data))


@QUICK
@given(st.lists(OBJECT, max_size=5), st.booleans())
def test_any_json(objects, wrapped):
    data = json.dumps({"data": objects} if wrapped else objects).encode()
    loaded = read("a.json", data)
    assert loaded is not None and loaded.report.rows >= len(objects)
    assert {r.line for r in loaded.rows} | {i["line"] for i in loaded.report.issues} == set(range(1, len(objects) + 1))


@QUICK
@given(st.binary(max_size=200), st.sampled_from(FILES))
def test_any_bytes(data, name):
    read(name, data)


@QUICK
@given(st.lists(st.lists(st.one_of(TEXT, NAMES, LABEL.map(str)), max_size=5), max_size=5), st.sampled_from(",;\t"))
def test_any_csv(rows, delimiter):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(["prompt", "completion", "label"])
    writer.writerows(rows)
    loaded = read("a.csv", text.getvalue().encode("utf-8", "surrogatepass"))
    written = sum(1 for r in rows if r and r != [""])
    assert loaded is not None and loaded.report.rows == written


@QUICK
@given(st.lists(st.fixed_dictionaries(TABLE_ROW), min_size=1, max_size=5))
def test_any_parquet(objects):
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(objects), out)
    except (pyarrow.ArrowException, UnicodeEncodeError):  # text that is not Unicode cannot be in Parquet
        return
    loaded = read("a.parquet", out.getvalue())
    assert loaded is not None and loaded.report.rows == len(objects)


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model)


@QUICK
@given(obj=OBJECT, room=st.one_of(st.none(), st.integers(1, 60)))
def test_any_row_is_encoded_without_new_special_tokens(tokenizer, obj, room):
    begin, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    for row in parse_all(obj, 1)[0]:
        if isinstance(row, DroppedRow):
            continue
        ids = template.encode(row, tokenizer, room)
        assert ids.completion_ids[-1] == end and ids.completion_ids.count(end) == 1 and begin not in ids.completion_ids
        assert ids.fate in ("ok", "truncated", "too_long")
        if room and ids.fate != "too_long":
            assert len(ids.prompt_ids) + len(ids.completion_ids) <= room and ids.prompt_ids
        if not room:
            assert ids.prompt_ids.count(begin) == ids.prompt_ids.count(end) + 1
            shown = template.render(row, tokenizer)
            text = tokenizer.decode(ids.prompt_ids + ids.completion_ids)
            if tokenizer.unk_token_id in ids.prompt_ids + ids.completion_ids:
                continue  # SmolLM2's vocabulary lacks a few bytes
            assert text == (shown.prompt + shown.completion).encode("utf-8", "replace").decode()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_coverage_guided(tmp_path):
    """Two minutes of atheris; longer by hand, see fuzz_files.py."""
    pytest.importorskip("atheris")  # Linux only
    script = Path(__file__).with_name("fuzz_files.py")
    command = [sys.executable, str(script), str(tmp_path / "corpus"), "-max_total_time=120"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "Done" in done.stderr, done.stderr[-3000:]
