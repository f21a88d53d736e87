"""The Chat tab in a real browser: answers, Stop, comparison, thumbs."""

import shutil
import time

import pytest

from kto_studio.chat import view

EVIL = 'Hi <img src="http://127.0.0.1:9/x.png" onerror="window.pwned=1"> <b>b</b><script>window.pwned=2</script> 1 < 2'


def said(page, side="a") -> str:
    """The last answer shown."""
    return page.locator(f"#chat-{side} .bot.message").last.inner_text().strip()


def ask(page, text: str) -> None:
    """Send a message and wait for the whole answer."""
    page.locator("#chat-message textarea").fill(text)
    page.locator("#chat-message textarea").press("Enter")
    page.locator("#chat-stop").wait_for()
    page.locator("#chat-send").wait_for(timeout=120_000)


# ---- a real conversation in a real browser


@pytest.mark.browser
def test_a_conversation_with_the_demo_model(demo_model, monkeypatch, tmp_path):
    from kto_core import paths
    from kto_core.chat import chat
    from kto_core.data import dataset, feedback
    from kto_studio.chat import tab
    from tests.support.tabs import opened, served

    monkeypatch.setenv("KTO_STUDIO_DATA", str(tmp_path / "data"))
    file = paths.data_dir() / tab.FEEDBACK
    with served(chat=tab.build) as url, opened(url) as page:
        page.get_by_text("No model is loaded").wait_for()
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
        page.get_by_text("to collect training data").wait_for()
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
        page.get_by_text("Send a message to start.").first.wait_for()
        page.locator("#chat-unload").click()
        page.get_by_text("No model is loaded").wait_for()
        assert chat.current() is None


@pytest.mark.browser
def test_html_of_a_model_is_text_on_the_page(monkeypatch):
    from kto_core.chat import chat
    from kto_studio.chat import tab
    from tests.support.tabs import opened, served

    class Evil:
        asked = None
        name, device, has_adapter, stats = "evil", "cpu", True, {"tokens": 1, "seconds": 1.0, "tokens_per_second": 1.0}

        def stream(self, messages, **settings):
            yield EVIL + "\n\n![x](http://127.0.0.1:9/y.png) <style>body{display:none}</style>"
            time.sleep(1)  # `ask` waits for Stop, which is shown while an answer is written

    evil = Evil()
    monkeypatch.setattr(chat, "current", lambda: evil)
    with served(chat=tab.build) as url, opened(url) as page:  # `opened` fails on a request to elsewhere
        page.get_by_text("Loaded:").wait_for()
        ask(page, "<img src=x onerror=window.pwned=3> hello")
        shown = view.typed(said(page))
        assert "<b>b</b>" in shown and "<script>" in shown and "onerror" in shown
        page.locator("#chat-markdown input").uncheck()
        page.wait_for_function("document.querySelector('#chat-a .bot.message').innerText.includes('![x]')")
        assert page.evaluate("window.pwned") is None
        assert page.locator("#chat-a .message img").count() == 0


@pytest.mark.browser
def test_a_thought_is_folded_and_a_thumb_keeps_it_apart(monkeypatch, tmp_path):
    from kto_core import paths
    from kto_core.chat import chat
    from kto_core.data import dataset
    from kto_studio.chat import tab
    from tests.support.tabs import opened, served

    class Thinker:
        asked, name, device, has_adapter = None, "thinker", "cpu", True
        stats = {"tokens": 3, "seconds": 1.0, "tokens_per_second": 3.0}

        def stream(self, messages, **settings):
            for piece in ("<think>", "I recall <b>rivers</b>.", "</think>", "The Nile", f" {len(messages)}."):
                yield piece
                time.sleep(0.3)

    thinker = Thinker()
    monkeypatch.setenv("KTO_STUDIO_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(chat, "current", lambda: thinker)
    with served(chat=tab.build) as url, opened(url) as page:
        page.get_by_text("Loaded:").wait_for()
        ask(page, "Name a river.")
        ask(page, "Another one.")  # a thought is no part of what the next question is asked with: two turns and a third
        column = page.locator("#chat-a")
        assert column.get_by_text("Thought", exact=True).count() == 2
        column.get_by_text("The Nile 3.").wait_for()
        assert not column.get_by_text("I recall").last.is_visible()
        column.get_by_text("Thought", exact=True).last.click()
        column.get_by_text("I recall").last.wait_for()
        column.get_by_role("button", name="Like", exact=True).last.click()
        page.get_by_text("1 row collected (1 👍, 0 👎)").wait_for()
    (row,) = dataset.load(str(paths.data_dir() / tab.FEEDBACK)).rows
    assert [m["content"] for m in row.prompt] == ["Name a river.", "The Nile 1.", "Another one."]
    (answer,) = row.completion
    assert answer["content"] == "The Nile 3." and answer["reasoning_content"] == "I recall <b>rivers</b>."


@pytest.mark.browser
def test_a_model_that_is_not_there_is_said_and_the_page_stays(monkeypatch):
    from kto_core.chat import chat
    from kto_core.errors import BusyError
    from kto_studio.chat import tab
    from tests.support.tabs import opened, served

    def busy(*args, **more):
        raise BusyError("Training run r1 owns the GPU. Wait for its end, or stop it in the Train tab.")

    monkeypatch.setattr(chat, "load", busy)
    monkeypatch.setattr(chat, "current", lambda: None)
    with served(chat=tab.build) as url, opened(url) as page:
        page.locator("#chat-load").click()
        page.locator("#chat-status").get_by_text("owns the GPU").wait_for()
        page.locator("#chat-message textarea").fill("hello")
        page.locator("#chat-send").click()
        page.locator(".toast-wrap").get_by_text("owns the GPU").wait_for()
        page.locator("#chat-send").wait_for()


@pytest.mark.browser
def test_a_deleted_run_leaves_the_list_when_it_is_asked(runs_dir, monkeypatch):
    from kto_core import files
    from kto_core.chat import chat
    from kto_studio.chat import tab
    from tests.support.tabs import opened, served

    for name in ("r1", "r2"):
        (runs_dir / name / "adapter").mkdir(parents=True)
        (runs_dir / name / "config.yaml").write_text("preset: demo\n")
        files.seal(runs_dir / name / "adapter")
    monkeypatch.setattr(chat, "current", lambda: None)
    with served(chat=tab.build) as url, opened(url) as page:
        chosen, toast = page.locator("#chat-model input"), page.locator(".toast-wrap")
        for name, press in (("r1", "#chat-load"), ("r2", "#chat-send")):
            chosen.click()
            page.get_by_role("option", name=f"Run {name}").click()
            page.wait_for_timeout(500)  # its checkpoints are looked for while it is there
            shutil.rmtree(runs_dir / name)
            page.locator("#chat-message textarea").fill("hello")
            page.locator(press).click()
            toast.get_by_text(f"Run {name} no longer exists. Choose another.").wait_for()
            page.wait_for_function("document.querySelector('#chat-model input').value === ''")
            page.wait_for_timeout(1500)  # Gradio's list does not bear new choices while it opens
            chosen.click()
            page.get_by_role("option", name="Demo model").wait_for()
            page.get_by_role("option", name=f"Run {name}").wait_for(
                state="detached"
            )  # an open list is drawn a moment later
            page.locator("#chat-message textarea").click()  # closes the list
