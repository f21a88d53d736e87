"""What sets good rows apart from bad ones beside what they say: lengths of answers, a category; and warnings of it."""

import json

import pytest

from kto_core.data import dataset
from kto_core.data.contrast import Contrast, _longer, hint
from kto_core.data.records.scales import cut, suggested


def report(folder, rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return dataset.load(str(folder / "rows.jsonl")).report


def rows(good: int, bad: int, n: int = 30, **more):
    return [
        {"prompt": f"Q{i}?", "completion": "x" * (size + i % 3), "label": label, **{k: v(i) for k, v in more.items()}}
        for i in range(n)
        for label, size in ((True, good), (False, bad))
    ]


@pytest.mark.parametrize("good,bad,said", [(10, 400, "answer briefly"), (400, 10, "answer at length"), (50, 50, "")])
def test_answers_of_one_label_that_are_longer_are_warned_of(tmp_path, good, bad, said):
    found = report(tmp_path, rows(good, bad))
    assert found.answers["desirable"] == good + 1 and found.answers["undesirable"] == bad + 1
    assert any(said in w for w in found.warnings) if said else not found.warnings
    assert ("warnings" in found.to_dict()) == bool(said)


def test_few_rows_say_nothing_of_lengths(tmp_path):
    assert report(tmp_path, rows(10, 400, n=5)).answers == {} == Contrast().lengths() and hint({}) == ""


def test_share_of_pairs_is_counted_with_ties():
    good, bad = [1, 2, 2, 5], [0, 2, 2, 3, 9]
    share = sum((a > b) + (a == b) / 2 for a in good for b in bad) / (len(good) * len(bad))
    assert _longer(good, bad) == pytest.approx(share)


def test_rows_by_category(tmp_path):
    found = report(tmp_path, rows(5, 5, Category=lambda i: "abc"[i % 3], source=lambda i: "one"))
    assert found.categories == {"column": "Category", "rows": {"a": [10, 10], "b": [10, 10], "c": [10, 10]}}
    many = report(tmp_path, rows(5, 5, n=60, category=lambda i: f"value {i}", topic=lambda i: "xy"[i % 2]))
    assert many.categories["column"] == "topic"
    assert report(tmp_path, rows(5, 5, source=lambda i: "one")).categories == {}


def test_rows_lost_to_another_encoding_are_warned_of(tmp_path):
    path = tmp_path / "rows.jsonl"
    line = json.dumps({"prompt": "Q?", "completion": "caf\u00e9", "label": True}, ensure_ascii=False)
    path.write_bytes(line.encode() + b"\n" + line.encode("cp1252") + b"\n")
    assert "1 rows are lost because the file is not all UTF-8" in dataset.load(str(path)).report.warnings[0]


@pytest.mark.parametrize(
    "good_from,bad_to,outcome",
    [(4, 2, (8, 8, 4)), (4, None, (8, 12, 0)), (None, 3, (8, 12, 0)), (9, 0, (0, 0, 20)), (4.5, 1.5, (4, 4, 12))],
)
def test_the_balance_of_thresholds_is_known_before_they_are_applied(tmp_path, good_from, bad_to, outcome):
    found = report(tmp_path, [{"prompt": f"{i}?", "completion": "A.", "stars": i % 5 + 1} for i in range(20)])
    assert found.scales == {"stars": dict.fromkeys(range(1, 6), 4)} and suggested(found.scales["stars"]) == (4, 2)
    assert cut(found.scales["stars"], good_from, bad_to) == outcome
