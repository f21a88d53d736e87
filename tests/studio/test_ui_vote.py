"""The blind vote and corrections in a real browser, in the whole app, with models that answer at once."""

import contextlib
import json
import re

import pytest

from kto_core import files, paths
from kto_core.chat import chat
from kto_core.data import dataset
from kto_core.runs import folders
from kto_core.vote import folder
from tests.support import browser
from tests.support.training import make_data, resolved

pytestmark = pytest.mark.browser


class Loaded:
    """A run and its base model, which answer at once."""

    name, device, has_adapter, answering, asked = "r1", "cpu", True, False, ("r1", "")
    stats = {"tokens": 3, "seconds": 1.0, "tokens_per_second": 3.0}

    def stream(self, messages, *, tuned=True, **_):
        asked = messages[-1]["content"]
        yield "The same." if "same" in asked else f"{'Short' if tuned else 'Long and winding'}: {asked} <b>x</b>"


@pytest.fixture
def page(runs_dir, tmp_path, monkeypatch):
    """The whole app with a finished run."""
    from kto_studio import launch
    from kto_studio.shared import live

    monkeypatch.setenv("KTO_STUDIO_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(chat, "current", lambda: loaded)
    loaded = Loaded()
    run = folders.create(resolved("demo", make_data(tmp_path / "rows.jsonl"), output_dir=str(runs_dir / "r1")))
    (run.path / "adapter").mkdir()
    files.seal(run.path / "adapter")
    (run.path / "events.jsonl").write_text(json.dumps({"t": 1.0, "kind": "status", "state": "finished"}) + "\n")
    paths.data_dir().mkdir()
    live.forget()
    blocks = launch.build()
    _, url, _ = blocks.launch(
        prevent_thread_lock=True, quiet=True, ssr_mode=False, server_name="127.0.0.1", run_history=False,
        **launch.looks(), **launch.doors(False),
    )  # fmt: skip
    try:
        with browser.chromium() as chromium, browser.page_of(chromium, url) as page:
            page.set_default_timeout(60_000)
            browser.tab(page, "Chat")
            yield page
    finally:
        blocks.close()


def pair(page) -> str:
    """The number of the pair that is shown, "" if none is."""
    return page.evaluate("document.querySelector('.vote-ready')?.dataset.pair ?? ''")


def press(page, key: str) -> None:
    """Press a key, and wait for the next pair or the end."""
    before = pair(page)
    page.keyboard.press(key)
    page.wait_for_function("n => (document.querySelector('.vote-ready')?.dataset.pair ?? '') !== n", arg=before)


def key_for(page, text: str) -> str:
    """The arrow to the side whose answer has this text."""
    return "ArrowLeft" if text in page.locator("#vote-left").inner_text() else "ArrowRight"


def begin(page, prompts: list[str]) -> None:
    page.locator("#chat-kind").get_by_text("Blind vote").click()
    browser.choose(page, "#chat-model", "r1")
    page.locator("#vote-source").get_by_text("Typed").click()
    page.locator("#vote-typed textarea").fill("\n".join(prompts))
    page.locator("#vote-start").click()
    page.locator(".vote-ready").wait_for()


def test_a_vote_by_keys_to_a_result_rows_and_the_next_training(page):
    assert page.locator("#vote-side").is_hidden() and page.locator("#chat-a").is_visible()
    begin(page, [*(f"Question {i}?" for i in range(9)), "The same?"])
    assert page.locator("#chat-a").is_hidden() and page.locator("#chat-mode").is_hidden()
    session = folder.newest()
    assert "<b>x</b>" in page.locator("#vote-left").inner_text().replace("\u2060", "")

    # arrows vote nowhere else: not where somebody writes, not in a group of choices, not on another tab
    page.locator("#chat-system textarea").fill("abc")
    for place in ("#chat-system textarea", "#chat-kind input:checked"):
        page.locator(place).focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Shift+ArrowLeft")
    page.locator("#chat-system textarea").fill("")
    page.locator("#chat-kind").get_by_text("Blind vote").click()
    browser.tab(page, "Data")
    page.locator("body").click(position={"x": 3, "y": 3})
    page.keyboard.press("ArrowLeft")
    browser.tab(page, "Chat")
    page.wait_for_timeout(500)
    assert session.refresh().counts().asked == 0
    page.locator("#vote-keys").click()

    # an edit, then eight votes for the run by keys, wherever it is
    place = "left" if key_for(page, "Long") == "ArrowLeft" else "right"
    page.locator(f"#vote-edit-{place}").get_by_text("Edit this answer").click()
    field = page.locator(f"#vote-edit-{place} textarea")
    assert field.input_value().startswith("Long and winding: Question 0?")
    field.fill("As it should be.")
    page.keyboard.press("ArrowLeft")
    page.locator(f"#vote-edit-{place}").get_by_text("Keep this text").click()
    page.locator(".toast-wrap").get_by_text("Kept.").wait_for()
    page.locator("#vote-keys").click()
    assert pair(page) == "1"
    for number in range(1, 9):
        assert pair(page) == str(number)
        press(page, key_for(page, "Short"))
    # a reload comes back to the vote and to its pair
    assert pair(page) == "9"
    browser.reload(page)
    page.locator(".vote-ready").wait_for()
    assert pair(page) == "9" and page.locator("#chat-a").is_hidden()
    page.locator("#vote-progress").get_by_text("8 votes").wait_for()
    page.locator("#vote-keys").click()
    press(page, "ArrowDown")

    # the end: the same answers were not asked, and the result opens
    page.locator("#vote-progress").get_by_text("no prompts left").wait_for()
    page.locator("#vote-progress").get_by_text("1 skipped: both answers were the same").wait_for()
    result = page.locator("#vote-numbers")
    result.get_by_text("Run r1 is better than base model").wait_for()
    result.get_by_text("8 decided votes, 95 % interval").wait_for()
    counts = session.refresh().counts()
    assert (counts.wins, counts.losses, counts.ties, counts.identical) == (8, 0, 1, 1)

    # rows, and training on them from the run's adapter
    page.locator("#vote-rows").click()
    page.locator("#vote-made").get_by_text("17 rows in vote-").wait_for()
    page.locator("#vote-made").get_by_text("A frozen copy of that adapter, not the base model").wait_for()
    loaded = dataset.load(str(next(paths.data_dir().glob("vote-*.jsonl"))))
    assert (loaded.report.desirable, loaded.report.undesirable) == (9, 8) and not loaded.report.unused
    page.locator("#vote-train").click()
    page.locator("#train-data").get_by_text(re.compile("vote-.*jsonl")).wait_for()
    page.wait_for_function("document.querySelector('#train-adapter input').value.includes('r1')")
    page.locator("#train-preset input[value=demo]:checked").wait_for(state="attached")


def test_buttons_vote_too_and_a_second_window_follows(page):
    begin(page, ["One?", "Two?", "Three?"])
    other = page.context.new_page()
    other.goto(page.url)
    other.locator(".vote-ready").wait_for()
    assert pair(other) == "1"
    page.locator("#vote-choose-bad").click()
    page.wait_for_function("document.querySelector('.vote-ready').dataset.pair === '2'")
    other.wait_for_function("document.querySelector('.vote-ready').dataset.pair === '2'")
    other.locator("#vote-choose-tie").click()
    page.wait_for_function("document.querySelector('.vote-ready').dataset.pair === '3'")
    page.locator("#vote-choose-left").click()
    page.locator("#vote-progress").get_by_text("no prompts left").wait_for()
    counts = folder.newest().counts()
    assert (counts.bad, counts.ties, counts.wins + counts.losses) == (1, 1, 1)
    page.locator("#chat-kind").get_by_text("Chat", exact=True).click()
    page.locator("#chat-a").wait_for()
    assert page.locator("#vote-side").is_hidden()


def test_a_correction_under_a_bad_answer_is_a_good_row(page):
    from kto_studio.chat.thumbs import FEEDBACK

    file, column, field = (
        paths.data_dir() / FEEDBACK,
        page.locator("#chat-a"),
        page.locator("#chat-correction textarea"),
    )

    def rows() -> list[tuple[str, bool]]:
        with contextlib.suppress(FileNotFoundError):
            return [
                (r["completion"][0]["content"][:5], r["label"]) for r in map(json.loads, file.read_text().splitlines())
            ]
        return []

    browser.choose(page, "#chat-model", "r1")
    page.locator("#chat-message textarea").fill("Why?")
    page.locator("#chat-send").click()
    column.get_by_text("Short: Why?").wait_for()
    page.locator("#chat-send").wait_for()
    assert field.count() == 0 or field.is_hidden()
    column.get_by_role("button", name="Dislike", exact=True).click()
    field.wait_for()
    page.locator("#chat-correction-save").click()
    page.locator(".toast-wrap").get_by_text("Write what the answer should have said").wait_for()
    field.fill("Because.")
    page.locator("#chat-correction-save").click()
    page.get_by_text("2 rows collected (1 👍, 1 👎)").wait_for()
    field.wait_for(state="hidden")
    assert rows() == [("Short", False), ("Becau", True)]
    loaded = dataset.load(str(file))
    assert loaded.rows[1].extra["source"] == "KTO Studio correction" and loaded.rows[1].extra["adapter"] == "r1"
    assert loaded.rows[0].extra["source"] == "KTO Studio thumb" and not loaded.report.unused

    # the thumb is taken back: so is its correction
    column.get_by_role("button", name="Disliked", exact=True).click()
    page.get_by_text("to collect training data").wait_for()
    assert rows() == []
    column.get_by_role("button", name="Dislike", exact=True).click()
    field.wait_for()
    assert field.input_value() == ""
    field.fill("Because of that.")
    page.locator("#chat-correction-save").click()
    page.get_by_text("2 rows collected").wait_for()
    column.get_by_role("button", name="Like", exact=True).click()
    page.get_by_text("1 row collected (1 👍, 0 👎)").wait_for()
    assert rows() == [("Short", True)]
