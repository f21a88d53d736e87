"""`vote` in the terminal, with the tiny model: a whole vote, its result and its rows, and what is refused."""

import io
import json
import sys

import pytest

from kto_core import cli
from kto_core.chat import chat
from kto_core.data import dataset
from kto_core.vote import folder
from tests.support.training import make_data

SHORT = ("--max-new-tokens", "8", "--temperature", "1")


@pytest.fixture
def typed(monkeypatch):
    """Lines that are typed at the terminal."""

    def give(*lines: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))

    return give


@pytest.fixture
def once(monkeypatch):
    """Models are loaded once in all tests here; what a command unloads stays."""
    real, kept = chat.Chat.load.__func__, {}

    def load(cls, target, **more):
        key = (str(target), more.get("checkpoint"))
        if key not in kept:
            kept[key] = real(cls, target, **more)
        return kept[key]

    monkeypatch.setattr(chat.Chat, "load", classmethod(load))
    monkeypatch.setattr(chat.Chat, "unload", lambda self: None)
    yield
    monkeypatch.undo()
    for one in kept.values():
        one.unload()


def test_a_vote_from_first_to_last(two_runs, typed, once, capsys, tmp_path):
    one, two = (str(run.path) for run in two_runs)
    asked = tmp_path / "asked.txt"
    asked.write_text("Why?\nHow?\nWhen?\nWho?\nWhere?\n")
    typed("x", "e", "l", "A better", "answer.", ".", "l", "r", "t", "q")
    assert cli.main(["vote", one, "--prompts", str(asked), *SHORT, "--n", "4"]) == 0
    out, err = capsys.readouterr()
    assert "--- 1 of 4 ---" in out and "--- 4 of 4 ---" in out and "--- 5" not in out
    assert "l: left is better" in err and "Run one against base model" in err
    assert out.count("[left]") == 4 and "3: " in out and "base" not in out.split("Vote ")[0], (
        "no name before the result"
    )
    session = folder.newest()
    assert session.counts().asked == 3 and session.counts().ties == 1 and session.waiting() == 1

    typed("b", "q")  # goes on with the same vote
    assert cli.main(["vote", one, "--prompts", str(asked), *SHORT, "--n", "4"]) == 0
    assert folder.newest() is session and session.counts().bad == 1
    assert cli.main(["vote", "result", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["vote"] == session.id and found["votes"] == 4 and found["wins"] + found["losses"] == 2
    assert found["verdict"] == "no difference yet" and found["a"]["run"] == "one" and found["interval"][0] < 0.5
    assert found["sampling"]["max_new_tokens"] == 8 and str(tmp_path) not in json.dumps(found["a"])

    out = tmp_path / "rows.jsonl"
    assert cli.main(["vote", "rows", "--out", str(out)]) == 0
    said = capsys.readouterr()
    loaded = dataset.load(str(out))
    assert f"{len(loaded.rows)} rows in {out}" in said.out and "--adapter" in said.err
    assert "A frozen copy of that adapter, not the base model, is the reference" in said.err
    edit = next(row for row in loaded.rows if row.completion[0]["content"] == "A better\nanswer.")
    assert edit.label and edit.extra["source"] == "KTO Studio edit"

    typed("l", "l", "l")  # run against run, typed prompts; the end of the input ends the vote
    typed("Who are you?", "l", "Who are you?", "And I?", "r", "exit")
    assert cli.main(["vote", one, "--against", two, *SHORT]) == 0
    said = capsys.readouterr()
    other = folder.newest()
    assert other is not session and other.settings.b.run == "two" and other.counts().asked == 2
    assert "was voted on already" in said.err
    typed("q")
    assert cli.main(["vote", one, "--new", "--held-out", "--n", "3", *SHORT]) == 0
    assert len(folder.newest().prompts()) == 3 and folder.newest() not in (session, other)


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("vote result", 1, "There is no vote yet"),
        ("vote result ../x", 1, "does not exist"),
        ("vote rows", 2, "requires --out"),
        ("vote rows --out x.csv", 1, "There is no vote yet"),
        ("vote nothing", 1, "nothing is not a run"),
        ("vote demo", 1, "demo is not a run"),
        ("vote RUN --against nothing", 1, "nothing is not a run"),
        ("vote RUN --checkpoint 77", 1, "has no checkpoint 77"),
        ("vote RUN --prompts missing.jsonl", 1, "missing.jsonl"),
        ("vote RUN other", 2, "--against"),
        ("vote RUN --json", 2, "vote result"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_makes_nothing(two_runs, capsys, line, code, said):
    words = [str(two_runs[0].path) if word == "RUN" else word for word in line.split()]
    assert cli.main(words) == code
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    assert folder.newest() is None


def test_wrong_numbers_and_two_sources_are_wrong_usage(tmp_path):
    data = str(make_data(tmp_path / "d.jsonl"))
    for words in (["--n", "0"], ["--prompts", data, "--held-out"], ["--temperature", "9"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["vote", "RUN", *words])
        assert ended.value.code == 2


def test_rows_only_go_into_jsonl(session, capsys, tmp_path):
    assert cli.main(["vote", "rows", "--out", str(tmp_path / "x.csv")]) == 2
    assert "must end in .jsonl" in capsys.readouterr().err
    assert cli.main(["vote", "rows", "--out", str(tmp_path / "x.jsonl")]) == 1
    assert "No vote and no edit makes a row yet" in capsys.readouterr().err and not (tmp_path / "x.jsonl").exists()


def test_a_model_that_fails_is_said_and_the_votes_stay(two_runs, typed, capsys, monkeypatch, tmp_path):
    from kto_core.errors import BusyError

    def busy(*args, **more):
        raise BusyError("Run r1 is training.")

    monkeypatch.setattr(chat.Chat, "load", busy)
    asked = tmp_path / "asked.txt"
    asked.write_text("Why?\n")
    typed("l")
    assert cli.main(["vote", str(two_runs[0].path), "--prompts", str(asked)]) == 1
    assert "Run r1 is training." in capsys.readouterr().err
    assert len(folder.newest().unanswered()) == 1
