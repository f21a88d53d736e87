"""Votes and edits as rows: which answer gets which label, what a row notes, and that the reader knows the notes."""

import json
from pathlib import Path

import pytest

from kto_core.data import dataset
from kto_core.errors import DataError, DiskError
from kto_core.vote import folder, rows
from kto_core.vote.entries import Answer
from kto_core.vote.sides import Side
from tests.vote.conftest import ANSWERS, answered, choose


def labels(session) -> dict[tuple[str, str], bool]:
    """(question, answer) -> label."""
    found = {}
    for one in rows.rows(session):
        key = (one.messages[-2]["content"], one.messages[-1]["content"])
        assert key not in found, "an answer has one label"
        found[key] = one.label
    return found


def test_each_vote_makes_its_rows(session):
    choose(session, "a")
    choose(session, "b")
    session.vote(3, "tie")
    session.vote(4, "bad")
    short, long = ANSWERS["a"], ANSWERS["b"]
    assert labels(session) == {
        ("Question 0?", short): True, ("Question 0?", long): False,
        ("Question 1?", short): False, ("Question 1?", long): True,
        ("Question 3?", short): False, ("Question 3?", long): False,
    }  # fmt: skip


@pytest.mark.parametrize("choice", ["", "left", "right", "tie", "bad"])
def test_an_edit_is_desirable_and_its_original_is_not_whatever_the_vote(session, choice):
    at_left = session.shown().left
    session.edit(1, "left", "  As it should be. ")
    assert session.shown().edited == ("As it should be.", "")
    if choice:
        session.vote(1, choice)
    found = labels(session)
    assert found[("Question 0?", at_left)] is False and found[("Question 0?", "As it should be.")] is True
    if choice == "right":
        assert found[("Question 0?", session._pairs[1].answers[session._pairs[1].side("right")].text)] is True


def test_an_edit_is_taken_back(session):
    session.edit(1, "left", "x")
    for nothing in ("", f" {session.shown().left}\n"):
        session.edit(1, "left", "x")
        session.edit(1, "left", nothing)
        assert session.shown().edited == ("", "") and labels(session) == {}


def test_an_edit_into_the_other_answer_gives_that_one_label(session):
    session.edit(1, "left", session.shown().right)
    session.vote(1, "left")
    assert sorted(labels(session).values()) == [False, True]


def test_answers_without_text_and_identical_ones_make_no_row(sides):
    session = answered(folder.create(*sides), 1, lambda _: {"a": "", "b": "Yes."})
    choose(session, "b")
    assert labels(session) == {("Question 0?", "Yes."): True}
    same = answered(folder.create(*sides), 2, lambda _: {"a": "Yes.", "b": "Yes."})
    assert labels(same) == {}
    with pytest.raises(DataError, match="No vote and no edit makes a row yet"):
        rows.write(same)


def test_the_file_is_read_as_data_and_its_notes_are_not_called_unused(session, tmp_path):
    session.add_prompts([[{"role": "system", "content": "S"}, {"role": "user", "content": "Why?"}]])
    session.add_pair(11, {"a": Answer("Because.", "A thought."), "b": Answer("Just so.")})
    for _ in range(10):
        choose(session, "a")
    choose(session, "a")
    path, good, bad = rows.write(session, tmp_path / "rows.jsonl")
    rows.write(session, path)  # again: the same rows
    loaded = dataset.load(path)
    assert (good, bad) == (11, 11) == (loaded.report.desirable, loaded.report.undesirable)
    assert not loaded.report.unused and not loaded.report.changed and not loaded.report.dropped
    row = next(r for r in loaded.rows if r.completion[0]["content"] == "Because.")
    assert row.prompt[0]["content"] == "S" and row.completion[0]["reasoning_content"] == "A thought."
    assert row.extra["source"] == "KTO Studio vote" and row.extra["model"] == "tiny" and row.extra["adapter"] == "one"
    assert row.extra["sampling"] == {
        "temperature": 0.7, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.0, "max_new_tokens": 512,
        "seed": session.draw(11).seed,
    }  # fmt: skip
    assert row.extra["time"].startswith("20") and row.extra["time"].endswith("Z")
    assert next(r for r in loaded.rows if r.completion[0]["content"] == "Just so.").extra["adapter"] == ""
    assert "/runs/one" not in Path(path).read_text(), "no path of this machine"


def test_columns_of_these_names_in_other_data_are_still_named(tmp_path):
    path = tmp_path / "other.jsonl"
    row = {"prompt": "Q?", "completion": "A.", "label": True, "model": "m", "time": "t", "source": "web"}
    mine = row | {"prompt": "R?", "source": "KTO Studio vote", "colour": "red"}
    path.write_text("".join(json.dumps(r) + "\n" for r in (row, mine)))
    assert dict(dataset.load(path).report.unused) == {"model": 1, "time": 1, "source": 1, "colour": 1}


def test_other_rows_of_the_file_stay_and_a_changed_label_replaces(session, tmp_path):
    path = tmp_path / "rows.jsonl"
    choose(session, "a")
    said = rows.rows(session)[0].messages
    before = {"prompt": said[:-1], "completion": said[-1:], "label": False}
    other = {"prompt": "x", "completion": "y", "label": True}
    path.write_text("not json\n" + json.dumps(before) + "\n" + json.dumps(other) + "\n")
    rows.write(session, path)
    lines = path.read_text().splitlines()
    assert lines[0] == "not json" and json.loads(lines[1]) == other and len(lines) == 4
    blocked = tmp_path / "no"
    blocked.write_text("")
    with pytest.raises(DiskError):
        rows.write(session, blocked / "rows.jsonl")


def test_what_the_reference_is_is_said():
    text = rows.reference(Side("m", "one", "checkpoint-20", "/x"))
    assert "continues from the adapter of run one, step 20" in text and "not the base model" in text
