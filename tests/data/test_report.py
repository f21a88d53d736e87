"""The report of a file, of the shared data sets too: duplicates, weights, counts, issues; the order of rows."""

import csv
import hashlib
import json
import random
import time

import pytest
from row_files import OBJECTS, jsonl, sums_hold

from kto_core.data import dataset
from kto_core.data.records.rows import Row
from kto_core.data.report import histogram, weight_advice, write_issues
from kto_core.errors import DiskError

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
