"""A vote's file: it survives crashes, two writers and damage; and nothing that is shown tells which side is which."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from kto_core.errors import DataError, DiskError
from kto_core.vote import folder
from kto_core.vote.entries import Answer
from tests.vote.conftest import ANSWERS, answered, choose


def forget() -> None:
    """As after a restart of the app: all is read from the disk."""
    folder._known.clear()


def test_what_is_shown_is_the_same_whichever_side_is_which(sides):
    """The same texts at the same places: with the sides swapped behind them, the page gets the same, byte for byte."""
    for number in range(1, 30):
        one, two = folder.create(*sides, seed=9), folder.create(*sides, seed=9)
        drawn = one.draw(1)
        assert drawn == two.draw(1)
        for session, left in ((one, "a"), (two, "b")):
            session.add_prompts([[{"role": "user", "content": f"Question {number}?"}]])
            right = "b" if left == "a" else "a"
            fixed = replace(drawn, left=left)
            session.draw = lambda n, fixed=fixed: fixed
            session.add_pair(1, {left: Answer("At the left."), right: Answer("At the right.")})
        assert repr(one.shown()) == repr(two.shown())
        assert one.shown().left == "At the left."
        one.vote(1, "left")
        two.vote(1, "left")
        assert (one.counts().wins, two.counts().wins) == (1, 0), "and yet the votes count for whose answer it was"


def test_sides_and_order_are_drawn_and_do_not_depend_on_each_other(sides):
    session = folder.create(*sides, seed=1)
    drawn = [session.draw(n) for n in range(1, 2001)]
    for what in ("left", "first"):
        assert 900 < sum(getattr(d, what) == "a" for d in drawn) < 1100
    assert 900 < sum(d.left == d.first for d in drawn) < 1100, "who answers first says nothing of the place"
    assert len({d.seed for d in drawn}) > 1990
    forget()
    assert [folder.find(session.id).draw(n) for n in range(1, 2001)] == drawn, "kept with the vote"
    assert [folder.create(*sides, seed=2).draw(n) for n in range(1, 50)] != drawn[:49]


def test_votes_survive_a_restart(session):
    places = [choose(session, side) for side in "aaba"]
    assert set(places) == {"left", "right"}
    session.vote(session.shown().number, "tie")
    session.edit(session.shown().number, "left", "Better.")
    before = (session.shown(), session.counts(), session.pairs())
    forget()
    again = folder.newest()
    assert again is not session and (again.shown(), again.counts(), again.pairs()) == before
    assert (before[1].wins, before[1].losses, before[1].ties) == (3, 1, 1)


def test_an_entry_says_all_of_its_pair(session):
    number = session.shown().number
    session.vote(number, "right")
    lines = [json.loads(line) for line in session.path.read_text().splitlines()]
    pair = next(x for x in lines if x["kind"] == "pair" and x["number"] == number)
    assert pair["messages"] == [{"role": "user", "content": "Question 0?"}]
    assert {k: v["content"] for k, v in pair["answers"].items()} == ANSWERS
    assert pair["left"] in "ab" and pair["sides"]["a"]["run"] == "one" and pair["sides"]["b"]["run"] == ""
    assert pair["sampling"]["temperature"] == 0.7 and pair["seed"] == session.draw(number).seed and pair["t"] > 1e9
    vote = lines[-1]
    assert vote["choice"] == "right" and vote["winner"] == session._pairs[number].side("right")


def test_a_line_that_a_crash_cut_off_costs_only_itself(session):
    choose(session, "a")
    whole = session.path.read_bytes()
    choose(session, "b")
    cut = session.path.read_bytes()[:-9]
    session.path.write_bytes(cut)
    forget()
    again = folder.find(session.id)
    assert again.counts().asked == 1 and again.shown().number == 2
    choose(again, "a")
    assert again.counts().wins == 2 and again.skipped == 1
    forget()
    assert folder.find(session.id).counts().wins == 2
    assert session.path.read_bytes().startswith(whole)


def test_damaged_lines_are_skipped_and_counted(session):
    choose(session, "a")
    bad = [
        "nonsense", "[]", "null", "7", '{"kind": "vote"}', '{"kind": "vote", "number": 99, "choice": "left", "t": 1}',
        '{"kind": "vote", "number": 2, "choice": "up", "t": 1}', '{"kind": "vote", "number": [2], "choice": "left"}',
        '{"kind": "pair", "number": 11, "messages": [], "answers": {}, "left": "a", "seed": 1, "t": 1}',
        '{"kind": "pair", "number": 0, "left": "c"}', '{"kind": "edit", "number": 2, "side": "left", "text": "x"}',
        '{"kind": "prompt", "number": true, "messages": [{"role": "user", "content": "x"}]}',
        '{"kind": "prompt", "number": 40, "messages": [{"role": "root", "content": "x"}]}',
        '{"kind": "other"}', "[" * 5000, "\udcff",
    ]  # fmt: skip
    with open(session.path, "ab") as f:
        f.write("".join(line + "\n" for line in bad).encode("utf-8", "surrogateescape"))
    assert session.refresh().counts().asked == 1 and session.skipped == len(bad)
    choose(session, "b")
    assert session.counts().asked == 2


@pytest.mark.parametrize("first", ["", "nonsense\n", "{}\n", '{"kind": "session"}\n', "null\n", "[" * 9000 + "\n"])
def test_a_file_that_is_no_vote_is_refused_and_hides_no_other(session, first):
    path = session.path.with_name("29990101-000000-zzzz.jsonl")
    path.write_text(first)
    with pytest.raises(DataError, match="Vote 29990101-000000-zzzz cannot be read"):
        folder.find("29990101-000000-zzzz")
    os.utime(session.path, (1, 1))
    assert folder.newest() is session


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc/passwd", "a/b", "x\0", "nothing"])
def test_no_name_leads_out_of_the_folder(name, session):
    with pytest.raises(DataError, match="does not exist"):
        folder.find(name)


def test_the_first_vote_on_a_pair_counts(session):
    number = session.shown().number
    assert session.vote(number, "left") and not session.vote(number, "right")
    assert session._pairs[number].choice == "left" and session.counts().asked == 1
    for wrong, choice in ((number, "up"), (99, "left")):
        with pytest.raises(DataError):
            session.vote(wrong, choice)
    with pytest.raises(DataError):
        session.edit(number, "tie", "x")


def test_several_threads_and_a_second_process_write_one_file(session):
    code = (
        "import sys\nfrom kto_core.vote import folder\ns = folder.find(sys.argv[1])\n"
        "for n in range(6, 11): s.vote(n, 'tie')\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code, session.id])
    threads = [threading.Thread(target=session.vote, args=(n % 5 + 1, "left")) for n in range(20)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert other.wait(60) == 0
    counts = session.refresh().counts()
    assert (counts.asked, counts.ties) == (10, 5) and session.skipped == 0 and session.shown() is None


def test_identical_answers_are_not_asked(sides):
    def same_for_even(number):
        return {"a": "Four.", "b": "Four. \n"} if number % 2 == 0 else ANSWERS

    session = answered(folder.create(*sides), 6, same_for_even)
    assert session.waiting() == 3
    asked = []
    while pair := session.shown():
        asked.append(pair.number)
        choose(session, "a")
    counts = session.counts()
    assert asked == [1, 3, 5] and (counts.wins, counts.identical, counts.asked, counts.votes) == (3, 3, 3, 6)


def test_a_prompt_is_asked_once_and_has_the_system_prompt(sides):
    session = folder.create(*sides, system=" Be brief. ")
    ask = [{"role": "user", "content": "Why?"}]
    own = [{"role": "system", "content": "Shout."}, *ask]
    assert session.add_prompts([ask, own, ask]) == 2 and session.add_prompts([ask]) == 0
    assert session.prompts() == [[{"role": "system", "content": "Be brief."}, *ask], own]
    more = [[{"role": "user", "content": str(i)}] for i in range(9)]
    assert session.add_prompts(more, 4) == 4 and session.add_prompts(more, 4) == 4 and session.add_prompts(more, 4) == 1


def test_remarks_are_kept_once(session):
    session.add_remarks(["This is not known."])
    session.add_remarks(["This is not known.", "Nor this\x1b[2J."])
    session.add_remarks([])
    forget()
    assert folder.find(session.id).remarks == ["This is not known.", "Nor this\\x1b[2J."]


def test_a_vote_goes_on_only_with_the_same_settings(session, sides):
    assert folder.resume(*sides) is session
    assert folder.resume(*sides, {"temperature": 0.1}) is None and folder.resume(*sides, {}, "Be brief.") is None
    assert folder.resume(sides[1], sides[0]) is None


def test_a_vote_that_was_deleted_or_cannot_be_written_is_said(session, monkeypatch):
    number = session.shown().number

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(DiskError, match="Free up disk space"):
            session.vote(number, "left")
    assert session.shown().number == number, "a vote that is not on the disk does not count"
    session.path.unlink()
    with pytest.raises(DataError, match="no longer exists"):
        session.vote(number, "left")
