"""Sorting, filtering, CSV, differences of settings, curves: pure functions."""

import csv
import io
import itertools
import math

import pytest

from kto_core.compare import series, settings, table
from kto_core.compare.facts import Facts
from kto_core.config import resolving
from kto_core.runs.events import RunState, fold
from kto_core.runs.run import Run
from tests.support import bad_runs, verdicts

A = Facts("a", "Beta", "finished", data="rows.jsonl", margin=1.5, eval_loss=0.2, tags=("best", "x"), started=1.0,
          interval=(1.0, 2.0), changed=(("beta", "0.2"),), note="mine")  # fmt: skip
B = Facts("b", "alpha", "stopped", data="other.csv", margin=-2.0, started=3.0, tags=("x",))
C = Facts("c", "", "failed", problem="config.yaml: <b>", started=2.0)
ROWS = [A, B, C]


def ids(rows) -> str:
    return "".join(r.id for r in rows)


@pytest.mark.parametrize(("by", "down", "wanted"), [
    ("started", None, "bca"), ("started", False, "acb"), ("name", None, "bac"), ("margin", None, "abc"),
    ("margin", False, "bac"), ("eval_loss", None, "abc"), ("eval_loss", True, "abc"), ("nonsense", None, "bca"),
    ("state", None, "cab"), ("tags", False, "abc"),
])  # fmt: skip
def test_rows_are_sorted_and_what_is_not_known_is_last(by, down, wanted):
    assert ids(table.ordered(ROWS, by, down)) == wanted


def test_every_column_sorts_any_rows():
    for column, order in itertools.product(table.COLUMNS, itertools.permutations(ROWS)):
        for down in (True, False, None):
            assert sorted(ids(table.ordered(order, column, down))) == ["a", "b", "c"]


@pytest.mark.parametrize(("words", "tag", "state", "wanted"), [
    ("", "", "", "abc"), ("ROWS", "", "", "a"), ("beta 0.2", "", "", "a"), ("mine other", "", "", ""),
    ("", "x", "", "ab"), ("", "x", "stopped", "b"), ("config.yaml", "", "", "c"), ("", "be", "", ""),
])  # fmt: skip
def test_rows_are_filtered_by_words_tag_and_state(words, tag, state, wanted):
    assert ids(table.filtered(ROWS, words, tag, state)) == wanted


def test_tags_in_use():
    assert table.tags(ROWS) == ["best", "x"]


# ---- CSV


def test_a_csv_has_all_and_numbers_are_numbers():
    head, first, second, third = csv.reader(io.StringIO(table.as_csv(ROWS)))
    assert tuple(head) == table.HEAD
    row = dict(zip(head, first, strict=True))
    assert (row["margin"], row["margin_low"], row["tags"], row["changed"]) == ("1.5", "1.0", "best x", "beta 0.2")
    assert dict(zip(head, second, strict=True))["margin"] == "-2.0" and third[-1] == "config.yaml: <b>"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", '=cmd|"/c calc"!A1', "= a,b\n=c"])
def test_no_cell_is_a_formula(text):
    row = Facts("r", name=text, note=text, tags=(text,), data=text, model=text)
    _, found = csv.reader(io.StringIO(table.as_csv([row]), newline=""))
    assert not [cell for cell in found if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert sum(cell.lstrip("'") == text.replace("\r", "\n") for cell in found) >= 4, "and what was said is still there"


# ---- differences


def a_run(folder, **values) -> Run:
    folder.mkdir(parents=True)
    resolving.save_config(resolving.resolve("demo", values), folder / "config.yaml")
    return Run(folder)


def test_only_what_differs_is_told_with_model_and_data_first(tmp_path):
    runs = [
        a_run(tmp_path / "a", data="/x/rows.jsonl", beta=0.2, run_name="a", output_dir="/o/a"),
        a_run(tmp_path / "b", data="/x/more.jsonl", r=8, run_name="b", target_modules="q_proj,v_proj"),
    ]
    found = settings.differences(runs)
    default = resolving.resolve("demo", {}).config
    assert found[0] == ("data", ["rows.jsonl", "more.jsonl"])
    assert dict(found[1:]) == {
        "beta": ["0.2", str(default.beta)],
        "r": [str(default.r), "8"],
        "target_modules": ["all-linear", "q_proj, v_proj"],
    }
    assert settings.differences(runs[:1]) == [] and settings.differences([]) == []


def test_two_files_of_one_name_differ(tmp_path):
    runs = [a_run(tmp_path / n, data=f"/{n}/rows.jsonl") for n in "ab"]
    assert settings.differences(runs) == [("data", ["/a/rows.jsonl", "/b/rows.jsonl"])]


def test_a_run_that_cannot_be_read_does_not_hide_the_others(tmp_path):
    runs = [a_run(tmp_path / "a", beta=0.2), a_run(tmp_path / "b"), Run(bad_runs.make(tmp_path / "c"))]
    (tmp_path / "c" / "config.yaml").write_text("- 1")
    assert settings.differences(runs)[0] == ("beta", ["0.2", "0.5", "cannot be read"])
    assert dict(settings.metrics(runs))["loss"] == [None, None, 0.25]


def test_metrics_verdicts_and_answers_stand_beside_each_other(tmp_path):
    for name, tuned in (("a", "yes"), ("b", "no")):
        bad_runs.make(tmp_path / name)
        more = [{"prompt": f"only {name}", "label": None, "base": "x", "tuned": "y"}]
        same = [{"prompt": "secret", "label": True, "base": "b", "tuned": tuned}]
        verdicts.judged(tmp_path / name, samples=more + same)
    runs = [Run(tmp_path / name) for name in "ab"] + [Run(bad_runs.make(tmp_path / "c"))]
    metrics = dict(settings.metrics(runs))
    assert metrics["loss"] == [0.25] * 3 and metrics["verdict: margin"] == [1.93, 1.93, None]
    first, second, third = settings.verdicts(runs)
    assert first.startswith("Better") and second == first and third == ""
    assert settings.answers(runs)[0] == ("secret", "b", ["yes", "no", None])
    assert settings.answers(runs)[1:] == [("only a", "x", ["y", None, None]), ("only b", "x", [None, "y", None])]


# ---- curves


def of(*rows: tuple) -> RunState:
    return fold([{"t": t, "kind": "metric", "step": step, "loss": loss} for t, step, loss in rows])


def test_points_by_step_and_by_time():
    state = of((100.0, 1, 0.5), (110.0, 2, None), (120.0, 3, 0.3))
    assert series.by_step(state, "loss") == [(1, 0.5), (3, 0.3)] and series.by_step(state, "kl") == []
    assert series.by_time(state, "loss") == [(0.0, 0.5), (20.0, 0.3)] and series.by_time(RunState(), "loss") == []


def test_a_night_between_two_steps_and_a_clock_set_back_are_no_time():
    state = of((100.0, 1, 0.5), (110.0, 2, 0.4), (40_000.0, 3, 0.3), (40_010.0, 4, 0.2), (5.0, 5, 0.1))
    assert series.by_time(state, "loss") == [(0, 0.5), (10, 0.4), (20, 0.3), (30, 0.2), (30, 0.1)]


@pytest.mark.parametrize(("seconds", "unit"), [(0, "seconds"), (299, "seconds"), (300, "minutes"), (20_000, "hours")])
def test_the_unit_suits_the_longest(seconds, unit):
    found, (short, long) = series.in_unit([[(0.0, 1.0)], [(0.0, 1.0), (float(seconds), math.pi)]])
    assert found == unit and long[-1][1] == math.pi and long[-1][0] <= 300 and short == [(0.0, 1.0)]
