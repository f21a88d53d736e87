"""The form of the Train tab in a real browser: what it keeps, what it takes, what it says."""

import pytest

from kto_core.runs import folders
from tests.support import browser
from tests.support.train_page import (  # noqa: F401 (fixtures)
    STEPS,
    begin,
    cache,
    chromium,
    events_for,
    fill,
    home,
    in_state,
    page,
    runs_dir,
    url,
    value_of,
)
from tests.support.training import make_data


def test_answers_that_overtake_each_other_leave_the_form_as_the_page_shows_it(page):
    length_before = page.locator("#set-max_length input").input_value()
    held = browser.hold(page, "**/queue/join*", lambda _: len(held) < 2)
    page.locator("#train-preset").get_by_text("3b", exact=True).click()
    browser.until(lambda: page.wait_for_timeout(50) or len(held) == 1)
    fill(page, max_steps=7)  # sent with the preset's name and the values of the one before
    browser.until(lambda: page.wait_for_timeout(50) or len(held) == 2)
    held[0].continue_()
    page.locator("#train-changed").get_by_text("All settings match preset 3b").wait_for()
    length = page.locator("#set-max_length input")
    shown = length.input_value()
    assert shown != length_before
    with page.expect_response(lambda r: r.request == held[1].request):
        held[1].continue_()
    page.locator("#train-changed").get_by_text("Changed by you").wait_for()  # late, and not what the page shows
    page.locator("#train-changed").get_by_text("All settings match preset 3b").wait_for()
    assert length.input_value() == shown
    page.unroute("**/queue/join*")
    page.locator("#train-preset").get_by_text("demo", exact=True).click()
    page.locator("#train-changed").get_by_text("All settings match preset demo").wait_for()


def test_the_form_takes_no_input_before_it_shows_what_was_kept(page):
    fill(page, max_steps=STEPS)
    page.locator("#train-changed").get_by_text(f"{STEPS}").wait_for()
    before = len(folders.list_runs())
    (opened,) = events_for(page, "set-max_steps", "load")
    held = browser.hold(page, "**/run/predict*", lambda r: r.post_data_json["fn_index"] == opened)
    browser.reload(page)
    browser.tab(page, "Train")
    browser.until(lambda: page.wait_for_timeout(50) or held)
    steps, start = page.locator("#set-max_steps input"), page.locator("#train-start")
    page.locator("#train-changed .changed").wait_for(state="attached")  # the tick's words on the form do not open it
    empty = steps.input_value()
    assert empty != str(STEPS)
    for _ in range(20):
        page.keyboard.press("Tab")
        assert not page.evaluate("!!document.activeElement.closest('#train-form')")
    for place in (steps, start):
        box = place.bounding_box()
        page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.keyboard.type("7")
    assert steps.input_value() == empty
    held[0].continue_()
    value_of(page, "max_steps", STEPS)
    page.unroute("**/run/predict*")
    fill(page, max_steps=7)
    page.locator("#train-changed").get_by_text("Max steps 7").wait_for()
    assert start.inner_text() == "Start training"
    assert len(folders.list_runs()) == before


@pytest.mark.parametrize("failure", ["nothing is told", "the request fails"])
def test_a_form_that_cannot_be_filled_can_be_used(chromium, url, failure):
    context = chromium.new_context()  # not `page`: Chromium writes a failed request to the console
    context.set_default_timeout(browser.PATIENCE)
    try:
        page = context.new_page()
        page.goto(url)
        page.get_by_role("tab", name="Train").last.wait_for()
        (opened,) = events_for(page, "set-max_steps", "load")
        outputs = page.evaluate("i => window.gradio_config.dependencies.find(d => d.id === i).outputs.length", opened)
        told = {"json": {"data": [{"__type__": "update"}] * outputs, "is_generating": False}}  # as `quiet` has it
        told = told if failure == "nothing is told" else {"status": 500, "json": {"error": "no room"}}
        answered = []

        def answer(route) -> None:
            if route.request.post_data_json["fn_index"] != opened:
                return route.continue_()
            answered.append(opened)
            return route.fulfill(**told)

        page.route("**/run/predict*", answer)
        page.reload()
        browser.tab(page, "Train")
        fill(page, max_steps=7)
        page.locator("#train-changed").get_by_text("Max steps 7").wait_for()
        assert answered
    finally:
        context.close()


def test_problems_are_shown_at_once_and_nothing_starts(page):
    before = len(folders.list_runs())
    fill(page, beta=-1, max_length=3)
    alert = page.locator("#train-plan [role=alert]")
    alert.get_by_text("Maximum length").wait_for()
    assert "Beta" in alert.inner_text()
    page.locator("#train-start").click()
    page.locator(".toast-body.error").wait_for()
    page.locator("#train-start", has_text="Start training").wait_for()  # and not "Starting…" for good
    assert len(folders.list_runs()) == before
    page.locator("#train-reset").click()
    page.locator("#train-plan [data-verdict]").wait_for()
    value_of(page, "beta", 0.5)


OUT_OF_RANGE = [
    ("#data-row", 999, "There is no row 999: this is row 300, the last one."),
    ("#data-row", -4, "There is no row -4: this is row 1, the first one."),
    ("#data-page", 60, "There is no page 60: this is page 6, the last one."),
    ("#data-page", 0, "There is no page 0: this is page 1, the first one."),
    ("#data-max-length", 5, "Max length is from 16 to 1,048,576 tokens: 16 counts here."),
]


def test_a_number_out_of_range_is_said_and_stops_nothing_else(page, home):
    make_data(home / "data" / "many.jsonl", rows=300)
    begin(page)
    in_state(page, "training", step=3)
    browser.reload(page)  # its list has the new file
    browser.tab(page, "Train")
    in_state(page, "training", step=3)
    browser.tab(page, "Data")
    browser.choose(page, "#data-pick", "many.jsonl")
    search, place = page.locator("#data-search input, #data-search textarea"), page.locator("#data-range")
    place.get_by_text("1–50 of 300 rows").wait_for()
    for field, typed, said in OUT_OF_RANGE:
        kept = page.locator(f"{field} input").input_value()
        page.locator(f"{field} input").fill(str(typed))
        page.locator("#tab-data").get_by_text(said).wait_for()
        search.fill("What is 29")  # another control
        place.get_by_text("1–11 of 11 rows").wait_for()
        search.fill("")
        place.get_by_text("of 300 rows").wait_for()
        page.locator(f"{field} input").fill(str(typed))
        step = int(page.locator(".run-head").get_attribute("data-step"))
        in_state(page, "training", step=step + 2)  # the run's progress goes on
        page.locator(f"{field} input").fill(kept)
    browser.tab(page, "Train")
    page.locator("#train-stop").click()
    in_state(page, "stopped")
