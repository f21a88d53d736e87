"""A row of facts for each run: what it says, what it costs, and notes that are not believed."""

import json
import os

import pytest

from kto_core import labels
from kto_core.compare import facts, judged
from kto_core.config import resolving
from kto_core.runs import folders, rates, run, run_list
from kto_core.runs.events import EventLog
from kto_core.verdict import keeping
from tests.support import bad_runs, verdicts


def table(*, patient: bool = True) -> facts.Table:
    known = run_list.RunList()
    known.look(whole=True, patient=patient)
    return facts.Table(known)


def of(name: str) -> facts.Facts:
    return {f.id: f for f in table().facts(patient=True)}[name]


def make(folder, *more: dict, **settings):
    """A run that ended, with these settings and metrics."""
    folder.mkdir(parents=True)
    resolving.save_config(resolving.resolve("demo", {"data": "/x/rows.jsonl"} | settings), folder / "config.yaml")
    events = [bad_runs.GOOD[0], *({"t": 1.7e9 + 5, "kind": "metric", "step": 1} | m for m in more)]
    end = {"t": 1.7e9 + 60, "kind": "status", "state": "finished", "message": "Done.", "seconds": 59.0}
    (folder / "events.jsonl").write_text(bad_runs.text_of([*events, end]))
    return folder


def test_a_row_says_what_a_run_was_and_became(runs_dir):
    folder = make(
        runs_dir / "r", {"loss": 0.4, "gpu_memory": 9.5}, {"loss": 0.3, "gpu_memory": 9.0, "step": 2},
        {"eval_loss": 0.35, "eval_rewards/margins": 0.8}, beta="0.2", target_modules="q_proj,v_proj", run_name="Short",
    )  # fmt: skip
    row = of("r")
    assert (row.title, row.state, row.data, row.model) == ("Short", "finished", "rows.jsonl", "demo")
    assert dict(row.changed) == {"beta": "0.2", "target_modules": "q_proj, v_proj"}
    assert (row.loss, row.eval_loss, row.margin, row.memory, row.seconds) == (0.3, 0.35, 0.8, 9.5, 59.0)
    assert row.rate == resolving.resolve("demo", {}).config.learning_rate and row.verdict == "" and not row.interval
    verdicts.judged(folder)
    row = of("r")
    assert (row.verdict, row.margin, row.interval) == ("better", 1.93, (1.7, 2.1))
    assert row.eval_loss == 0.35, "what the run itself measured comes before the verdict's"
    assert json.loads(json.dumps(row.to_dict()))["changed"]["beta"] == "0.2"


def test_the_rate_is_the_one_that_was_found(runs_dir):
    folder = make(runs_dir / "r", learning_rate="auto")
    assert of("r").rate is None
    rates.write(folder, rates.Found(2.9e-4, "trials"))  # the run's events say it when training begins
    EventLog(folder / "events.jsonl").append("used", learning_rate=2.9e-4)
    assert of("r").rate == 2.9e-4


@pytest.mark.parametrize("name", bad_runs.UNREADABLE)
def test_a_bad_run_is_a_row_with_its_problem(runs_dir, name):
    bad_runs.UNREADABLE[name](bad_runs.make(runs_dir / "bad"))
    bad_runs.make(runs_dir / "good")
    rows = {f.id: f for f in table().facts(patient=True)}
    assert rows["bad"].problem and rows["good"].problem == "" and rows["good"].model == "demo"


# ---- names, tags and notes


def test_a_label_is_kept_apart_and_follows_at_once(runs_dir):
    folder = make(runs_dir / "r", run_name="Old")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    known = table()
    assert known.facts()[0].name == "Old"
    labels.change(folder, name="New", note="two\nlines", add=["best", "a"])
    known.known.look(whole=True)
    (row,) = known.facts()
    assert (row.name, row.tags, row.note) == ("New", ("a", "best"), "two\nlines")
    assert known.known.title(run.Run(folder)) == "New · r"
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name != labels.FILE} == before
    labels.change(folder, name="", note="", remove=["a", "best", "none"])
    assert not (folder / labels.FILE).exists() and of("r").name == "Old"


def test_a_label_of_a_run_that_trains_changes_nothing_else(runs_dir):
    from kto_core.runs import locks

    folder = make(runs_dir / "r")
    log = EventLog(folder / "events.jsonl")
    with locks.holding(folder):
        log.status("training", total_steps=9)
        labels.change(folder, add=["now"])
        assert run.Run(folder).state().state == "training" and folders.active().id == "r"
        assert of("r").tags == ("now",)


@pytest.mark.parametrize("changes", [
    {"add": ["two words"]}, {"add": ["a,b"]}, {"add": [""]}, {"add": ["-d"]}, {"add": ["\x1b[2J"]}, {"add": ["x" * 41]},
    {"add": [f"t{i}" for i in range(21)]}, {"name": "a/b"}, {"name": "x" * 101}, {"name": "a\nb"}, {"note": "x" * 2001},
    {"remove": ["a b"]},
])  # fmt: skip
def test_a_label_that_cannot_be_one_is_refused_and_nothing_is_written(runs_dir, changes):
    from kto_core.errors import RunError

    folder = make(runs_dir / "r")
    labels.change(folder, add=["kept"])
    with pytest.raises(RunError):
        labels.change(folder, **changes)
    assert labels.read(folder) == labels.Label(tags=("kept",))


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b'{"name": 5, "tags": {}, "note": []}', b"[" * 10**5,
                                  b'{"name": "a/b", "tags": ["a b", 5, "<ok>"], "note": "n"}'])  # fmt: skip
def test_a_label_file_of_anybody_is_read_as_far_as_it_can_be(runs_dir, text):
    folder = make(runs_dir / "r")
    (folder / labels.FILE).write_bytes(text)
    found = labels.read(folder)
    assert found.name == "" and set(found.tags) <= {"<ok>"} and of("r").state == "finished"


# ---- what it costs


def test_a_row_is_made_once(runs_dir, monkeypatch):
    for i in range(5):
        make(runs_dir / f"r{i}")
    known, made = table(), []
    real = facts.facts_of
    monkeypatch.setattr(facts, "facts_of", lambda *a: made.append(a[0]) or real(*a))
    known.facts()
    known.known.look(whole=True)
    known.facts()
    assert len(made) == 5
    labels.change(runs_dir / "r2", add=["x"])
    known.known.look(whole=True)
    known.facts()
    assert made[5:] == ["r2"]


def test_a_second_process_reads_no_verdict_again(runs_dir, monkeypatch):
    for i in range(judged.WORTH + 2):
        verdicts.judged(make(runs_dir / f"r{i:02d}"))
    first = table().facts(patient=True)
    assert (runs_dir / judged.NOTE).is_file() and all(f.verdict == "better" for f in first)
    read = []
    monkeypatch.setattr(keeping, "read", lambda r: read.append(r))
    assert table().facts(patient=True) == first and read == []
    monkeypatch.undo()
    monkeypatch.setenv("KTO_STUDIO_RUNS", str(runs_dir))
    verdicts.judged(runs_dir / "r03", **{"rewards/margins": 5.0})
    assert {f.id: f.margin for f in table().facts(patient=True)}["r03"] == 5.0, "never believed against the verdict"


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"x": 1}', b'{"x": [[1], [2]]}', b"\xff", b"[" * 10**5, None])
def test_a_note_that_is_broken_is_not_used(runs_dir, text):
    for i in range(judged.WORTH + 2):
        verdicts.judged(make(runs_dir / f"r{i:02d}"))
    first = table().facts(patient=True)
    note = runs_dir / judged.NOTE
    if text is None:
        kinds = ["better", ["better", "x", None, None], ["?", 1, None, 1], ["better", 1, [1], 1], [float], [1e999] * 4]
        note.write_text(json.dumps({k: [v[0], kinds[i % 4]] for i, (k, v) in
                                    enumerate(json.loads(note.read_text()).items())}))  # fmt: skip
    else:
        note.write_bytes(text)
    assert table().facts(patient=True) == first


def test_a_note_of_an_earlier_version_is_opened_and_its_runs_are_read_anew(runs_dir):
    for i in range(run_list.WORTH + 1):
        bad_runs.make(runs_dir / f"r{i:02d}")
    first = table().facts()
    note = runs_dir / run_list.NOTE
    values = json.loads(note.read_text())
    note.write_text(json.dumps({k: [v[0], v[1][:11]] for k, v in values.items()}))
    assert table().facts() == first and first[0].data == "rows.jsonl"


def test_verdicts_are_read_within_a_budget_and_later_the_others(runs_dir, monkeypatch):
    for i in range(4):
        verdicts.judged(make(runs_dir / f"r{i}"))
        os.utime(runs_dir / f"r{i}" / "config.yaml", (1.7e9 + i, 1.7e9 + i))
    known = table()
    monkeypatch.setattr(facts, "BUDGET", -1)
    assert all(f.verdict == "" for f in known.facts())
    monkeypatch.setattr(facts, "BUDGET", 60)
    assert all(f.verdict == "better" for f in known.facts())
