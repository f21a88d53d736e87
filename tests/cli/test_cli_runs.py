"""``runs list|compare|tag|note|rename|settings`` and ``train --config``."""

import csv
import io
import json

import pytest

from kto_core import labels
from kto_core.config import resolving
from kto_core.runs.run import Run
from tests.support import bad_runs, verdicts
from tests.support.commands import called


@pytest.fixture
def two(runs_dir):
    """A run with a verdict, and one with another beta."""
    verdicts.judged(bad_runs.make(runs_dir / "first"))
    other = bad_runs.make(runs_dir / "second")
    resolving.save_config(resolving.resolve("demo", {"data": "rows.jsonl", "beta": 0.2}), other / "config.yaml")
    return runs_dir


def listed(capsys, *args) -> list[dict]:
    code, out, _ = called(capsys, "runs", "list", "--json", *args)
    assert code == 0
    return json.loads(out)["runs"]


def test_the_list_has_facts_beside_the_fields_that_it_had(capsys, two):
    by_id = {r["id"]: r for r in listed(capsys)}
    assert {"id", "path", "state", "alive", "step", "total_steps", "loss", "model", "preset", "started", "updated",
            "adapter", "error"} <= by_id["first"].keys()  # fmt: skip
    assert by_id["first"]["verdict"] == "better" and by_id["first"]["margin_interval"] == [1.7, 2.1]
    assert by_id["second"]["changed"] == {"beta": "0.2"} and by_id["second"]["verdict"] is None


def test_the_list_is_sorted_and_filtered(capsys, two):
    assert [r["id"] for r in listed(capsys, "--sort", "name")] == ["first", "second"]
    assert [r["id"] for r in listed(capsys, "--sort", "name", "--reverse")] == ["second", "first"]
    labels.change(two / "second", add=["best"], name="Mine")
    assert [r["name"] for r in listed(capsys, "--tag", "best")] == ["Mine"]
    code, out, _ = called(capsys, "runs", "list", "--sort", "margin")
    head, first, second = out.splitlines()
    assert "VERDICT" in head and first.startswith("first") and "better" in first and "Mine" in second and code == 0
    assert called(capsys, "runs", "list", "--sort", "nonsense")[0] == 2
    code, _, err = called(capsys, "runs", "list", "--tag", "none")
    assert code == 0 and "No run has the tag none" in err


def test_a_csv_goes_to_a_file_or_to_stdout(capsys, two, tmp_path):
    code, out, _ = called(capsys, "runs", "list", "--csv")
    assert code == 0 and len(list(csv.reader(io.StringIO(out)))) == 3
    code, shown, _ = called(capsys, "runs", "list", "--csv", tmp_path / "runs.csv")
    assert code == 0 and not shown and (tmp_path / "runs.csv").read_text() == out
    assert len(listed(capsys, "--csv", tmp_path / "again.csv")) == 2 and (tmp_path / "again.csv").is_file()
    code, _, err = called(capsys, "runs", "list", "--csv", tmp_path / "none" / "runs.csv")
    assert code == 1 and "not writable" in err
    assert called(capsys, "runs", "list", "--json", "--csv")[0] == 2


def test_columns_that_can_be_sorted_by_are_the_tables():
    from kto_core.cli import runs
    from kto_core.compare import table

    assert tuple(table.COLUMNS) == runs.COLUMNS


def test_runs_are_compared(capsys, two):
    code, out, _ = called(capsys, "runs", "compare", "first", "second", "--json")
    found = json.loads(out)
    assert code == 0 and found["differences"] == {"beta": ["0.5", "0.2"]} and found["metrics"]["loss"] == [0.25, 0.25]
    assert found["verdicts"][0].startswith("Better") and found["verdicts"][1] == ""
    assert found["answers"] == [{"prompt": "secret", "before": "b", "after": ["t", None]}]
    code, out, _ = called(capsys, "runs", "compare", "first", "second")
    assert code == 0 and "beta" in out and "first: Better" in out and "r   " not in out
    code, out, err = called(capsys, "runs", "compare", "first", "nope")
    assert code == 1 and not out and "'nope' does not exist" in err
    assert called(capsys, "runs", "compare", "first")[0] == 2


def test_a_run_that_cannot_be_read_is_compared_with_its_problem(capsys, two):
    (two / "second" / "config.yaml").write_text("- 1")
    code, out, _ = called(capsys, "runs", "compare", "first", "second")
    assert code == 0 and "second cannot be read: config.yaml" in out and "are the same" not in out


def test_tags_names_and_notes(capsys, two):
    assert called(capsys, "runs", "tag", "first", "b", "a")[1] == "a b\n"
    code, out, _ = called(capsys, "runs", "tag", "first", "c", "-d", "a", "b", "--json")
    assert code == 0 and json.loads(out)["tags"] == ["c"]
    assert called(capsys, "runs", "tag", "first")[1] == "c\n"
    assert called(capsys, "runs", "note", "first", "to keep")[1] == "to keep\n"
    assert called(capsys, "runs", "note", "first")[1] == "to keep\n"
    assert "Good one" in called(capsys, "runs", "rename", "first", "Good one")[1]
    assert labels.read(two / "first") == labels.Label("Good one", ("c",), "to keep")
    called(capsys, "runs", "note", "first", "")
    called(capsys, "runs", "rename", "first", "")
    called(capsys, "runs", "tag", "first", "-d", "c")
    assert not (two / "first" / labels.FILE).exists()
    code, out, err = called(capsys, "runs", "tag", "first", "a,b")
    assert code == 1 and not out and "cannot be a tag" in err and not (two / "first" / labels.FILE).exists()
    assert called(capsys, "runs", "tag", "nope", "a")[0] == 1


def test_settings_of_a_run_are_a_file_for_train_and_a_command(capsys, two, tmp_path, rows_file):
    resolving.save_config(
        resolving.resolve("demo", {"data": str(rows_file), "beta": 0.2, "max_length": 64}), two / "second/config.yaml"
    )
    code, text, _ = called(capsys, "runs", "settings", "second")
    assert code == 0 and "beta: 0.2\n" in text and called(capsys, "runs", "settings", "second", "--yaml")[1] == text
    (tmp_path / "mine.yaml").write_text(text)
    code, out, _ = called(capsys, "train", "--config", tmp_path / "mine.yaml", "--beta", "0.3", "--dry-run", "--json")
    shown = json.loads(out)["config"]
    assert shown["beta"] == 0.3 and shown["max_length"] == 64 and shown["data"] == str(rows_file)
    line = called(capsys, "runs", "settings", "second", "--command")[1]
    assert line.startswith("python -m kto_core train --preset demo") and "--beta 0.2" in line
    code, out, _ = called(capsys, "runs", "settings", "second", "--json")
    assert json.loads(out)["settings"]["beta"] == 0.2
    (two / "second" / "config.yaml").write_text("- 1")
    assert called(capsys, "runs", "settings", "second")[0] != 0


def test_a_config_file_that_is_wrong_is_usage(capsys, tmp_path, runs_dir):
    (tmp_path / "mine.yaml").write_text("batchsize: 3\n")
    code, out, err = called(capsys, "train", "--config", tmp_path / "mine.yaml", "--data", "x.jsonl")
    assert code == 2 and not out and "batchsize: unknown setting" in err and not runs_dir.exists()
    code, _, err = called(capsys, "train", "--config", tmp_path / "none.yaml")
    assert code == 2 and "does not exist" in err


def test_a_name_given_here_is_the_one_of_every_list(capsys, two):
    called(capsys, "runs", "rename", "first", "Good one")
    from kto_core.runs.run_list import RunList

    known = RunList()
    known.look(whole=True, patient=True)
    assert known.title(Run(two / "first")) == "Good one · first"
