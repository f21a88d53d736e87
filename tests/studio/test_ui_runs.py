"""The Runs tab in a real browser: the table, two runs beside each other, and starting from the settings of one."""

import json

import pytest

from kto_core import labels, paths
from kto_core.config import resolving
from kto_core.runs import folders
from tests.support import bad_runs, browser, verdicts
from tests.support.train_page import fill, value_of

DATA = paths.EXAMPLES / "short_answers.jsonl"
FIRST, SECOND, BROKEN = "20260101-100000-demo-aaaa", "20260102-100000-demo-bbbb", "20260103-100000-demo-cccc"


def make(folder, at: float, beta: float, slope: float):
    folder.mkdir(parents=True)
    resolving.save_config(resolving.resolve("demo", {"data": str(DATA), "beta": beta}), folder / "config.yaml")
    events = [{"t": at, "kind": "status", "state": "training", "total_steps": 30, "message": "Training."}]
    events += [
        {"t": at + 4 * i, "kind": "metric", "step": i, "loss": 0.5 - slope * i, "kl": slope * i, "eval_loss": 0.4}
        for i in range(1, 31)
    ]
    end = {"t": at + 130, "kind": "status", "state": "finished", "message": "Done.", "seconds": 130.0}
    (folder / "events.jsonl").write_text(bad_runs.text_of([*events, end]))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    verdicts.judged(make(folder / "runs" / FIRST, 1.767e9, 0.1, 0.01))
    verdicts.judged(make(folder / "runs" / SECOND, 1.768e9, 0.25, 0.002), **{"rewards/margins": 0.2})
    bad_runs.UNREADABLE["a list"](bad_runs.make(folder / "runs" / BROKEN))
    return folder


@pytest.fixture(scope="module")
def url(home):
    with browser.app(home) as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as found:
        yield found


@pytest.fixture
def page(chromium, url, home, monkeypatch):
    monkeypatch.setenv("KTO_STUDIO_RUNS", str(home / "runs"))
    with browser.page_of(chromium, url) as found:
        browser.tab(found, "Runs")
        found.locator(f"#runs-table input[data-run='{FIRST}']").wait_for()
        yield found


def order(page) -> list[str]:
    return page.locator("#runs-table input[data-run]").evaluate_all("boxes => boxes.map(box => box.dataset.run)")


def tick(page, *runs: str) -> None:
    for run in runs:
        page.locator(f"#runs-table input[data-run='{run}']").check()


def test_two_runs_beside_each_other_and_a_new_one_from_the_settings_of_the_first(page, home):
    table = page.locator("#runs-table")
    table.get_by_text("cannot be read: config.yaml").wait_for()
    tick(page, FIRST, SECOND)
    page.locator("#runs-cards .run-card").nth(1).wait_for()
    page.locator("#runs-details").get_by_text("Settings that differ").wait_for()
    differ = page.locator("#runs-details section").first.inner_text()
    assert "beta" in differ and "0.1" in differ and "0.25" in differ and "max_length" not in differ
    page.locator("#runs-details").get_by_text("Answers side by side").wait_for()
    told = json.loads(page.locator("#plot-runs").get_attribute("data-curve"))
    assert [line[0] for line in told["lines"]] == [FIRST, SECOND] and len(told["lines"][0][2]) == 30

    browser.choose(page, "#runs-metric", "KL (kl)")
    page.locator("#plot-runs b", has_text="KL").first.wait_for()
    page.locator("#runs-x").get_by_text("Time", exact=True).click()
    page.locator("#plot-runs em", has_text="seconds").wait_for()

    page.locator("#runs-cards").get_by_role("button", name=f"Start from the settings of {FIRST}").click()
    page.locator("#train-form").wait_for()
    value_of(page, "beta", 0.1)
    page.locator("#train-changed").get_by_text("beta").wait_for()
    page.locator("#train-data").get_by_text(DATA.name).wait_for()
    assert page.locator("#tab-train-button[aria-selected=true]").count() == 1

    fill(page, beta=0.33)
    page.locator("#train-changed").get_by_text("0.33").wait_for()
    page.locator("#train-share").get_by_text("Save, load, copy as a command").click()
    page.locator("#train-copy-command").click()
    command = page.locator("#train-command textarea")
    browser.until(lambda: page.wait_for_timeout(50) or "--beta 0.33" in command.input_value())
    with page.expect_download() as saved:
        page.locator("#train-save-yaml").click()
    saved.value.save_as(home / "mine.yaml")
    assert "beta: 0.33\n" in (home / "mine.yaml").read_text()
    fill(page, beta=0.9)
    page.locator("#train-share input[type=file]").set_input_files(home / "mine.yaml")
    value_of(page, "beta", 0.33)
    (home / "wrong.yaml").write_text("preset: /etc/x.yaml\n")
    page.locator("#train-share input[type=file]").set_input_files(home / "wrong.yaml")
    page.locator(".toast-body.error", has_text="is not a preset").wait_for()
    value_of(page, "beta", 0.33)


def test_a_keyboard_sorts_and_chooses_and_keeps_its_place(page):
    assert order(page)[:2] == [SECOND, FIRST], "newest first"
    page.locator("#runs-table").get_by_role("button", name="Margin").focus()
    page.keyboard.press("Enter")
    browser.until(lambda: page.wait_for_timeout(50) or order(page)[0] == FIRST)
    assert page.evaluate("document.activeElement.dataset.value") == "margin", "the focus is found again"
    page.keyboard.press("Enter")
    browser.until(lambda: page.wait_for_timeout(50) or order(page)[0] == SECOND)
    page.locator("#runs-table [aria-sort=ascending]", has_text="Margin").wait_for()
    page.get_by_role("checkbox", name=f"Compare {SECOND}").focus()
    page.keyboard.press("Space")
    page.locator("#runs-cards .run-card").wait_for()
    page.locator("#runs-table tr[aria-selected=true]").wait_for()
    page.locator("#runs-search input, #runs-search textarea").fill("aaaa")
    browser.until(lambda: page.wait_for_timeout(50) or order(page) == [FIRST])
    page.locator("#runs-cards .run-card").wait_for()  # what is chosen stays chosen
    page.get_by_role("button", name=f"Do not compare {SECOND}").click()
    page.locator("#runs-beside").wait_for(state="hidden")


def test_many_quick_choices_all_arrive(page):
    page.evaluate(
        """ids => ids.forEach(id => document.querySelector(`#runs-table input[data-run='${id}']`).click())""",
        [FIRST, SECOND, BROKEN, SECOND, SECOND],
    )
    page.locator("#runs-cards .run-card").nth(2).wait_for()
    page.get_by_role("button", name="Clear selection").click()
    page.locator("#runs-beside").wait_for(state="hidden")
    browser.until(lambda: page.wait_for_timeout(50) or page.locator("#runs-table input:checked").count() == 0)


def test_name_tags_and_note_are_edited_and_a_csv_is_saved(page, home):
    tick(page, FIRST)
    page.get_by_role("button", name=f"Edit name, tags and note of {FIRST}").click()
    page.locator("#runs-name input, #runs-name textarea").fill("<b>Short</b>")
    page.locator("#runs-tags input, #runs-tags textarea").fill("best, -bad")
    page.locator("#runs-save").click()
    page.locator(".toast-body.error", has_text="slashes").wait_for()
    page.locator("#runs-name input, #runs-name textarea").fill("<i>Short")
    page.locator("#runs-tags input, #runs-tags textarea").fill("best, keep")
    page.locator("#runs-note textarea").fill("=1+1")
    page.locator("#runs-save").click()
    page.locator("#runs-table .run-title", has_text="<i>Short").wait_for()
    page.locator("#runs-edit").wait_for(state="hidden")
    found = labels.read(folders.find(FIRST).path)
    assert (found.name, found.tags, found.note) == ("<i>Short", ("best", "keep"), "=1+1")
    page.locator("#runs-table").get_by_role("button", name="#keep").click()
    browser.until(lambda: page.wait_for_timeout(50) or order(page) == [FIRST])
    with page.expect_download() as saved:
        page.locator("#runs-csv").click()
    text = (home / "runs.csv").as_posix()
    saved.value.save_as(text)
    lines = (home / "runs.csv").read_text().splitlines()
    assert len(lines) == 2 and "'=1+1" in lines[1] and "best keep" in lines[1]
    page.get_by_role("button", name="Open <i>Short in Train").click()
    page.locator("#train-head .run-name", has_text="<i>Short").wait_for()
    page.locator("#train-head .run-id", has_text=FIRST).wait_for()
