"""The blind vote of the Chat tab without a browser: what a page gets, what is shown when, who answers."""

import threading
from dataclasses import replace

import pytest

from kto_core import jobs
from kto_core.chat import chat
from kto_core.errors import DataError, KTOError, ModelError
from kto_core.vote import folder
from kto_core.vote.entries import Answer
from kto_core.vote.sides import Side
from kto_studio.chat import guest, vote_tab, vote_view, vote_work
from kto_studio.chat.session import Settings

SIDES = (Side("owner/base-model", "run-tuned", "", "/runs/run-tuned"), Side("owner/base-model"))


def vote(left: str, prompts: int = 3, texts=("At the left.", "At the right."), system: str = ""):
    """A vote whose left answers are all of side ``left``."""
    session = folder.create(*SIDES, system=system, seed=4)
    real, right = session.draw, "b" if left == "a" else "a"
    session.draw = lambda number: replace(real(number), left=left)
    session.add_prompts([{"role": "user", "content": f"Question {i}?"}] for i in range(prompts))
    for number, _ in session.unanswered():
        session.add_pair(number, {left: Answer(texts[0], "I think."), right: Answer(texts[1])})
    return session


def sent(session, number: float = -1) -> list:
    """All that a page gets before a vote, but the vote's id and the mark (time and size of the file)."""
    return vote_tab._screen(session, None, True, number)[2:]


def test_a_page_gets_the_same_whichever_side_is_which():
    one, two = vote("a"), vote("b")
    before = sent(one)
    assert repr(before) == repr(sent(two))
    text = repr(before)
    assert "At the left." in text and "Question 0?" in text
    for telling in ("tuned", "base", "run-", "'a'", "'b'", "I think"):
        assert telling not in text
    for session in (one, two):
        session.vote(1, "left")
    result = before.index(vote_view.result(vote("a")))
    after = [sent(one), sent(two)]
    assert repr(after[0][:result]) == repr(after[1][:result]), "nor does the next pair tell"
    assert after[0][result] != after[1][result] and repr(after[0][result + 1 :]) == repr(after[1][result + 1 :])


def test_the_number_of_the_mark_does_not_tell_either():
    sizes = {left: vote(left).path.stat().st_size for left in "ab"}
    assert abs(sizes["a"] - sizes["b"]) <= 40  # times are written with one to three digits behind the point


def test_all_text_of_models_and_prompts_is_shown_as_text():
    evil = '<img src=x onerror="window.pwned=1">![x](http://127.0.0.1:9/y.png)</pre><script>1</script>'
    session = vote("a", 1, (evil, "```\n" + evil), system=evil)
    shown = sent(session)
    prompt, left, right = shown[2], shown[3], shown[4]
    assert "<img" not in prompt and "<script" not in prompt and "&lt;img" in prompt
    assert "<img" not in left and "![x]" not in left and "<script" not in left
    assert vote_view.answer("```\n<b>", False).startswith("````text\n")
    assert vote_view.answer(" \n", True) == vote_view.NO_TEXT
    assert right.count("```") == 1


def test_what_the_models_do_is_said_only_while_it_matters():
    session = vote("a", 1)
    job = jobs.Job("Blind vote x", text="Loading…")
    assert vote_view.status(session, job) == "" and not vote_view.idle(session, job)
    session.vote(1, "tie")
    session.add_prompts([[{"role": "user", "content": "More?"}]])
    assert "Loading" in vote_view.status(session, job)
    job.state, job.error = "failed", "The <GPU> is busy."
    assert "note-bad" in vote_view.status(session, job) and "&lt;GPU&gt;" in vote_view.status(session, job)
    assert vote_view.idle(session, job) and vote_view.idle(session, None)
    assert "no answers yet" in vote_view.status(session, None)
    assert "1 vote · 1 left" in vote_view.progress(session)
    assert (
        vote_view.status(None, None) == "" and vote_view.progress(None) == "" and "No votes" in vote_view.result(None)
    )


def test_the_result_says_better_or_worse_with_its_numbers():
    session = vote("a", 12)
    for number in range(1, 13):
        session.vote(number, "left")
    text = vote_view.result(session)
    assert "Run run-tuned is better than base model owner/base-model." in text and "note-good" in text
    assert "12 decided votes, 95 % interval" in text and "however often you look" in text
    other = vote("b", 12)
    for number in range(1, 13):
        other.vote(number, "left")
    assert "is worse than" in vote_view.result(other) and "note-bad" in vote_view.result(other)


def settings(model="run:r1", checkpoint=None) -> Settings:
    return Settings(model, checkpoint, "Tuned", "", 0.5, 0.9, 40, 1.0, 32, -1, True)


@pytest.fixture
def runs(runs_dir):
    from kto_core import files
    from kto_core.runs import folders
    from tests.support.training import make_data, resolved

    data = make_data(runs_dir.parent / "rows.jsonl")
    for name in ("r1", "r2"):
        run = folders.create(resolved("demo", data, output_dir=str(runs_dir / name)))
        (run.path / "adapter").mkdir()
        files.seal(run.path / "adapter")
    return runs_dir


class Loaded:
    """Two models that answer at once."""

    name, device, has_adapter, answering, beside, asked = "r1", "cpu", True, False, "", ("r1", "")

    def join(self, target, **_):
        self.beside = target

    def stream(self, messages, *, tuned, other, cancel, gives_way, seed, **sampling):
        assert gives_way and sampling["max_new_tokens"] == 32
        yield f"{'second run' if other else 'tuned' if tuned else 'base'}: {messages[-1]['content']}"


def test_start_makes_a_vote_and_goes_on_with_it(runs, monkeypatch):
    loaded = Loaded()
    monkeypatch.setattr(chat, "current", lambda: loaded)
    session = vote_work.begin(settings(), "base", "typed", "One?\nTwo?", "", 20, False)
    vote_work.supply(session).job.wait(20)
    assert len(session.pairs()) == 2 and session.pairs()[0].answers["a"].text == "tuned: One?"
    assert session.settings.sampling["temperature"] == 0.5 and loaded.beside == ""
    again = vote_work.begin(settings(), "base", "typed", "Three?", "", 20, False)
    vote_work.supply(again).job.wait(20)
    assert again is session and len(session.pairs()) == 3
    for number in (1, 2, 3):
        session.vote(number, "tie")
    vote_work.begin(settings(), "base", "typed", "Three?", "", 20, False)
    vote_work.supply(session).job.wait(20)
    assert "All of these prompts were voted on" in vote_work.supply(session).job.error
    other = vote_work.begin(settings(), "r2", "typed", "One?", "", 20, False)
    vote_work.supply(other).job.wait(20)
    assert other is not session and other.pairs()[0].answers["b"].text == "second run: One?"
    assert folder.newest() is other
    assert vote_work.begin(settings(), "base", "typed", "One?", "", 20, False) is session and folder.newest() is session
    assert vote_work.begin(settings(), "base", "typed", "One?", "", 20, True) not in (session, other)


@pytest.mark.parametrize(
    ("model", "against", "source", "typed", "data", "said"),
    [
        ("demo", "base", "typed", "One?", "", "not a run"),
        (None, "base", "typed", "One?", "", "Choose a run under Model"),
        ("run:gone", "base", "typed", "One?", "", "gone is not a run"),
        ("run:../x", "base", "typed", "One?", "", "Choose a model from the list"),
        ("run:r1", "r9", "typed", "One?", "", "r9 is not a run"),
        ("run:r1", "r1", "typed", "One?", "", "compared with itself"),
        ("run:r1", "base", "typed", " \n", "", "There is no prompt"),
        ("run:r1", "base", "data", "", "file:../../etc/passwd", "No dataset is selected"),
        ("run:r1", "base", "data", "", None, "No dataset is selected"),
    ],
)
def test_what_cannot_be_voted_on_is_refused_and_makes_no_vote(runs, model, against, source, typed, data, said):
    with pytest.raises(KTOError, match=said):
        vote_work.begin(settings(model), against, source, typed, data, 20, False)
    assert folder.newest() is None


def test_somebody_elses_answer_is_waited_for_and_a_failed_load_is_said(runs, monkeypatch):
    busy = Loaded()
    busy.asked, busy.answering = ("other", ""), True
    monkeypatch.setattr(chat, "current", lambda: busy)
    session = folder.create(Side("demo", "r1"), Side("demo"))
    cancel, said = threading.Event(), []

    def progress(_, text):
        said.append(text)
        cancel.set()

    with pytest.raises(KTOError):
        vote_work.load(session, progress, cancel)
    assert "Waiting until the other model has answered" in said[0]

    def refuse(*_, **__):
        raise ModelError("It does not load.")

    monkeypatch.setattr(chat, "current", lambda: None)
    monkeypatch.setattr(chat, "load", refuse)
    with pytest.raises(ModelError, match="It does not load"):
        vote_work.load(session, lambda *_: None, threading.Event())


def test_a_click_without_a_vote_is_one_sentence():
    for name in ("", None, "../x", "20990101-000000-abcd"):
        with pytest.raises(DataError):
            vote_tab._shown(name)


def test_the_guests_page_has_no_vote():
    page = guest.build()
    ids = {str(getattr(c, "elem_id", "")) for c in page.blocks.values()}
    assert not [i for i in ids if i.startswith("vote")] and "guest-talk" in ids
    assert not [fn for fn in page.fns.values() if "vote" in str(getattr(fn.fn, "__module__", ""))]
