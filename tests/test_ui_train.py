"""The Train tab in a real browser, with a model that trains in a blink: start, curve, reload, stop, resume, errors."""

import browser
import pytest
from training import make_data, tiny_cache

from kto_core import config, run
from kto_core.events import EventLog

EVIL = '<img src="http://127.0.0.1:9/x.png" onerror="window.pwned=1"><script>window.pwned=1</script>'
DATA = "sums.jsonl"
STEPS = 20_000  # never reached


@pytest.fixture(scope="module")
def cache(tmp_path_factory, demo_model):  # noqa: F811 - the fixture of conftest.py
    return tiny_cache(tmp_path_factory.mktemp("cache"), demo_model)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Runs and data of the app of this file."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "data").mkdir()
    make_data(folder / "data" / DATA)
    return folder


@pytest.fixture(scope="module")
def url(home, cache):
    with browser.app(home, cache=cache) as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as found:
        yield found


@pytest.fixture(autouse=True)
def runs_dir(home, monkeypatch):
    """Looks where the app looks."""
    monkeypatch.setenv("KTO_STUDIO_RUNS", str(home / "runs"))
    yield home / "runs"
    if (left := run.active()) is not None:  # a test that failed: its run would slow down the others
        left.stop()
        browser.until(lambda: not left.alive())


@pytest.fixture
def page(chromium, url):
    """The Train tab with the data chosen."""
    with browser.page_of(chromium, url, height=1000) as found:
        choose_data(found)
        browser.tab(found, "Train")
        found.locator("#train-data").get_by_text("24 rows").wait_for()
        yield found


def choose_data(page) -> None:
    page.locator("#data-table tr[data-index]").first.wait_for()  # the example, which a new page opens with
    page.locator("#data-pick input").click()
    page.get_by_role("option", name=DATA).click()
    page.locator("#data-table").get_by_text("What is 0 plus 0?").first.wait_for()


def fill(page, **values) -> None:
    for name, value in values.items():
        page.locator(f"#set-{name} input").fill(str(value))
        page.locator(f"#set-{name} input").blur()


def value_of(page, name: str, value) -> None:
    """Wait until a setting shows this value."""
    page.wait_for_function(
        "([name, value]) => document.querySelector(`#set-${name} input`).value === value", arg=[name, str(value)]
    )


def begin(page, steps: int = STEPS) -> str:
    """Start a run from the form; its id once it is shown."""
    fill(page, max_steps=steps)
    page.locator("#train-changed").get_by_text(f"{steps}").wait_for()
    before = {r.id for r in run.list_runs()}
    page.locator("#train-start").click()
    (new,) = browser.until(lambda: {r.id for r in run.list_runs()} - before)
    page.locator(".run-id", has_text=new).wait_for()
    return new


def events_for(page, place: str, kind: str) -> list[int]:
    """The events of a kind ("change", "load") whose answers go to the component with this id."""
    return page.evaluate(
        """([place, kind]) => {
            const { components, dependencies } = window.gradio_config
            const id = components.find(c => c.props.elem_id === place).id
            return dependencies.filter(d => d.outputs.includes(id) && d.targets[0][1] === kind).map(d => d.id)
        }""",
        [place, kind],
    )


def in_state(page, *states: str, step: int = 0) -> int:
    """Wait until the shown run is in one of the states and that far; its step."""
    page.wait_for_function(
        "([states, step]) => { const h = document.querySelector('.run-head');"
        " return h && states.includes(h.dataset.state) && +h.dataset.step >= step }",
        arg=[list(states), step],
    )
    return int(page.locator(".run-head").get_attribute("data-step"))


def drawn(page, plot: str = "loss") -> int:
    """How much of a line a plot has: characters of its path."""
    return page.locator(f"#plot-{plot}").evaluate(
        "e => [...e.querySelectorAll('.mark-line path')].reduce((n, p) => n + (p.getAttribute('d') || '').length, 0)"
    )


def test_a_run_from_start_to_resume(page, chromium, url):
    new = begin(page)
    first = in_state(page, "training", step=3)
    page.locator("#train-log .logs").get_by_text("Training:").first.wait_for()  # it has left the log 300 steps later
    page.locator("#plot-loss").wait_for()
    before = browser.until(lambda: drawn(page))
    in_state(page, "training", step=first + 5)
    browser.until(lambda: drawn(page) > before)  # the curve moves

    browser.reload(page)  # a reload keeps it
    browser.tab(page, "Train")
    page.locator(".run-id", has_text=new).wait_for()
    seen = in_state(page, "training", step=first)
    value_of(page, "max_steps", STEPS)

    with browser.page_of(chromium, url, height=1000) as second:  # another window sees it too
        browser.tab(second, "Train")
        second.locator(".run-id", has_text=new).wait_for()
        in_state(second, "training", step=seen)

        page.locator("#train-start").click()  # a second start is refused, with the first one's name
        toast = page.locator(".toast-body.error")
        toast.wait_for()
        assert new in toast.inner_text()

        page.locator("#train-queue").click()  # but it can wait for its turn
        page.locator(".run-message", has_text="Waiting").wait_for()
        (waiting,) = {r.id for r in run.list_runs()} - {new}
        page.locator("#train-stop").click()
        browser.until(lambda: run.find(waiting).state().terminal)
        run.find(waiting).delete()
        page.locator(".run-id", has_text=new).wait_for()  # the page lets go of it with its next tick

        second.locator("#train-stop").click()
        stopped = in_state(second, "stopped")
        assert in_state(page, "stopped") == stopped
    assert run.find(new).checkpoints(), "a stop saves"

    page.locator("#train-resume").click()
    in_state(page, "training", step=stopped + 1)
    assert "stopped" not in page.locator(".run-line").inner_text().lower()
    page.locator("#train-stop").click()
    in_state(page, "stopped")
    page.locator("#train-chat").wait_for()
    page.locator("#train-export").wait_for()

    page.locator("#train-delete").click()
    page.locator("#train-confirm").get_by_text(new).wait_for()
    page.locator("#train-delete-no").click()
    page.locator("#train-confirm").wait_for(state="hidden")
    assert run.find(new)
    page.locator("#train-delete").click()
    page.locator("#train-delete-yes").click()
    browser.until(lambda: new not in {r.id for r in run.list_runs()})
    page.locator(".run-id", has_text=new).wait_for(state="hidden")


def test_answers_that_overtake_each_other_leave_the_form_as_the_page_shows_it(page):
    length_before = page.locator("#set-max_length input").input_value()
    held = browser.hold(page, "**/queue/join*", lambda _: len(held) < 2)
    page.locator("#train-preset").get_by_text("3b", exact=True).click()
    browser.until(lambda: page.wait_for_timeout(50) or len(held) == 1)
    fill(page, max_steps=7)  # sent with the preset's name and the values of the one before
    browser.until(lambda: page.wait_for_timeout(50) or len(held) == 2)
    held[0].continue_()
    page.locator("#train-changed").get_by_text("All settings are those of preset 3b").wait_for()
    length = page.locator("#set-max_length input")
    shown = length.input_value()
    assert shown != length_before
    with page.expect_response(lambda r: r.request == held[1].request):
        held[1].continue_()
    page.locator("#train-changed").get_by_text("Changed by you").wait_for()  # late, and not what the page shows
    page.locator("#train-changed").get_by_text("All settings are those of preset 3b").wait_for()
    assert length.input_value() == shown
    page.unroute("**/queue/join*")
    page.locator("#train-preset").get_by_text("demo", exact=True).click()
    page.locator("#train-changed").get_by_text("All settings are those of preset demo").wait_for()


def test_the_form_takes_no_input_before_it_shows_what_was_kept(page):
    fill(page, max_steps=STEPS)
    page.locator("#train-changed").get_by_text(f"{STEPS}").wait_for()
    before = len(run.list_runs())
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
    page.locator("#train-changed").get_by_text("Steps at most 7").wait_for()
    assert start.inner_text() == "Start training"
    assert len(run.list_runs()) == before


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
        page.locator("#train-changed").get_by_text("Steps at most 7").wait_for()
        assert answered
    finally:
        context.close()


def test_a_run_deleted_elsewhere_does_not_take_the_buttons_along(page):
    """The picker, the head and the buttons are refreshed one after the other: each may know more than the next."""
    first, second = begin_and_stop(page), begin_and_stop(page)
    for other in (first, second):  # the picker shows the one that is picked
        browser.choose(page, "#train-run", other)
        page.locator(".run-id", has_text=other).wait_for()
    (picker,), (buttons,) = (events_for(page, place, "change") for place in ("train-run", "train-resume"))
    held = browser.hold(page, "**/run/predict*", lambda r: r.post_data_json["fn_index"] in (picker, buttons))
    run.find(second).delete()
    page.locator(".run-id", has_text=first).wait_for()
    # the picker still has the one that is gone, and what can be done is still what could be done with that one
    browser.until(
        lambda: page.wait_for_timeout(50) or {r.request.post_data_json["fn_index"] for r in held} == {picker, buttons}
    )
    browser.choose(page, "#train-run", second)
    page.locator(".toast-body.error", has_text=second).wait_for()
    assert page.locator(".run-id", has_text=first).is_visible()
    page.locator("#train-resume").click()
    in_state(page, "training", step=6)
    page.unroute("**/run/predict*")
    page.locator("#train-stop").click()
    in_state(page, "stopped")
    assert run.find(first).state().step >= 6


def begin_and_stop(page) -> str:
    new = begin(page)
    in_state(page, "training", step=2)
    page.locator("#train-stop").click()
    in_state(page, "stopped")
    return new


def test_problems_are_shown_at_once_and_nothing_starts(page):
    before = len(run.list_runs())
    fill(page, beta=-1, max_length=3)
    alert = page.locator("#train-plan [role=alert]")
    alert.get_by_text("max_length").wait_for()
    assert "beta" in alert.inner_text()
    page.locator("#train-start").click()
    page.locator(".toast-body.error").wait_for()
    page.locator("#train-start", has_text="Start training").wait_for()  # and not "Starting…" for good
    assert len(run.list_runs()) == before
    page.locator("#train-reset").click()
    page.locator("#train-plan [data-verdict]").wait_for()
    value_of(page, "beta", 0.5)


def test_a_run_to_go_on_from_that_is_deleted_is_not_replaced_unawares(page):
    earlier = begin_and_stop(page)
    browser.choose(page, "#train-adapter", earlier)
    page.locator("#train-plan [data-verdict]").wait_for()
    run.find(earlier).delete()
    alert = page.locator("#train-plan [role=alert]")
    alert.get_by_text(f"Run {earlier} has no adapter any more").wait_for()
    fill(page, beta=0.3)
    page.locator("#train-changed").get_by_text("0.3").wait_for()
    before = len(run.list_runs())
    page.locator("#train-start").click()
    page.locator(".toast-body.error", has_text="has no adapter any more").wait_for()
    assert len(run.list_runs()) == before
    browser.choose(page, "#train-adapter", "A new adapter")
    page.locator("#train-plan [data-verdict]").wait_for()


def test_html_in_a_log_is_text(page, runs_dir):
    made = run.create(config.resolve("demo", {}, origin="test"))
    log = EventLog(made.path / "events.jsonl")
    log.status("training", total_steps=2)
    log.log(EVIL)
    log.append("error", message=EVIL)
    log.status("failed", message=EVIL)
    page.locator(".run-id", has_text=made.id).wait_for()
    page.locator("#train-log .logs").get_by_text("onerror").first.wait_for()
    page.locator(".run-message").get_by_text("onerror").wait_for()
    assert page.evaluate("window.pwned") is None
    assert page.locator("#train-log img, .run-head img").count() == 0
    made.delete()


def test_the_reference_scores_on_disk_are_shown_and_cleared(page, cache):
    file = cache / "reference" / "logps.sqlite"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"x" * 2500)
    room = page.locator("#train-cache")
    room.get_by_text("Reference scores kept on disk").click()
    room.get_by_text("2.5 kB").wait_for()
    page.locator("#train-cache-clear").click()
    room.get_by_text("2.5 kB freed").wait_for()
    assert not file.exists()
