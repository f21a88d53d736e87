"""verdict.json: it belongs to one adapter, and a bad one is none. And the lines that are made of it."""

import json

import pytest

from kto_core.verdict import keeping, wording
from tests.support.verdicts import RESULT, judged


def test_what_was_written_is_read_without_the_samples(tmp_path):
    found = keeping.read(judged(tmp_path / "run"))
    for name in (*keeping.NUMBERS, *keeping.NESTED, *keeping.INTERVALS, "data", "remarks"):
        assert found[name] == RESULT[name], name
    assert found["verdict"]["sentence"] == "Better: the reward margin is +1.93 and not chance."
    assert found["answer_lengths"] == RESULT["answer_lengths"]
    assert "samples" not in found and "secret" not in str(found)
    assert keeping.samples(judged(tmp_path / "run")) == RESULT["samples"]


@pytest.mark.parametrize("value", [None, "x", {}, [1], [{}], [{"prompt": "p", "base": 1, "tuned": "t"}], [["p"]] * 9])
def test_strange_samples_are_none(tmp_path, value):
    assert keeping.samples(judged(tmp_path / "run", samples=value)) == []


def test_samples_are_cut():
    sample = {"prompt": "p" * 9999, "base": "b", "tuned": "t", "label": "?"}
    found = keeping._samples([sample] * 999)
    assert len(found) == keeping.MOST_SAMPLES and len(found[0]["prompt"]) == keeping.SAMPLE
    assert found[0]["label"] is None


def test_a_change_is_told_word_by_word():
    assert wording.changed("It is in\nParis.", "It is now\nParis, yes.") == [
        ("same", "It is "), ("gone", "in\nParis."), ("new", "now\nParis, yes."),
    ]  # fmt: skip
    for a, b in (("", ""), ("", "x"), ("x", ""), ("a b", "a b"), (" a\n", "b  a")):
        pieces = wording.changed(a, b)
        assert "".join(t for kind, t in pieces if kind != "new") == a
        assert "".join(t for kind, t in pieces if kind != "gone") == b


def test_more_training_makes_it_history(tmp_path):
    run = judged(tmp_path / "run")
    before = keeping.key(run)
    (run.adapter / "manifest.json").write_text("{}")
    assert keeping.read(run) is None and keeping.key(run) != before
    run.adapter = None
    assert keeping.read(run) is None, "nothing to judge"


def test_a_run_without_one_costs_no_look_at_its_checkpoints(tmp_path):
    run = judged(tmp_path / "run")
    (run.path / keeping.FILE).unlink()
    run.adapter = None
    run.checkpoints = lambda: pytest.fail("looked")
    assert keeping.read(run) is None and keeping.key(run) == (None, None)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"verdict": 3}', '{"verdict": {"word": "superb"}}', "\0"])
def test_a_file_of_another_form_is_none(tmp_path, text):
    run = judged(tmp_path / "run")
    (run.path / keeping.FILE).write_text(text)
    assert keeping.read(run) is None


EVIL = [None, "x", [], {}, [1], ["a", "b"], {"nats": "x"}, True, 10**400, [None, None], {"nats": None}]


@pytest.mark.parametrize("name", [k for k in RESULT if k not in ("verdict", "run")])
def test_a_strange_value_is_not_known_and_breaks_nothing(tmp_path, name):
    run = judged(tmp_path / "run")
    kept = json.loads((run.path / keeping.FILE).read_text())
    for value in EVIL:
        (run.path / keeping.FILE).write_text(json.dumps(kept | {name: value}))
        lines = wording.lines(keeping.read(run))
        assert all(isinstance(text, str) and "nan" not in text for pair in lines for text in pair), value


def test_lines_come_in_the_order_of_what_decides():
    lines = wording.lines(RESULT)
    assert [name for name, _ in lines] == [
        "Moved", "Reward margin", "Good answers", "Greedy answers", "Accuracy", "AUC", "Answer length", "To good rows",
        "To bad rows", "Neutral text", "Rows",
    ]  # fmt: skip
    text = dict(lines)
    assert text["Reward margin"] == "+1.93, 95 % interval +1.7 to +2.1"
    assert text["Good answers"] == "less likely than before: reward -0.48, 95 % interval -0.6 to -0.3"
    assert text["Answer length"] == "58 tokens before, 20 after (of at most 128)"
    assert text["To bad rows"] == "56 tokens before, 22 after; the bad answers in the data have 42"
    why = "3 not used because the run was trained on their question; 4 more not used, to save time; 2 too long"
    assert f"31 questions; {why}" in text["Rows"]


def test_an_interval_around_nothing_is_no_change():
    assert "about as likely" in dict(wording.lines(RESULT | {"chosen_interval": [-0.6, 0.1]}))["Good answers"]
    assert "too few questions" in dict(wording.lines(RESULT | {"margin_interval": None}))["Reward margin"]
    assert "Greedy answers" not in dict(wording.lines(RESULT | {"answers": None}))
