"""Labels as people have them; scales, which are never read as yes and no; thresholds."""

import json
from pathlib import Path

import pytest

from kto_core.data import dataset
from kto_core.errors import DataError

CASES = Path(__file__).parent / "cases" / "labels"
SCALES = {"stars_0_to_5": 24, "scale_0_to_4": 20, "stars_1_to_5": 20, "rating_column": 8}
ANSWERS = {"per_message", "list_of_labels"}


def written(path: Path, labels, column: str = "label") -> str:
    """A file with a row for each label."""
    rows = [{"prompt": f"Question {i}?", "completion": "A.", column: label} for i, label in enumerate(labels)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def counts(report) -> tuple[int, int, dict]:
    return report.desirable, report.undesirable, dict(report.dropped)


@pytest.mark.parametrize("case", sorted(CASES.glob("*.jsonl")), ids=lambda p: p.stem)
def test_a_case_has_its_right_outcome(case):
    loaded = dataset.load(str(case))
    report = loaded.report
    if case.stem in SCALES:
        assert counts(report) == (0, 0, {"label on a scale": SCALES[case.stem]})
        values = sorted({v for line in case.read_text().splitlines() for v in (json.loads(line),) for v in [
            v.get("label", v.get("rating"))]})  # fmt: skip
        assert all(f"{v} (4)" in report.problem for v in values)
        assert "--good-from" in report.problem and "--bad-to" in report.problem
    else:
        assert counts(report) == (4, 4, {}) and not report.problem
        assert [r.label for r in loaded.rows] == loaded.rows.labels == [True, False] * 4
    if case.stem in ANSWERS:
        assert [len(r.prompt) for r in loaded.rows] == [1, 3] * 4
        assert all("label" not in m for r in loaded.rows for m in (*r.prompt, *r.completion))


@pytest.mark.parametrize(
    "case,good_from,bad_to,outcome",
    [
        ("stars_1_to_5", 4, 2, (8, 8, {"neutral label": 4})),
        ("stars_1_to_5", 4, None, (8, 12, {})),
        ("stars_1_to_5", None, 3, (8, 12, {})),
        ("stars_0_to_5", 4.5, 1, (4, 8, {"neutral label": 12})),
        ("scale_0_to_4", 3, 1, (8, 8, {"neutral label": 4})),
        ("rating_column", 4, 2, (4, 4, {})),
        ("plus_minus_one", 1, 0, (4, 4, {})),
    ],
)
def test_thresholds_decide(case, good_from, bad_to, outcome):
    loaded = dataset.load(str(CASES / f"{case}.jsonl"), good_from=good_from, bad_to=bad_to)
    assert counts(loaded.report) == outcome and not loaded.report.problem
    assert (
        [r.label for r in loaded.rows]
        == loaded.rows.labels
        == [r.label for r in loaded.rows.take(range(len(loaded.rows)))]
    )
    assert "read as a scale" in loaded.report.to_dict()["scale"]


@pytest.mark.parametrize(
    "case,good_from,bad_to,said",
    [
        ("stars_1_to_5", 2, 4, "must be below good_from"),
        ("stars_1_to_5", 3, 3, "must be below good_from"),
        ("stars_1_to_5", 6, 2, "good_from 6 is outside"),
        ("stars_1_to_5", 4, 0, "bad_to 0 is outside"),
        ("stars_1_to_5", 1, None, "good_from 1"),
        ("stars_1_to_5", None, 5, "bad_to 5"),
        ("good_bad", 4, 2, "No label of this dataset is a number"),
    ],
)
def test_thresholds_that_do_not_fit_write_nothing(tmp_path, case, good_from, bad_to, said):
    with pytest.raises(DataError, match=said):
        dataset.convert(str(CASES / f"{case}.jsonl"), "trl", tmp_path / "out", good_from=good_from, bad_to=bad_to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "labels,outcome",
    [
        ([1, 0, -1, 0, 1], (2, 1, {"neutral label": 2})),
        ([0, 1, -1], (1, 1, {"neutral label": 1})),  # the zero came before the first −1
        (["1", "0", "-1.0"], (1, 1, {"neutral label": 1})),
        ([1, 0, 1, 0], (2, 2, {})),
        ([1, 0, 1, 7], (0, 0, {"label on a scale": 4})),
        ([1, 0, 0.5], (0, 0, {"label on a scale": 3})),
        (["0%", "1%", "100%"], (0, 0, {"label on a scale": 3})),
        (["1%", "0%"], (0, 0, {"label on a scale": 2})),
        ([-1, 0, 1, 2], (0, 0, {"label on a scale": 4})),
        ([True, "bad", 3, 1], (1, 1, {"label on a scale": 2})),
        (["Neutral", "GOOD", " Bad "], (1, 1, {"neutral label": 1})),
        (["thumbs up", "thumbs_down", "Thumbs-Up", "THUMBSDOWN"], (2, 2, {})),
        (["1_0", "infinity", "1e999", 10**400, "٣"], (0, 0, {"label not understood": 5})),
    ],
)
def test_what_a_number_means_shows_in_all_rows(tmp_path, labels, outcome):
    loaded = dataset.load(written(tmp_path / "rows.jsonl", labels))
    assert counts(loaded.report) == outcome
    assert [r.label for r in loaded.rows] == loaded.rows.labels


@pytest.mark.parametrize("column", ["kto_tag", "rating", "score", "stars", "feedback"])
def test_other_columns_hold_labels(tmp_path, column):
    loaded = dataset.load(written(tmp_path / "rows.jsonl", ["up", "down"], column))
    assert counts(loaded.report) == (1, 1, {})
    assert loaded.report.changed == {f"label read from column {column}": 2}
    assert loaded.rows[0].extra[column] == "up"


@pytest.mark.parametrize("column", ["rating", "score", "Rating"])
@pytest.mark.parametrize(
    "labels,outcome,said",
    [
        ([1, 1, 1], (0, 0, {"label on a scale": 3}), "no number but 1 (rows: 3)"),
        (["1.0", 1], (0, 0, {"label on a scale": 2}), "--bad-to 1 if it is bad"),
        ([True, "bad", 1], (1, 1, {"label on a scale": 1}), "no number but 1"),
        ([1, 0, 0], (1, 2, {}), "1 is good, 0 is bad. Values (rows): 0 (2), 1 (1)"),
        ([1, -1], (1, 1, {}), "1 is good, -1 is bad"),
        ([1, 0, -1], (1, 1, {"neutral label": 1}), "-1 is bad, 0 left out"),
        ([0, 0], (0, 2, {}), ""),
    ],
)
def test_a_one_alone_in_a_column_of_grades_is_no_yes(tmp_path, column, labels, outcome, said):
    loaded = dataset.load(written(tmp_path / "rows.jsonl", labels, column))
    assert counts(loaded.report) == outcome and said in loaded.report.scale and bool(said) == bool(loaded.report.scale)
    assert [r.label for r in loaded.rows] == loaded.rows.labels


def test_stars_are_always_a_scale(tmp_path):
    path = written(tmp_path / "rows.jsonl", [1, 0, 1, 0], "stars")
    report = dataset.load(path).report
    assert counts(report) == (0, 0, {"label on a scale": 4}) and "--good-from 1 --bad-to 0" in report.problem
    assert counts(dataset.load(path, good_from=1).report) == (2, 2, {})


def test_a_one_alone_is_read_as_it_is_told(tmp_path):
    path = written(tmp_path / "rows.jsonl", [1, 1, "good", "bad"], "rating")
    assert counts(dataset.load(path).report) == (1, 1, {"label on a scale": 2})
    assert counts(dataset.load(path, good_from=1).report) == (3, 1, {})
    assert counts(dataset.load(path, bad_to=1).report) == (1, 3, {})


def test_grades_in_the_messages_are_known_by_their_own_name(tmp_path):
    says = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A.", "rating": 1}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": says}))
    report = dataset.load(str(tmp_path / "rows.jsonl")).report
    assert counts(report) == (0, 0, {"label on a scale": 1}) and "rating" in report.scale


def test_label_comes_first(tmp_path):
    rows = [{"prompt": "Q?", "completion": c, "label": c == "A.", "rating": 3, "score": 0.7} for c in ("A.", "B.")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    report = dataset.load(str(tmp_path / "rows.jsonl")).report
    assert counts(report) == (1, 1, {}) and not report.changed and not report.scale


def test_a_scale_in_one_column_leaves_another_alone(tmp_path):
    rows = [{"label": 1}, {"label": 0}, {"rating": 1}, {"rating": 5}]
    text = "".join(json.dumps({"prompt": f"{i}?", "completion": "A."} | r) + "\n" for i, r in enumerate(rows))
    (tmp_path / "rows.jsonl").write_text(text)
    report = dataset.load(str(tmp_path / "rows.jsonl")).report
    assert counts(report) == (1, 1, {"label on a scale": 2}) and "rating" in report.scale


def test_a_scale_of_many_values_is_named_by_its_ends(tmp_path):
    report = dataset.load(written(tmp_path / "rows.jsonl", [i / 3000 for i in range(3001)])).report
    assert report.kept == 0 and "0 to 1, more than 1,000 values" in report.problem
    assert "--good-from 0.75 --bad-to 0.25" in report.problem


@pytest.mark.parametrize(
    "labels,outcome",
    [
        ([True, None], (1, 0, {})),
        ([None, "bad", None, "good"], (1, 1, {})),  # one for each message
        ([True], (0, 0, {"not one label for each answer": 1})),
        ([None, None], (0, 0, {"no label": 1})),
        ([True, "perhaps"], (1, 0, {"label not understood": 1})),
        ([], (0, 0, {"not one label for each answer": 1})),
    ],
)
def test_labels_of_single_answers(tmp_path, labels, outcome):
    says = [{"role": r, "content": f"{r} {i}"} for i in (1, 2) for r in ("user", "assistant")]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": says, "label": labels}))
    assert counts(dataset.load(str(tmp_path / "rows.jsonl")).report) == outcome


def test_a_long_conversation_does_not_multiply(tmp_path):
    says = [{"role": r, "content": "x", "label": True} for _ in range(300) for r in ("user", "assistant")]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": says}))
    report = dataset.load(str(tmp_path / "rows.jsonl")).report
    assert counts(report) == (0, 0, {"too many labelled answers in one conversation": 1})


def test_the_first_page_reads_no_scale_as_yes_and_no(tmp_path):
    from kto_core.data import pages

    assert pages.preview(str(CASES / "stars_0_to_5.jsonl")) == []
    assert pages.preview(written(tmp_path / "ones.jsonl", [1] * 60, "rating")) == []
    shown = pages.preview(written(tmp_path / "rows.jsonl", [0, 1, -1]))
    assert [row["label"] for row in shown] == [True, False]
