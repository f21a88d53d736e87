"""Answers that overtake each other, in a real browser: one that goes through the queue arrives after newer ones."""

from tests.support import browser
from tests.support.train_page import begin, cache, chromium, events_for, home, in_state, page, runs_dir, url  # noqa: F401 (fixtures)

ANSWERS = "**/queue/data**"  # the stream that brings what went through the queue


def test_a_late_answer_to_stop_is_mended(page):
    begin(page)
    in_state(page, "training", step=3)
    held = []
    page.route(ANSWERS, lambda request: held.append(request))
    page.locator("#train-stop").click()
    in_state(page, "stopped")  # a tick has told it
    browser.until(lambda: held)
    with page.expect_response(ANSWERS):
        for request in held:
            request.continue_()
    page.unroute(ANSWERS)
    page.wait_for_timeout(500)  # it says how the run was when the button was pressed
    in_state(page, "stopped")
    page.locator("#train-resume").wait_for()
    page.locator("#train-stop").wait_for(state="hidden")
    page.locator("#train-chat").wait_for()
