"""The Chat tab: what it shows, what its events do, and a real conversation in a real browser."""

import shutil
import threading
import time

import gradio as gr
import pytest

from kto_core.errors import ModelError, RunError
from kto_core.jobs import Job
from ui import chat_models, chat_session, chat_view

EVIL = 'Hi <img src="http://127.0.0.1:9/x.png" onerror="window.pwned=1"> <b>b</b><script>window.pwned=2</script> 1 < 2'


# ---- model text as text


def test_no_tag_survives_and_all_comes_back():
    for markdown in (True, False):
        safe = chat_view.shown(EVIL, markdown)
        assert "<img" not in safe and "<b>" not in safe and "</b>" not in safe and "<script" not in safe
        assert "1 < 2" in safe
        assert chat_view.typed(safe) == EVIL


def test_no_picture_is_fetched_from_elsewhere():
    assert "![" not in chat_view.shown("![x](http://127.0.0.1:9/x.png)", markdown=True)
    assert chat_view.shown("![x](y)", markdown=False) == "![x](y)"  # shown as these very characters


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
    safe = chat_view.shown(text, markdown=True)
    assert all(tag not in safe for tag in outside) and all(tag in safe for tag in inside)


def test_content_of_parts():
    assert chat_view.content([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]) == "ab"
    assert chat_view.content("a") == "a" and chat_view.content(None) == ""


# ---- the conversation


def conversation() -> dict:
    talk = chat_session.empty()
    for question in ("one", "two"):
        talk = chat_session.ask(talk, chat_session.TUNED, question)
        talk = talk | {"a": [*talk["a"], {"role": "assistant", "content": question.upper(), "system": ""}]}
    return talk


def test_ask_cut_and_thumbs():
    talk = conversation() | {"liked": {"a1": True, "a3": False}}
    assert chat_session.thumbs(talk, "a") == ["Like", "Dislike"]
    cut = chat_session.cut(talk, chat_session.TUNED, 2)
    assert [m["content"] for m in cut["a"]] == ["one", "ONE"] and cut["liked"] == {"a1": True}
    assert len(talk["a"]) == 4  # the old one is untouched


def test_comparing_starts_with_the_same_history():
    talk = chat_session.align(conversation())
    assert talk["b"] == talk["a"]
    both = chat_session.ask(talk, chat_session.BOTH, "three")
    assert both["a"][-1] == both["b"][-1] and chat_session.align(both) is both


def test_rated_has_the_system_prompt_the_answer_was_given_under():
    talk = conversation()
    talk["a"][1]["system"] = "Be brief."
    assert chat_session.rated(talk, "a", 1, "changed since") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "ONE"},
    ]
    with pytest.raises(ModelError):
        chat_session.rated(talk, "a", 2, "")
    with pytest.raises(ModelError):
        chat_session.rated(talk, "a", 9, "")


def test_restore_takes_only_what_is_well_formed():
    talk = conversation() | {"liked": {"a1": True}}
    assert chat_session.restore(talk | {"model": "demo"}) == talk
    for junk in (None, [], "x", {"a": ["x", {"role": "user"}], "liked": {"a1": "yes"}}):
        assert chat_session.restore(junk) == chat_session.empty()


def test_an_answer_without_text_is_left_out():
    talk = chat_session.ask(chat_session.empty(), chat_session.TUNED, "hello")
    waiting = talk | {"a": [*talk["a"], {"role": "assistant", "content": ""}]}
    assert chat_session.tidy(waiting) == talk


# ---- models by id


@pytest.mark.parametrize(
    ("choice", "name"), [("demo", "demo"), ("run:2026-demo", "2026-demo"), ("base:a/b-1.5", "a/b-1.5"), ("a/b", "a/b")]
)
def test_ids_to_names(choice, name):
    assert chat_models.target(choice) == name


@pytest.mark.parametrize(
    "choice", ["", None, "/etc", "../x", "run:../x", "run:..", "run:", "a/../b", "base:/etc/passwd", "x"]
)
def test_paths_are_no_ids(choice):
    with pytest.raises(ModelError):
        chat_models.target(choice)


def test_choices_without_any_run():
    values = [value for _, value in chat_models.choices()]
    assert "demo" in values and any(v.startswith("base:") for v in values)
    assert chat_models.checkpoints("demo") == []


def test_signature_changes_with_a_new_run(runs_dir):
    before = chat_models.signature()
    (runs_dir / "r").mkdir(parents=True)
    assert chat_models.signature() != before


def test_a_run_that_was_deleted_while_it_was_chosen(runs_dir, monkeypatch):
    from types import SimpleNamespace

    from kto_core import chat
    from ui import chat_tab

    folder = runs_dir / "r1"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("preset: demo\n")
    assert chat_tab._mended("run:r1") == gr.skip() and chat_models.checkpoints("run:r1") == []
    shutil.rmtree(folder)
    loaded = SimpleNamespace(asked=("r1", ""), answering=False)
    monkeypatch.setattr(chat, "current", lambda: loaded)
    settings = chat_session.Settings("run:r1", "", "Tuned", "", 0.0, 1.0, 0, 1.0, 16, -1, True)
    assert next(chat_session.ready(settings, threading.Event())) is loaded  # it is in memory: it goes on answering
    loaded = None
    for use in (
        lambda: chat_models.load("run:r1"),
        lambda: chat_models.checkpoints("run:r1"),
        lambda: next(chat_session.ready(settings, threading.Event())),
    ):
        with pytest.raises(RunError, match=r"^Run r1 is not there any more\. Choose another\.$"):
            use()
    mended = chat_tab._mended("run:r1")
    assert mended["value"] is None and mended["choices"] == chat_models.choices()
    assert chat_tab._mended("demo") == chat_tab._mended(None) == chat_tab._mended("run:..") == gr.skip()


# ---- lines


def test_status_says_what_is_loaded_and_what_failed():
    assert "press Load" in chat_view.status(None, False, "", None)
    assert "with its adapter" in chat_view.status("run x", True, "cpu", None)
    assert "&lt;b&gt;" in chat_view.status("<b>", False, "", None)
    loading = Job("Load x", fraction=0.5, text="Reading <weights>")
    assert 'aria-valuenow="50"' in chat_view.status(None, False, "", loading) and "&lt;weights" in chat_view.status(
        None, False, "", loading
    )
    assert "not there" in chat_view.status(None, False, "", Job("Load x", state="failed", error="It is not there."))


def test_stats_and_feedback_lines():
    assert chat_view.stats(12.34, 40, 3.2) == "12.3 tokens/s · 40 tokens · 3.2 s" and chat_view.stats(None, 0, 0) == ""
    assert chat_view.stats(10.0, 5, 0.5, "length", 2).endswith("ended at Max tokens · 2 old messages did not fit")
    assert "3 rows collected (2 👍, 1 👎) in f.jsonl" in chat_view.feedback(2, 1, "f.jsonl")
    assert "1 row collected" in chat_view.feedback(0, 1, "f")


def test_closing_the_answer_sets_the_event_the_model_reads(monkeypatch):
    from kto_core import chat

    stop, seen = threading.Event(), []

    class Loaded:
        has_adapter, stats, asked = False, None, None

        def stream(self, messages, *, cancel, **settings):
            seen.append((messages, settings, cancel))
            while not cancel.is_set():
                yield "word "

    monkeypatch.setattr(chat, "current", Loaded)
    settings = chat_session.Settings("demo", None, "Tuned", "Be brief.", 0.0, 1.0, 0, 1.0, 16, -1, True)
    growing = chat_session.answer(chat_session.ask(chat_session.empty(), "Tuned", "hi"), settings, stop)
    while not (talk := next(growing)[0])["a"][-1]["content"]:
        pass
    assert talk["a"][-1]["role"] == "assistant" and not stop.is_set()
    growing.close()
    messages, sent, cancel = seen[0]
    assert stop.is_set() and cancel is stop and sent["seed"] is None and sent["tuned"] is True
    assert messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]


def test_the_chosen_model_answers_not_the_one_that_is_loaded(monkeypatch):
    from types import SimpleNamespace

    from kto_core import chat
    from ui import chat_models

    now, loads = SimpleNamespace(asked=("run-a", ""), answering=True), []
    monkeypatch.setattr(chat, "current", lambda: now)

    def load(choice, checkpoint):
        nonlocal now
        loads.append((choice, checkpoint))
        now = SimpleNamespace(asked=(chat_models.target(choice), checkpoint or ""), answering=False)
        return SimpleNamespace(running=False, state="done")

    monkeypatch.setattr(chat_models, "load", load)

    def settings(model, checkpoint=""):
        return chat_session.Settings(model, checkpoint, "Tuned", "", 0.0, 1.0, 0, 1.0, 16, -1, True)

    assert next(chat_session.ready(settings("run:run-a"), threading.Event())) is now and not loads
    waiting = chat_session.ready(settings("run:run-b"), threading.Event())
    assert next(waiting) is None and not loads  # somebody waits for the other model's answer
    now.answering = False
    assert next(waiting).asked == ("run-b", "") and loads == [("run:run-b", "")]
    assert next(chat_session.ready(settings("run:run-b", "checkpoint-3"), threading.Event())).asked[1] == "checkpoint-3"


def test_a_question_that_was_never_answered_does_not_join_the_next():
    talk = chat_session.ask(chat_session.empty(), "Tuned", "cut off by a reload")
    talk = chat_session.ask(talk, "Tuned", "next")
    assert [m["content"] for m in talk["a"]] == ["next"]


@pytest.mark.browser
def test_clear_while_it_answers_and_a_second_page_that_waits(monkeypatch):
    from tabs import opened, served

    from kto_core import chat
    from ui import chat_tab

    class Slow:
        asked, answering = None, False
        name, device, has_adapter, stats = "slow", "cpu", True, {"tokens": 1, "seconds": 1.0, "tokens_per_second": 1.0}

        def stream(self, messages, *, cancel, **settings):
            while not cancel.wait(0.05):
                yield "word "

    slow = Slow()
    monkeypatch.setattr(chat, "current", lambda: slow)
    with served(chat=chat_tab.build) as url, opened(url) as page:
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


# ---- a real conversation in a real browser


def said(page, side="a") -> str:
    """The last answer shown."""
    return page.locator(f"#chat-{side} .bot.message").last.inner_text().strip()


def ask(page, text: str) -> None:
    """Send a message and wait for the whole answer."""
    page.locator("#chat-message textarea").fill(text)
    page.locator("#chat-message textarea").press("Enter")
    page.locator("#chat-stop").wait_for()
    page.locator("#chat-send").wait_for(timeout=120_000)


@pytest.mark.browser
def test_a_conversation_with_the_demo_model(demo_model, monkeypatch, tmp_path):
    from tabs import opened, served

    from kto_core import chat, dataset, feedback, paths
    from ui import chat_tab

    monkeypatch.setenv("KTO_STUDIO_DATA", str(tmp_path / "data"))
    file = paths.data_dir() / chat_tab.FEEDBACK
    with served(chat=chat_tab.build) as url, opened(url) as page:
        page.get_by_text("Nothing is loaded").wait_for()
        page.get_by_text("Sampling").click()
        page.locator("#chat-max-tokens input[type=number]").fill("24")
        page.locator("#chat-max-tokens input[type=number]").press("Tab")

        # loads by itself, streams, says how fast
        ask(page, "What is the capital of France?")
        page.locator("#chat-stats").get_by_text("tokens/s").wait_for()
        assert said(page)
        page.get_by_text("Loaded:").wait_for()

        # thumbs become rows, one an answer; taken back, the row goes
        column = page.locator("#chat-a")
        column.get_by_role("button", name="Like", exact=True).click()
        page.get_by_text("1 row collected (1 👍, 0 👎)").wait_for()
        column.get_by_role("button", name="Dislike", exact=True).click()
        page.get_by_text("1 row collected (0 👍, 1 👎)").wait_for()
        rows = dataset.load(str(file)).rows
        assert (
            len(rows) == 1 and not rows[0].label and rows[0].prompt[-1]["content"] == "What is the capital of France?"
        )
        assert rows[0].completion[0]["content"].strip()

        # a reload keeps the conversation and the thumb
        before = said(page)
        page.reload()
        column.locator(".bot.message").wait_for()
        assert said(page) == before
        column.get_by_role("button", name="Disliked", exact=True).click()
        page.get_by_text("to collect training rows").wait_for()
        assert feedback.counts(file) == (0, 0)

        # side by side: both answer the same history
        page.get_by_text("Side by side").click()
        page.locator("#chat-b .bot.message").wait_for()
        ask(page, "And of Spain?")
        assert page.locator("#chat-b .bot.message").count() == page.locator("#chat-a .bot.message").count() == 2

        # stop ends a long answer and keeps what was written
        page.locator("label").filter(has_text="Base").locator("input").check()
        page.get_by_text("Sampling").click()
        page.locator("#chat-max-tokens input[type=number]").fill("2000")
        page.locator("#chat-max-tokens input[type=number]").press("Tab")
        page.locator("#chat-message textarea").fill("Count from one to five hundred, in words.")
        page.locator("#chat-send").click()
        page.wait_for_function("document.querySelectorAll('#chat-a .bot.message')[2]?.innerText.length > 10")
        page.locator("#chat-stop").click()
        page.locator("#chat-send").wait_for(timeout=15_000)
        assert len(said(page)) > 10

        # undo gives the question back, clear forgets all
        column.get_by_role("button", name="Undo", exact=True).click()
        page.wait_for_function("document.querySelector('#chat-message textarea').value.startsWith('Count')")
        page.locator("#chat-clear").click()
        page.get_by_text("Say something.").first.wait_for()
        page.locator("#chat-unload").click()
        page.get_by_text("Nothing is loaded").wait_for()
        assert chat.current() is None


@pytest.mark.browser
def test_html_of_a_model_is_text_on_the_page(monkeypatch):
    from tabs import opened, served

    from kto_core import chat
    from ui import chat_tab

    class Evil:
        asked = None
        name, device, has_adapter, stats = "evil", "cpu", True, {"tokens": 1, "seconds": 1.0, "tokens_per_second": 1.0}

        def stream(self, messages, **settings):
            yield EVIL + "\n\n![x](http://127.0.0.1:9/y.png) <style>body{display:none}</style>"
            time.sleep(1)  # `ask` waits for Stop, which is shown while an answer is written

    evil = Evil()
    monkeypatch.setattr(chat, "current", lambda: evil)
    with served(chat=chat_tab.build) as url, opened(url) as page:  # `opened` fails on a request to elsewhere
        page.get_by_text("Loaded:").wait_for()
        ask(page, "<img src=x onerror=window.pwned=3> hello")
        shown = chat_view.typed(said(page))
        assert "<b>b</b>" in shown and "<script>" in shown and "onerror" in shown
        page.locator("#chat-markdown input").uncheck()
        page.wait_for_function("document.querySelector('#chat-a .bot.message').innerText.includes('![x]')")
        assert page.evaluate("window.pwned") is None
        assert page.locator("#chat-a .message img").count() == 0


@pytest.mark.browser
def test_a_model_that_is_not_there_is_said_and_the_page_stays(monkeypatch):
    from tabs import opened, served

    from kto_core import chat
    from kto_core.errors import BusyError
    from ui import chat_tab

    def busy(*args, **more):
        raise BusyError("Training run r1 owns the GPU. Wait for its end, or stop it in the Train tab.")

    monkeypatch.setattr(chat, "load", busy)
    monkeypatch.setattr(chat, "current", lambda: None)
    with served(chat=chat_tab.build) as url, opened(url) as page:
        page.locator("#chat-load").click()
        page.locator("#chat-status").get_by_text("owns the GPU").wait_for()
        page.locator("#chat-message textarea").fill("hello")
        page.locator("#chat-send").click()
        page.locator(".toast-wrap").get_by_text("owns the GPU").wait_for()
        page.locator("#chat-send").wait_for()


@pytest.mark.browser
def test_a_deleted_run_leaves_the_list_when_it_is_asked(runs_dir, monkeypatch):
    from tabs import opened, served

    from kto_core import chat, checkpoints
    from ui import chat_tab

    for name in ("r1", "r2"):
        (runs_dir / name / "adapter").mkdir(parents=True)
        (runs_dir / name / "config.yaml").write_text("preset: demo\n")
        checkpoints.seal(runs_dir / name / "adapter")
    monkeypatch.setattr(chat, "current", lambda: None)
    with served(chat=chat_tab.build) as url, opened(url) as page:
        chosen, toast = page.locator("#chat-model input"), page.locator(".toast-wrap")
        for name, press in (("r1", "#chat-load"), ("r2", "#chat-send")):
            chosen.click()
            page.get_by_role("option", name=f"Run {name}").click()
            page.wait_for_timeout(500)  # its checkpoints are looked for while it is there
            shutil.rmtree(runs_dir / name)
            page.locator("#chat-message textarea").fill("hello")
            page.locator(press).click()
            toast.get_by_text(f"Run {name} is not there any more. Choose another.").wait_for()
            page.wait_for_function("document.querySelector('#chat-model input').value === ''")
            chosen.click()
            page.get_by_role("option", name="Demo model").wait_for()
            assert page.get_by_role("option", name=f"Run {name}").count() == 0
            page.locator("#chat-message textarea").click()  # closes the list
