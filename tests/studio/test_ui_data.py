"""The Data tab: what it shows (pure), its sources and background work, and the whole of it in a real browser."""

import gzip
import json
import threading
from pathlib import Path

import pytest

from kto_core import jobs, paths
from kto_core.data import dataset, pages
from kto_core.errors import DataError, ModelError
from kto_studio.data import fields, view
from kto_studio.data import jobs as data_jobs
from kto_studio.shared import data_sources

EVIL = "<img src=x onerror=window.pwned=1><script>window.pwned=2</script> ${window.pwned=3} {{value}} </pre><b>b</b>"


def row(i: int, label: bool, answer: str = "") -> dict:
    return {"prompt": f"Question {i:03}?", "completion": answer or f"Answer {i:03}.", "label": label}


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def mixed(tmp_path) -> Path:
    """130 usable rows, 100 of them desirable; one dropped, one duplicate, one conflict, one with HTML."""
    rows = [row(i, i % 13 < 10) for i in range(126)]
    rows[3] = row(3, True, EVIL)
    return write(
        tmp_path / "mixed.jsonl", [*rows, row(0, True), row(1, False), "{broken", row(200, True), row(201, True)]
    )


@pytest.fixture
def data_dir(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("KTO_STUDIO_DATA", str(tmp_path / "data"))
    return paths.data_dir()


# ---- what is shown


def test_table_escapes_and_marks_the_chosen_row(mixed):
    rows, total = pages.page(dataset.load(str(mixed)).rows, 0)
    shown = view.table(rows, total, selected=3)
    assert len(rows) == view.PAGE == 50 and shown.count("data-index=") == 50
    assert "<script>" not in shown and "<img" not in shown and "&lt;script&gt;" in shown
    assert 'data-index="3" tabindex="0" aria-selected="true"' in shown and shown.count('aria-selected="true"') == 1
    assert "No row matches" in view.table([], 0, searched=True)
    assert view.place(1, 50, 130) == '<div class="place">51–100 of 130 rows</div>'


def test_report_names_reasons_and_lines(mixed):
    report = dataset.load(str(mixed)).report
    shown = view.problems(report)
    for text in ("Dropped", "not JSON", "129", "Duplicate", "127 (like line 1)", "Contradiction", "128 (like line 2)"):
        assert text in shown, text
    shown = view.summary(report)
    assert "<b>131</b>" in shown and "<b>130</b>" in shown and "1 left out: 1 dropped" in shown
    assert "Nothing was dropped" in view.problems(dataset.Report())


@pytest.mark.parametrize(
    ("good", "bad", "expected"),
    [(100, 100, None), (150, 100, None), (2284, 2286, None), (0, 5, None), (70, 30, "undesirable_weight"),
     (30, 70, "desirable_weight"), (1, 1000, "desirable_weight")],
)  # fmt: skip
def test_weight_advice_is_inside_equation_9(good, bad, expected):
    found = view.advised(dataset.Report(fitting=(good, bad)))
    assert (found and found[0]) == expected
    if found:
        weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0, found[0]: found[1]}
        assert 1 <= weights["desirable_weight"] * good / (weights["undesirable_weight"] * bad) <= 1.5 + 1e-9
        assert f"{good:,} good, {bad:,} bad" in view.balance(dataset.Report(fitting=(good, bad)))


def test_row_as_the_model_sees_it(demo_model):
    from kto_core.data.records import rows
    from kto_core.data.rendering import template
    from kto_core.models import load as model

    tokenizer = model.load_tokenizer(str(demo_model))
    parsed = rows.parse({"prompt": "<|im_end|> <b>hi</b>", "completion": EVIL, "label": False}, 7)[0][0]
    rendered = template.render(parsed, tokenizer)
    shown = view.as_seen(parsed, rendered)
    assert shown.count('<mark class="token">') == len(rendered.special)
    assert "&lt;|im_end|&gt; &lt;b&gt;hi" in shown, "a special token that somebody typed is plain text"
    assert "<script>" not in shown and "<img" not in shown and "Line 7" in shown and "less often" in shown
    assert "<script>" not in view.conversation(parsed)


def test_long_texts_are_cut_in_the_middle_and_that_is_said():
    text = "a" * 20_000 + "<b>" + "z" * 20_000
    shown = view.clipped(text)
    assert len(shown) < 13_000 and "28,003 characters not shown" in shown and shown.endswith("z")
    marked = view._marked("x" * 20_000, [(5_998, 6_003), (10_000, 10_001), (19_999, 20_000)])
    assert marked.count("<mark") == 2 and marked.count("x") >= 12_000


def test_lengths_tell_what_the_limit_does(mixed):
    report = dataset.load(str(mixed)).report
    drawn = view.chart(report, None)
    assert "in characters" in view.lengths(report, 512, "demo", None, drawn) and "Median <b>" in drawn
    report.lengths_unit, report.truncated, report.too_long = "tokens", 3, 1
    assert "3 prompts are truncated and 1 rows are left out" in view.lengths(report, 16, "demo", None, drawn)
    assert 'class="over"' in view.chart(report, 16)


def test_what_is_typed_out_of_range_is_clamped_and_said():
    assert [fields.max_length(n) for n in (None, -1, 5, 16, 512, 10**9)] == [None, 16, 16, 16, 512, 1_048_576]
    assert [bool(fields.about_length(n)) for n in (None, -1, 5, 16, 512, 10**9)] == [False, True, True, False, False, True]  # fmt: skip  # noqa: E501
    assert fields.elsewhere("row", None, 3) == fields.elsewhere("row", 3, 3) == ""
    assert "no row 0: this is row 1, the first one" in fields.elsewhere("row", 0, 3)
    assert "no page 2: this is page 1, the only one" in fields.elsewhere("page", 2, 1)


# ---- sources


def test_uploads_are_kept_by_name_and_only_known_kinds(data_dir, tmp_path):
    first = write(tmp_path / "in" / "my rows.jsonl", [row(1, True)])
    assert data_sources.add_upload(str(first)) == "file:my_rows.jsonl" == data_sources.add_upload(str(first))
    second = write(tmp_path / "in2" / "my rows.jsonl", [row(2, True)])
    assert data_sources.add_upload(str(second)) == "file:my_rows-2.jsonl"
    packed = tmp_path / "x.jsonl.gz"
    packed.write_bytes(gzip.compress(first.read_bytes()))
    assert data_sources.add_upload(str(packed)) == "file:x.jsonl.gz"
    assert len(data_sources.load("file:x.jsonl.gz").rows) == 1
    with pytest.raises(DataError, match="unsupported file type. Use .jsonl"):
        data_sources.add_upload(str(write(tmp_path / "a.py", ["x"])))
    assert {"file:my_rows.jsonl", "file:x.jsonl.gz"} <= {i for _, i in data_sources.choices()}


@pytest.mark.parametrize(
    "data_id",
    ["file:../secret.jsonl", "file:/etc/passwd", "example:../README.md", "hub:../x.jsonl@train", "hub:examples@train",
     "hub:kto_studio/launch.py@train",
     "hub:/etc/passwd@train", "other:x", "file:", "", "x", "file:..", "hub:a/b@tr ain/../x"],
)  # fmt: skip
def test_a_page_cannot_name_a_path(data_dir, tmp_path, data_id):
    write(tmp_path / "secret.jsonl", [row(1, True)])
    data_dir.mkdir(parents=True, exist_ok=True)
    with pytest.raises(DataError):
        data_sources.locate(data_id)
    found = data_jobs.look(data_id, "demo", 512)
    assert found.loaded is None and found.reading is None


def test_only_hub_names_are_models(data_dir, mixed, tmp_path):
    data_id = data_sources.add_upload(str(mixed))
    data_sources.load(data_id)
    for name in (str(tmp_path), "../x/y", "/etc", "", "examples"):
        with pytest.raises(ModelError, match="owner/name"):
            data_jobs.count(data_id, name, 512)


# ---- background work


def wait(job: jobs.Job) -> jobs.Job:
    job.thread.join(60)
    assert not job.running
    return job


def test_reading_counting_and_converting(data_dir, mixed, demo_model):
    data_id = data_sources.add_upload(str(mixed))
    assert data_jobs.look(data_id, "demo", 32, start=False).reading is None
    found = data_jobs.look(data_id, "demo", 32)
    assert wait(found.reading).state == "done"
    found = data_jobs.look(data_id, "demo", 32, start=False)
    assert found.report.kept == 130 and found.report.lengths_unit == "characters"
    assert data_jobs.report_file(data_id, "demo", 32).read_text().count("\n") == 1 + len(found.report.issues)
    assert wait(data_jobs.look(data_id, "demo", 32).counting).state == "done"
    counted = data_jobs.look(data_id, "demo", 32)
    assert counted.report.lengths_unit == "tokens" and counted.tokenizer is not None
    assert counted.signature != found.signature, "an open page sees that there is news"
    assert counted.report.truncated + counted.report.too_long > 0
    both = [wait(data_jobs.convert(data_id, form)).result for form in ("trl", "chatml")]
    first, second = (dataset.load(str(p)) for p in both)
    assert len(first.rows) == len(second.rows) == 130
    assert all(
        a.prompt == b.prompt and a.completion == b.completion for a, b in zip(first.rows, second.rows, strict=True)
    )


def test_reading_fails_in_a_sentence_and_can_be_tried_again(data_dir):
    data_id = f"file:{write(data_dir / 'bad.parquet', ['no parquet']).name}"
    job = wait(data_jobs.look(data_id, "demo", 512).reading)
    assert job.state == "failed" and "bad.parquet" in job.error
    assert data_jobs.look(data_id, "demo", 512).reading is job, "not tried again by itself"
    assert data_jobs.read(data_id) is not job


def test_a_big_file_shows_its_first_page_and_can_be_cancelled(data_dir, monkeypatch):
    monkeypatch.setattr(data_jobs, "BIG", 1000)
    data_id = f"file:{write(data_dir / 'big.jsonl', [row(i, i % 2 == 0) for i in range(20_000)]).name}"
    there, go = threading.Event(), threading.Event()
    load = data_sources.load

    def slow(data_id, progress, cancel):
        there.set()
        assert go.wait(30)
        return load(data_id, progress, cancel)

    monkeypatch.setattr(data_sources, "load", slow)
    job = data_jobs.look(data_id, "demo", 512).reading
    assert there.wait(30)
    found = data_jobs.look(data_id, "demo", 512)
    assert found.loaded is None and len(found.first) == 50 and found.first[0]["prompt"] == "Question 000?"
    job.cancel()
    go.set()
    assert wait(job).state == "cancelled"
    assert data_jobs.look(data_id, "demo", 512).loaded is None, "it stays cancelled until asked again"


# ---- the tab in a browser


@pytest.mark.browser
def test_the_data_tab_end_to_end(mixed, tmp_path, demo_model):
    """Upload, table, search, filter, pages, report, row, conversion; HTML in data stays text."""
    from tests.support import browser

    with browser.app(tmp_path / "app") as url, browser.chromium() as b, browser.page_of(b, url) as page:
        # upload: the table and the facts appear
        page.locator("#data-upload input[type=file]").set_input_files(str(mixed))
        page.locator("#data-facts").get_by_text("130").wait_for()
        table, place = page.locator("#data-table tbody tr"), page.locator("#data-range")
        place.get_by_text("1–50 of 130 rows").wait_for()
        assert table.count() == 50

        # HTML and templates in a row are text
        page.locator("#data-table").get_by_text(
            "<script>window.pwned=2</script> ${window.pwned=3} {{value}}"
        ).wait_for()
        assert page.evaluate("window.pwned") is None and page.locator("#data-table img").count() == 0

        # pages
        page.locator("#data-forth button, button#data-forth").click()
        place.get_by_text("51–100 of 130 rows").wait_for()
        page.locator("#data-page input").fill("3")
        place.get_by_text("101–130 of 130 rows").wait_for()
        assert table.count() == 30 and page.locator("button#data-forth").is_disabled()
        page.locator("button#data-back").click()
        place.get_by_text("51–100 of 130 rows").wait_for()

        # search and filter start from the first page
        page.locator("#data-search input, #data-search textarea").fill("question 00")
        place.get_by_text("1–12 of 12 rows").wait_for()
        page.locator("#data-label").get_by_text("👎 Bad").click()
        place.get_by_text("of 1 rows").wait_for()
        assert "Bad" in table.first.inner_text() and table.count() == 1
        page.locator("#data-search input, #data-search textarea").fill("nowhere")
        page.locator("#data-table").get_by_text("No row matches").wait_for()
        page.locator("#data-search input, #data-search textarea").fill("")
        page.locator("#data-label").get_by_text("All", exact=True).click()
        place.get_by_text("1–50 of 130 rows").wait_for()

        # a row as the model sees it, chosen with the keyboard
        page.locator("#data-lengths").get_by_text("in tokens").wait_for()
        table.nth(2).focus()
        redraw = "const body = document.querySelector('#data-table tbody'); body.replaceWith(body.cloneNode(true))"
        page.evaluate(redraw)  # a table drawn anew takes neither the focus nor the mark away
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelector('#data-row input').value === '4'")
        page.evaluate(redraw)
        page.locator('#data-table tr[data-index="3"][aria-selected="true"]').wait_for()
        seen = page.locator("#data-row-view .seen")
        seen.get_by_text("<script>window.pwned=2</script>").wait_for()
        assert page.locator("#data-row-view mark.token").first.inner_text() == "<|im_start|>"
        page.locator("#data-row input").fill("6")
        page.locator('#data-table tr[data-index="5"][aria-selected="true"]').wait_for()
        assert page.locator('#data-table tr[aria-selected="true"]').count() == 1
        page.locator("#data-row input").fill("4")
        page.locator('#data-table tr[data-index="3"][aria-selected="true"]').wait_for()
        page.locator("#data-view").get_by_text("Messages").click()
        page.locator("#data-row-view .turn.answer").get_by_text("<b>b</b>").wait_for()
        assert page.evaluate("window.pwned") is None

        # the report, downloaded, has every line
        with page.expect_download() as got:
            page.locator("#data-report").click()
        lines = Path(got.value.path()).read_text().splitlines()
        assert lines[0] == "line,kind,reason,detail" and any(line.startswith("129,dropped,not JSON") for line in lines)

        # conversion
        page.locator("#data-form").get_by_text("ChatML").click()
        page.locator("button#data-convert").click()
        with page.expect_download() as got:
            page.locator("#data-converted").get_by_text("mixed-chatml.jsonl").click()
        rows = [json.loads(line) for line in Path(got.value.path()).read_text().splitlines()]
        assert len(rows) == 130 and rows[3]["conversations"][-1]["content"] == EVIL

        # the advice is taken, and a reload keeps the data set
        page.locator("button#data-use-weight").click()
        page.get_by_text("in the Train tab").first.wait_for()
        browser.reload(page)
        place.get_by_text("1–50 of 130 rows").wait_for()


@pytest.mark.browser
def test_a_late_answer_does_not_stay(tmp_path, demo_model):
    """Two requests may overtake each other; the table ends up as the controls say."""
    from tests.support import browser

    mixed = write(tmp_path / "mixed.jsonl", [row(i, i % 3 > 0) for i in range(130)])
    with browser.app(tmp_path / "app") as url, browser.chromium() as b, browser.page_of(b, url) as page:
        page.locator("#data-upload input[type=file]").set_input_files(str(mixed))
        place, search = page.locator("#data-range"), page.locator("#data-search input, #data-search textarea")
        place.get_by_text("1–50 of 130 rows").wait_for()
        with page.expect_request(lambda r: r.post_data is not None and len(r.post_data_json["data"]) == 7) as sent:
            page.locator("button#data-forth").click()  # seven inputs: a turned page; a tick has many more
        place.get_by_text("51–100 of 130 rows").wait_for()
        turned = sent.value.post_data_json["fn_index"]
        held = browser.hold(page, "**/run/predict*", lambda r: r.post_data_json["fn_index"] == turned)
        page.locator("button#data-forth").click()
        search.fill("question 00")
        place.get_by_text("1–10 of 10 rows").wait_for()
        shown = browser.texts_of(page, "#data-range")
        held[0].continue_()
        browser.until(lambda: any("101–130 of 130" in text for text in shown()))  # late: the page after 51–100
        place.get_by_text("1–10 of 10 rows").wait_for()
        assert search.input_value() == "question 00"


@pytest.mark.browser
def test_bad_files_are_said_and_the_page_stays(tmp_path, demo_model):
    from tests.support import browser

    empty = write(tmp_path / "empty.jsonl", [])
    one_label = write(tmp_path / "one.jsonl", [row(i, True) for i in range(5)])
    with browser.app(tmp_path / "app") as url, browser.chromium() as b, browser.page_of(b, url) as page:
        upload = page.locator("#data-upload input[type=file]")
        upload.set_input_files(str(empty))
        page.locator("#tab-data").get_by_text("The dataset is empty").wait_for()
        upload.set_input_files(str(one_label))
        page.locator("#data-facts").get_by_text("All rows are good").wait_for()
        page.locator("#data-hub").get_by_text("From the Hugging Face Hub").click()
        page.locator("#data-hub-id input, #data-hub-id textarea").fill("../../etc/passwd")
        page.locator("button#data-hub-load").click()
        page.locator("[data-testid=toast-body]").get_by_text("owner/name").wait_for()
        page.locator("#data-facts").get_by_text("All rows are good").wait_for()
