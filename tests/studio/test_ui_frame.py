"""The page's frame in a real browser: the tab in the address, the theme, the title, names, what a keyboard reaches."""

import re

import pytest

from kto_core.config import resolving
from kto_core.runs import folders
from kto_core.runs.events import EventLog
from tests.support import browser
from tests.support.train_page import (  # noqa: F401 (fixtures)
    cache,
    chromium,
    drawn,
    fill,
    home,
    last_step,
    page,
    runs_dir,
    url,
    value_of,
)

RATIO = """
() => {
  const rgb = color => {
    const canvas = document.createElement('canvas').getContext('2d');
    canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const color = rgb(getComputedStyle(e).backgroundColor);
      if (color[3] > 250) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const text = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!text || !e.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    if (e.closest('button:disabled, [aria-hidden=true], .visually-hidden, svg, option, .info-text')) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${e.tagName}.${e.className} ${e.textContent.trim().slice(0, 40)}`);
  }
  return found;
}
"""


def made(steps: int, total: int, state: str = "finished", name: str = ""):
    run = folders.create(resolving.resolve("demo", {"run_name": name} if name else {}, origin="test"))
    log = EventLog(run.path / "events.jsonl")
    log.status("training", total_steps=total)
    for step in range(1, steps + 1):
        log.metric(step, loss=0.5 / step, learning_rate=1e-4)
    if state != "training":
        log.status(state, message="Done.")
    return run


def test_the_tab_is_kept_in_the_address(page):
    assert page.url.endswith("#train")
    browser.reload(page)
    page.locator("#train-start").wait_for()
    assert page.get_by_role("tab", name="Train", exact=True).last.get_attribute("aria-selected") == "true"
    page.evaluate("location.hash = '#export'")
    page.locator("#export-gguf").wait_for()
    page.evaluate("location.hash = '#nowhere'")  # of another page, perhaps
    page.locator("#export-gguf").wait_for()


def test_the_theme_is_switched_in_the_header_and_stays(page):
    toggle = page.locator(".theme-toggle")
    assert toggle.get_attribute("aria-label") == "Dark theme"
    toggle.click()
    page.wait_for_function("document.body.classList.contains('dark')")
    browser.reload(page)
    page.wait_for_function("document.body.classList.contains('dark')")
    page.locator(".theme-toggle[aria-label='Light theme']").click()
    page.wait_for_function("!document.body.classList.contains('dark')")


def test_a_zoom_is_of_all_curves_is_undone_and_is_not_the_next_runs(page):
    first = made(60, 60)
    page.locator(".run-id", has_text=first.id).wait_for()
    browser.until(lambda: drawn(page) == 60)
    box = page.locator("#plot-loss svg").bounding_box()

    def drag() -> None:
        page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 40)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + 40, steps=3)
        page.locator("#plot-loss .curve-band").wait_for()
        page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 40)
        page.mouse.up()

    for undo in (lambda: page.locator(".curve-reset").first.click(), lambda: page.locator("#plot-loss svg").dblclick()):
        drag()
        browser.until(lambda: drawn(page) < 30 and drawn(page, "learning_rate") < 30)
        undo()
        browser.until(lambda: drawn(page) == 60 == drawn(page, "learning_rate"))
    drag()
    browser.until(lambda: drawn(page) < 30)
    second = made(6, 6)
    page.locator(".run-id", has_text=second.id).wait_for()
    browser.until(lambda: drawn(page) == 6 == last_step(page))
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 40)
    page.locator("#plot-loss .curve-tip", has_text=re.compile("^step [34]")).wait_for()
    for run in (first, second):
        folders.delete(run)


@pytest.mark.parametrize("away", [None, "Data"])
def test_windows_that_watch_a_run_begin_show_its_curve_to_the_last_step(page, away):
    """Not drawn when first shown, and never again, is how they were empty; the last point came with the last word."""
    run = folders.create(resolving.resolve("demo", {}, origin="test"))
    log = EventLog(run.path / "events.jsonl")
    log.status("training", total_steps=4)
    page.locator(".run-id", has_text=run.id).wait_for()
    if away:
        browser.tab(page, away)
    log.metric(1, loss=0.5)
    page.wait_for_timeout(1500)
    if away:
        browser.tab(page, "Train")
    browser.until(lambda: drawn(page) == 1, 5)
    for step in (2, 3):
        log.metric(step, loss=0.5 / step)
    log.metric(4, loss=0.1)
    log.status("finished", message="Done.")
    browser.until(lambda: drawn(page) == 4 == last_step(page), 5)
    folders.delete(run)


def test_a_preset_keeps_what_the_user_set(page):
    fill(page, beta=0.37)
    page.locator("#train-changed").get_by_text("0.37").wait_for()
    page.locator("#train-preset").get_by_text("3b", exact=True).click()
    page.locator("#train-changed").get_by_text("0.37").wait_for()
    page.locator("#train-model input").wait_for()
    value_of(page, "beta", 0.37)
    page.locator("#train-reset").click()
    page.locator("#train-changed").get_by_text("All settings match preset 3b").wait_for()


def test_start_is_seen_without_scrolling_and_data_leads_there(chromium, url):
    with browser.page_of(chromium, url, width=1280, height=800) as found:
        found.locator("#data-train").click()
        found.locator("#train-plan [data-verdict]").wait_for()
        box = found.locator("#train-start").bounding_box()
        assert box["y"] + box["height"] <= 800
        assert found.evaluate("document.documentElement.scrollWidth <= 1280")


def test_a_phone_shows_the_run_first_and_nothing_sideways(chromium, url):
    with browser.page_of(chromium, url, width=390, height=844) as found:
        browser.tab(found, "Train")
        found.locator("#train-start").wait_for()
        run, form = (found.locator(f"#{name}").bounding_box() for name in ("train-run-side", "train-form"))
        assert run["y"] < form["y"]
        browser.tab(found, "Chat")
        box = found.locator("#chat-send").bounding_box()
        assert box["y"] + box["height"] <= 844
        assert found.evaluate("document.documentElement.scrollWidth <= 390")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_what_is_read_has_contrast_a_name_and_its_place(chromium, url, dark):
    run = made(3, 3)
    with browser.page_of(chromium, url, dark=dark) as found:
        for name in ("Data", "Train", "Runs", "Chat", "Export"):
            browser.tab(found, name)
            if name == "Runs":
                found.get_by_role("checkbox", name=f"Compare {run.id}").check()
                found.locator("#plot-runs").wait_for()
            found.wait_for_timeout(1500)
            assert found.evaluate(RATIO) == [], name
            unnamed = (
                "[...document.querySelectorAll('fieldset, .curve svg')].filter(e => !e.getAttribute('aria-label'))"
            )
            assert found.evaluate(f"{unnamed}.length") == 0, name
            levels = found.evaluate(
                "[...document.querySelectorAll('h1, h2, h3, h4')].filter(h => h.checkVisibility())"
                ".map(h => +h.tagName[1])"
            )
            assert levels[0] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False)), (name, levels)
    folders.delete(run)


def test_a_table_and_a_group_of_choices_are_one_tab_stop(page):
    browser.tab(page, "Data")
    rows = page.locator("#data-table tr[data-index]")
    assert page.locator("#data-table tr[tabindex='0']").count() == 1 < rows.count()
    page.locator("#data-table tr[tabindex='0']").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.locator("#data-table tr[data-index='1'][aria-selected=true][tabindex='0']").wait_for()
    assert page.locator("#data-table tr[tabindex='0']").count() == 1
    page.locator("#data-label input").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.activeElement.closest('#data-label') && document.activeElement.value === 'yes'")
    page.locator("#data-table .label.bad").first.wait_for(state="detached")


def test_a_dropdown_opens_with_an_arrow_and_closes_when_it_is_left(page):
    page.locator("#train-change-data").focus()
    page.keyboard.press("Tab")
    page.wait_for_function("document.activeElement.ariaLabel === 'Model'")
    page.wait_for_timeout(300)
    assert page.locator("#train-form [role=option]").count() == 0
    page.keyboard.press("ArrowDown")
    page.locator("#train-model [role=option]").first.wait_for()
    page.keyboard.press("Tab")
    page.locator("#train-model [role=option]").first.wait_for(state="detached")


def test_a_setting_with_a_problem_is_marked(page):
    fill(page, beta=-1)
    page.locator("#train-plan").get_by_text("Beta:").wait_for()
    page.locator("#set-beta input[aria-invalid=true]").wait_for()
    fill(page, beta=0.3)
    page.locator("#set-beta input:not([aria-invalid])").wait_for()
