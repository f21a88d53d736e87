"""The Chat tab: what it shows, what its events do, and a real conversation in a real browser."""

import shutil
import threading

import gradio as gr
import pytest

from kto_core.errors import ModelError, RunError
from kto_core.jobs import Job
from kto_studio.chat import session, view
from kto_studio.shared import live, model_choices

EVIL = 'Hi <img src="http://127.0.0.1:9/x.png" onerror="window.pwned=1"> <b>b</b><script>window.pwned=2</script> 1 < 2'


# ---- model text as text


def test_no_tag_survives_and_all_comes_back():
    for markdown in (True, False):
        safe = view.shown(EVIL, markdown)
        assert "<img" not in safe and "<b>" not in safe and "</b>" not in safe and "<script" not in safe
        assert "1 < 2" in safe
        assert view.typed(safe) == EVIL


def test_no_picture_is_fetched_from_elsewhere():
    assert "![" not in view.shown("![x](http://127.0.0.1:9/x.png)", markdown=True)
    assert view.shown("![x](y)", markdown=False) == "![x](y)"  # shown as these very characters


@pytest.mark.parametrize(
    ("text", "outside", "inside"),
    [
        ("<i>\n```html\n<div>\n```\n<u>", ["<i>", "<u>"], ["<div>"]),
        ("````\n```\n<div>\n````\n<u>", ["<u>"], ["<div>"]),
        ("~~~\n<div>\n```\n<p>\n~~~\n<u>", ["<u>"], ["<div>", "<p>"]),
        ("``` not ` a fence\n<u>", ["<u>"], []),
        ("    ```\n<u>", ["<u>"], []),
    ],
)
def test_fenced_code_is_left_as_it_is(text, outside, inside):
    safe = view.shown(text, markdown=True)
    assert all(tag not in safe for tag in outside) and all(tag in safe for tag in inside)


def test_content_of_parts():
    assert view.content([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]) == "ab"
    assert view.content("a") == "a" and view.content(None) == ""


# ---- the conversation


def conversation() -> dict:
    talk = session.empty()
    for question in ("one", "two"):
        talk = session.ask(talk, session.TUNED, question)
        talk = talk | {"a": [*talk["a"], {"role": "assistant", "content": question.upper(), "system": ""}]}
    return talk


def test_ask_cut_and_thumbs():
    talk = conversation() | {"liked": {"a1": True, "a3": False}}
    assert session.thumbs(talk, "a") == ["Like", "Dislike"]
    cut = session.cut(talk, session.TUNED, 2)
    assert [m["content"] for m in cut["a"]] == ["one", "ONE"] and cut["liked"] == {"a1": True}
    assert len(talk["a"]) == 4  # the old one is untouched


def test_comparing_starts_with_the_same_history():
    talk = session.align(conversation())
    assert talk["b"] == talk["a"]
    both = session.ask(talk, session.BOTH, "three")
    assert both["a"][-1] == both["b"][-1] and session.align(both) is both


def test_rated_has_the_system_prompt_the_answer_was_given_under():
    talk = conversation()
    talk["a"][1]["system"] = "Be brief."
    assert session.rated(talk, "a", 1, "changed since") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "ONE"},
    ]
    with pytest.raises(ModelError):
        session.rated(talk, "a", 2, "")
    with pytest.raises(ModelError):
        session.rated(talk, "a", 9, "")


def test_restore_takes_only_what_is_well_formed():
    talk = conversation() | {"liked": {"a1": True}}
    assert session.restore(talk | {"model": "demo"}) == talk
    for junk in (None, [], "x", {"a": ["x", {"role": "user"}], "liked": {"a1": "yes"}}):
        assert session.restore(junk) == session.empty()


def test_an_answer_without_text_is_left_out():
    talk = session.ask(session.empty(), session.TUNED, "hello")
    waiting = talk | {"a": [*talk["a"], {"role": "assistant", "content": ""}]}
    assert session.tidy(waiting) == talk


# ---- models by id


@pytest.mark.parametrize(
    ("choice", "name"), [("demo", "demo"), ("run:2026-demo", "2026-demo"), ("base:a/b-1.5", "a/b-1.5"), ("a/b", "a/b")]
)
def test_ids_to_names(choice, name):
    assert model_choices.target(choice) == name


@pytest.mark.parametrize(
    "choice", ["", None, "/etc", "../x", "run:../x", "run:..", "run:", "a/../b", "base:/etc/passwd", "x"]
)
def test_paths_are_no_ids(choice):
    with pytest.raises(ModelError):
        model_choices.target(choice)


def test_choices_without_any_run():
    values = [value for _, value in model_choices.choices()]
    assert "demo" in values and any(v.startswith("base:") for v in values)
    assert model_choices.checkpoints("demo") == []


def test_signature_changes_with_a_new_run(runs_dir):
    model_choices.talkable()  # who never asked for the runs need not hear of them
    before = model_choices.signature()
    (runs_dir / "r" / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (runs_dir / "r" / "config.yaml").write_text("preset: demo\n")
    (runs_dir / "r" / "checkpoints" / "checkpoint-1" / "manifest.json").write_text("{}")
    live.forget()  # the list is looked at about once a second
    assert [name for name, _ in model_choices.talkable()] == ["r"] and model_choices.signature() != before


def test_a_run_that_was_deleted_while_it_was_chosen(runs_dir, monkeypatch):
    from types import SimpleNamespace

    from kto_core.chat import chat
    from kto_studio.chat import tab

    folder = runs_dir / "r1"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("preset: demo\n")
    assert tab._mended("run:r1") == gr.skip() and model_choices.checkpoints("run:r1") == []
    shutil.rmtree(folder)
    loaded = SimpleNamespace(asked=("r1", ""), answering=False)
    monkeypatch.setattr(chat, "current", lambda: loaded)
    settings = session.Settings("run:r1", "", "Tuned", "", 0.0, 1.0, 0, 1.0, 16, -1, True)
    assert next(session.ready(settings, threading.Event())) is loaded  # it is in memory: it goes on answering
    loaded = None
    for use in (
        lambda: model_choices.load("run:r1"),
        lambda: model_choices.checkpoints("run:r1"),
        lambda: next(session.ready(settings, threading.Event())),
    ):
        with pytest.raises(RunError, match=r"^Run r1 no longer exists\. Choose another\.$"):
            use()
    mended = tab._mended("run:r1")
    assert mended["value"] is None and mended["choices"] == model_choices.choices()
    assert tab._mended("demo") == tab._mended(None) == tab._mended("run:..") == gr.skip()


# ---- lines


def test_status_says_what_is_loaded_and_what_failed():
    assert "press Load" in view.status(None, False, "", None)
    assert "with its adapter" in view.status("run x", True, "cpu", None)
    assert "&lt;b&gt;" in view.status("<b>", False, "", None)
    loading = Job("Load x", fraction=0.5, text="Reading <weights>")
    assert 'aria-valuenow="50"' in view.status(None, False, "", loading) and "&lt;weights" in view.status(
        None, False, "", loading
    )
    assert "not there" in view.status(None, False, "", Job("Load x", state="failed", error="It is not there."))


def test_stats_and_feedback_lines():
    assert view.stats(12.34, 40, 3.2) == "12.3 tokens/s · 40 tokens · 3.2 s" and view.stats(None, 0, 0) == ""
    assert view.stats(10.0, 5, 0.5, "length", 2).endswith(
        "stopped at Max tokens · 2 earlier messages no longer fit in the context"
    )
    assert "3 rows collected (2 👍, 1 👎) in f.jsonl" in view.feedback(2, 1, "f.jsonl")
    assert "1 row collected" in view.feedback(0, 1, "f")


def test_closing_the_answer_sets_the_event_the_model_reads(monkeypatch):
    from kto_core.chat import chat

    stop, seen = threading.Event(), []

    class Loaded:
        has_adapter, stats, asked = False, None, None

        def stream(self, messages, *, cancel, **settings):
            seen.append((messages, settings, cancel))
            while not cancel.is_set():
                yield "word "

    monkeypatch.setattr(chat, "current", Loaded)
    settings = session.Settings("demo", None, "Tuned", "Be brief.", 0.0, 1.0, 0, 1.0, 16, -1, True)
    growing = session.answer(session.ask(session.empty(), "Tuned", "hi"), settings, stop)
    while not (talk := next(growing)[0])["a"][-1]["content"]:
        pass
    assert talk["a"][-1]["role"] == "assistant" and not stop.is_set()
    growing.close()
    messages, sent, cancel = seen[0]
    assert stop.is_set() and cancel is stop and sent["seed"] is None and sent["tuned"] is True
    assert messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]


def test_the_chosen_model_answers_not_the_one_that_is_loaded(monkeypatch):
    from types import SimpleNamespace

    from kto_core.chat import chat
    from kto_studio.shared import model_choices

    now, loads = SimpleNamespace(asked=("run-a", ""), answering=True), []
    monkeypatch.setattr(chat, "current", lambda: now)

    def load(choice, checkpoint):
        nonlocal now
        loads.append((choice, checkpoint))
        now = SimpleNamespace(asked=(model_choices.target(choice), checkpoint or ""), answering=False)
        return SimpleNamespace(running=False, state="done")

    monkeypatch.setattr(model_choices, "load", load)

    def settings(model, checkpoint=""):
        return session.Settings(model, checkpoint, "Tuned", "", 0.0, 1.0, 0, 1.0, 16, -1, True)

    assert next(session.ready(settings("run:run-a"), threading.Event())) is now and not loads
    waiting = session.ready(settings("run:run-b"), threading.Event())
    assert next(waiting) is None and not loads  # somebody waits for the other model's answer
    now.answering = False
    assert next(waiting).asked == ("run-b", "") and loads == [("run:run-b", "")]
    assert next(session.ready(settings("run:run-b", "checkpoint-3"), threading.Event())).asked[1] == "checkpoint-3"


def test_a_question_that_was_never_answered_does_not_join_the_next():
    talk = session.ask(session.empty(), "Tuned", "cut off by a reload")
    talk = session.ask(talk, "Tuned", "next")
    assert [m["content"] for m in talk["a"]] == ["next"]


@pytest.mark.browser
def test_clear_while_it_answers_and_a_second_page_that_waits(monkeypatch):
    from kto_core.chat import chat
    from kto_studio.chat import tab
    from tests.support.tabs import opened, served

    class Slow:
        asked, answering = None, False
        name, device, has_adapter, stats = "slow", "cpu", True, {"tokens": 1, "seconds": 1.0, "tokens_per_second": 1.0}

        def stream(self, messages, *, cancel, **settings):
            while not cancel.wait(0.05):
                yield "word "

    slow = Slow()
    monkeypatch.setattr(chat, "current", lambda: slow)
    with served(chat=tab.build) as url, opened(url) as page:
        page.locator("#chat-message textarea").fill("hello")
        page.locator("#chat-send").click()
        page.locator("#chat-a .bot.message").get_by_text("word word word").wait_for()
        other = page.context.new_page()
        other.goto(url)
        other.locator("#chat-message textarea").fill("hello from here")
        other.locator("#chat-send").click()
        other.locator("#chat-stop").wait_for()  # while the first page's answer goes on
        other.locator("#chat-a").get_by_text("hello from here").wait_for()
        other.locator("#chat-stop").click()
        other.locator("#chat-send").wait_for()
        page.locator("#chat-clear").click()
        page.locator("#chat-send").wait_for()
        page.wait_for_function("!document.querySelector('#chat-a .message')")
        assert page.locator("#chat-a .message").count() == 0


def test_a_thought_is_folded_and_stored_apart(monkeypatch, tmp_path):
    """It grows open, folds when the answer begins, and a thumb keeps it under a key of its own."""
    from kto_core.data import dataset, feedback

    class Loaded:
        answering, asked = False, None
        stats = {"tokens_per_second": 1.0, "tokens": 3, "seconds": 1.0}

        def stream(self, messages, **_):
            yield from ("<think>\nI rec", "all.\n</think>\n\n", "The Ni", "le.")

    monkeypatch.setattr(session, "EVERY", 0)
    monkeypatch.setattr(session, "ready", lambda *_: iter([Loaded()]))
    talk = session.ask(session.empty(), session.TUNED, "A river?")
    settings = session.Settings("", None, session.TUNED, "", 1, 1, 1, 1, 9, None, False)
    shown = [view.history(t["a"], False) for t, _ in session.answer(talk, settings, threading.Event())]
    states = [m[1].get("metadata", {}).get("status") for m in shown if len(m) > 1]
    assert "pending" in states and states[-1] == "done"
    assert [m["content"] for m in shown[-1]] == ["A river?", "I recall.", "The Nile."]
    assert shown[-1][1]["metadata"]["title"] == "Thought"
    *_, (talk, _) = session.answer(talk, settings, threading.Event())
    assert [view.position(talk["a"], i) for i in range(5)] == [0, 1, 1, 2, 2]
    feedback.add(tmp_path / "f.jsonl", session.rated(talk, "a", 1, ""), True)
    row = dataset.load(str(tmp_path / "f.jsonl")).rows[0]
    assert row.completion == [{"role": "assistant", "content": "The Nile.", "reasoning_content": "I recall."}]


def test_an_answer_that_ended_in_its_thought_stays():
    cut = {"role": "assistant", "content": "", "thought": "I rec"}
    talk = session.empty() | {"a": [{"role": "user", "content": "A?"}, cut]}
    assert session.tidy(talk)["a"] == talk["a"]
    assert [m["content"] for m in view.history(talk["a"], True)] == ["A?", "I rec"]
    assert view.position(talk["a"], 1) == 1 and view.position(talk["a"], 2) == 2
