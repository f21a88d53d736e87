"""Runs in the Train tab, in a real browser, with a model that trains in a blink: start, curve, reload, stop, resume."""

from kto_core.config import resolving
from kto_core.runs import folders, rates
from kto_core.runs.events import EventLog
from tests.support import browser
from tests.support.train_page import (  # noqa: F401 (fixtures)
    STEPS,
    begin,
    cache,
    chromium,
    drawn,
    events_for,
    fill,
    home,
    in_state,
    page,
    runs_dir,
    url,
    value_of,
)

EVIL = '<img src="http://127.0.0.1:9/x.png" onerror="window.pwned=1"><script>window.pwned=1</script>'


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
        (waiting,) = {r.id for r in folders.list_runs()} - {new}
        page.locator("#train-stop").click()
        browser.until(lambda: folders.find(waiting).state().terminal)
        folders.delete(folders.find(waiting))
        page.locator(".run-id", has_text=new).wait_for()  # the page lets go of it with its next tick

        second.locator("#train-stop").click()
        in_state(second, "stopped")
        in_state(page, "stopped")
        stopped = browser.until(  # each window with a tick of its own
            lambda: (step := in_state(page, "stopped")) == in_state(second, "stopped") and step
        )
    assert folders.find(new).checkpoints(), "a stop saves"

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
    assert folders.find(new)
    page.locator("#train-delete").click()
    page.locator("#train-delete-yes").click()
    browser.until(lambda: new not in {r.id for r in folders.list_runs()})
    page.locator(".run-id", has_text=new).wait_for(state="hidden")


def test_a_run_deleted_elsewhere_does_not_take_the_buttons_along(page):
    """The picker, the head and the buttons are refreshed one after the other: each may know more than the next."""
    first, second = begin_and_stop(page), begin_and_stop(page)
    for other in (first, second):  # the picker shows the one that is picked
        browser.choose(page, "#train-run", other)
        page.locator(".run-id", has_text=other).wait_for()
    (picker,), (buttons,) = (events_for(page, place, "change") for place in ("train-run", "train-resume"))
    held = browser.hold(page, "**/run/predict*", lambda r: r.post_data_json["fn_index"] in (picker, buttons))
    folders.delete(folders.find(second))
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
    assert folders.find(first).state().step >= 6


def begin_and_stop(page) -> str:
    new = begin(page)
    in_state(page, "training", step=2)
    page.locator("#train-stop").click()
    in_state(page, "stopped")
    return new


def test_a_run_to_go_on_from_that_is_deleted_is_not_replaced_unawares(page):
    earlier = begin_and_stop(page)
    browser.choose(page, "#train-adapter", earlier)
    page.locator("#train-plan [data-verdict]").wait_for()
    folders.delete(folders.find(earlier))
    alert = page.locator("#train-plan [role=alert]")
    alert.get_by_text(f"The adapter of run {earlier} no longer exists").wait_for()
    fill(page, beta=0.3)
    page.locator("#train-changed").get_by_text("0.3").wait_for()
    before = len(folders.list_runs())
    page.locator("#train-start").click()
    page.locator(".toast-body.error", has_text="no longer exists").wait_for()
    assert len(folders.list_runs()) == before
    browser.choose(page, "#train-adapter", "A new adapter")
    page.locator("#train-plan [data-verdict]").wait_for()


def test_html_in_a_log_is_text(page, runs_dir):
    made = folders.create(resolving.resolve("demo", {}, origin="test"))
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
    folders.delete(made)


def test_the_reference_scores_on_disk_are_shown_and_cleared(page, cache):
    file = cache / "reference" / "logps.sqlite"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"x" * 2500)
    room = page.locator("#train-cache")
    room.get_by_text("Reference log-prob cache").click()
    room.get_by_text("2.5 kB").wait_for()
    page.locator("#train-cache-clear").click()
    room.get_by_text("2.5 kB freed").wait_for()
    assert not file.exists()


def test_a_rate_is_chosen_or_typed_and_its_trials_are_shown(page, runs_dir):
    rate = page.locator("#set-learning_rate input")
    rate.click()
    page.get_by_role("option", name="5e-7, the earlier tool's rate").click()
    page.locator("#train-plan").get_by_text("change almost nothing; auto would take").wait_for()
    rate.fill("3e-4")
    rate.press("Enter")
    page.locator("#train-changed").get_by_text("3e-4").wait_for()
    run = folders.create(resolving.resolve("demo", {"data": "x.jsonl"}))
    EventLog(run.path / "events.jsonl").status("finished", message="Done.")
    trials = tuple(rates.Trial(r, loss, (loss,)) for r, loss in ((9e-5, 0.45), (2.9e-4, 0.41), (9.2e-4, 0.48)))
    rates.write(run.path, rates.Found(2.9e-4, "trials", "Because.", steps=10, rows=64, trials=trials))
    page.locator(".run-id", has_text=run.id).wait_for()
    page.locator("#train-rate-table tr.mine").get_by_text("2.9e-4").wait_for()
    browser.until(lambda: drawn(page, "rate"))
    folders.delete(run)


def test_what_the_numbers_mean_stands_under_the_plots(page, runs_dir):
    run = folders.create(resolving.resolve("demo", {"data": "x.jsonl", "learning_rate": 0.01}))
    log = EventLog(run.path / "events.jsonl")
    log.status("training", total_steps=20)
    for step in range(1, 21):
        log.metric(step, loss=0.4, kl=0.0, **{"rewards/chosen": -step, "rewards/rejected": -1.2 * step})
    log.status("finished")
    page.locator(".run-id", has_text=run.id).wait_for()
    line = page.locator("#train-health [data-kind=large]")
    line.get_by_text("it drifts").wait_for()
    plots, health = page.locator("#train-plots").bounding_box(), page.locator("#train-health").bounding_box()
    assert health["y"] >= plots["y"] + plots["height"] - 1
    folders.delete(run)
