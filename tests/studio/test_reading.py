"""Columns and thresholds of the Data tab: what is shown of them, what is kept, and both in a browser."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from kto_core import paths
from kto_core.config import column_map
from kto_core.data import dataset
from kto_core.errors import DataError
from kto_studio.data import findings, reading, view
from kto_studio.data import jobs as data_jobs
from kto_studio.shared import data_sources, readings

STARS = Path(__file__).parents[1] / "data" / "cases" / "labels" / "stars_1_to_5.jsonl"


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("KTO_STUDIO_DATA", str(tmp_path / "data"))
    return paths.data_dir()


def strange(folder: Path) -> Path:
    rows = [{"frage": f"Q {i}?", "antwort": f"A {i}.", "urteil": i % 2, "topic": "ab"[i % 4 > 1]} for i in range(40)]
    (folder / "strange.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / "strange.jsonl"


# ---- what is kept


def test_a_reading_is_kept_with_its_data_set_and_decides_its_rows(tmp_path):
    stars = data_sources.add_upload(str(STARS))
    before = data_sources.key(stars)
    assert not data_sources.load(stars).report.kept and readings.of(stars) == {}
    readings.keep(stars, good_from=4, bad_to=2)
    assert data_sources.peek(stars) is None and data_sources.key(stars) != before
    assert data_sources.load(stars).report.desirable == 8
    readings.keep(stars, good_from=None, bad_to=None, map="")
    assert data_sources.key(stars) == before and not list(paths.data_dir().rglob("*-reading.json"))
    with pytest.raises(DataError, match="Did you mean prompt"):
        readings.keep(stars, map="promt=a")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"good_from": "x", "map": 5}', '{"map": "nowhere=a", "bad_to": NaN}'])
def test_a_damaged_reading_is_none(text):
    stars = data_sources.add_upload(str(STARS))
    readings.keep(stars, good_from=4)
    next(paths.data_dir().rglob("*-reading.json")).write_text(text)
    assert readings.of(stars) == {}


def test_a_column_has_one_meaning_the_last_that_was_chosen():
    stars = data_sources.add_upload(str(STARS))

    def choose(**columns):
        reading.choose(stars, *(columns.get(t, "") for t in reading.TARGETS))
        return column_map.parse(readings.of(stars).get("map", ""))

    assert choose(prompt="a", completion="b") == {"prompt": "a", "completion": "b"}
    assert choose(prompt="a", completion="a") == {"completion": "a"}
    assert choose() == {}


# ---- what is shown


@pytest.mark.parametrize(
    "good_from,bad_to,right,said",
    [
        (4, 2, True, ("<b>8</b>", "8 good, 8 bad, 4 left out")),
        (4, None, True, ("8 good, 12 bad, 0 left out",)),
        (2, 4, False, ("must be below good_from",)),
        (9, 2, False, ("outside the scale",)),
        (None, None, False, ()),
    ],
)
def test_the_balance_is_shown_before_it_is_applied(good_from, bad_to, right, said):
    text, ok = reading.balance(dataset.load(str(STARS)).report, good_from, bad_to)
    assert ok is right and all(part in text for part in said) and "--good-from" not in text


def test_a_scales_problem_points_to_the_page(tmp_path):
    shown = view.summary(dataset.load(str(STARS)).report)
    assert "Say in the Data tab where good begins" in shown and "--good-from" not in shown
    shown = view.summary(dataset.load(str(strange(tmp_path))).report)
    assert "Choose in the Data tab which column is which" in shown and "--map" not in shown


def test_findings_are_shown_and_escaped(tmp_path):
    evil = "<img src=x>"
    rows = [{"prompt": f"{i}?", "completion": "A." * (1 + 40 * (i % 2)), "label": i % 2, "topic": evil + str(i % 3),
             evil: 1} for i in range(60)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    report = dataset.load(str(tmp_path / "rows.jsonl")).report
    shown = findings.warnings(report) + findings.answers(report) + findings.categories(report) + findings.beside(report)
    assert "answer at length" in shown and "Rows by topic" in shown and "not trained on" in shown
    assert "<img" not in shown and "&lt;img" in shown
    calm = dataset.load(str(STARS)).report
    assert findings.warnings(calm) + findings.answers(calm) + findings.categories(calm) + findings.beside(calm) == ""


def test_nothing_is_seen_of_columns_and_scales_where_there_is_nothing_to_say():
    ui = SimpleNamespace(**{f"map_{t}": f"map_{t}" for t in reading.TARGETS})
    for name in ("read_as", "columns_room", "scale_room", "scale", "good_from", "bad_to", "cut", "apply", "uncut"):
        setattr(ui, name, name)
    out = reading.shown(ui, data_jobs.look("", start=False))
    assert out["columns_room"]["visible"] is False and out["scale_room"]["visible"] is False
    stars = data_sources.add_upload(str(STARS))
    data_sources.load(stars)
    out = reading.shown(ui, data_jobs.look(stars, start=False))
    assert out["columns_room"]["label"] == "Columns: prompt, completion, label" and out["columns_room"]["open"] is False
    assert out["scale_room"]["visible"] and (out["good_from"], out["bad_to"]) == (4, 2)
    assert out["map_prompt"]["choices"][0] == ("prompt (recognized)", "")


# ---- in a browser


@pytest.mark.browser
def test_thresholds_and_columns_in_the_tab(tmp_path, demo_model):
    from tests.support import browser

    with browser.app(tmp_path / "app") as url, browser.chromium() as b, browser.page_of(b, url) as page:
        upload = page.locator("#data-upload input[type=file]")
        upload.set_input_files(str(STARS))
        page.locator("#data-cut").get_by_text("Left out").wait_for()
        page.locator("#data-good_from input").fill("5")
        page.locator("#data-cut [aria-label='4 good, 8 bad, 8 left out']").wait_for()
        page.locator("#data-bad_to input").fill("7")
        page.locator("#data-cut .note-bad").wait_for()
        assert page.locator("button#data-apply").is_disabled()
        page.locator("#data-bad_to input").fill("1")
        page.locator("#data-cut [aria-label='4 good, 4 bad, 12 left out']").wait_for()
        page.locator("button#data-apply").click()
        page.locator("#data-range").get_by_text("1–8 of 8 rows").wait_for()
        browser.reload(page)  # it belongs to the data set
        page.locator("#data-range").get_by_text("1–8 of 8 rows").wait_for()
        page.locator("button#data-uncut").click()
        page.locator("#data-facts").get_by_text("none of its numbers is read as a label").wait_for()

        upload.set_input_files(str(strange(tmp_path)))
        page.locator("#data-facts").get_by_text("No row has the required columns").wait_for()
        for target, column in (("prompt", "frage"), ("completion", "antwort"), ("label", "urteil")):
            browser.choose(page, f"#data-map-{target}", column)
            page.locator("#data-columns").get_by_text(f"{target} = {column}").wait_for()
        page.locator("#data-range").get_by_text("1–40 of 40 rows").wait_for()
        page.locator("#data-issues").get_by_text("Rows by topic").wait_for()
