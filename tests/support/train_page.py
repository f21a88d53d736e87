"""The Train tab of the whole app in a browser, with a model that trains in a blink: fixtures, and what a user does."""

import pytest

from kto_core.runs import folders
from tests.support import browser
from tests.support.training import make_data, tiny_cache

DATA = "sums.jsonl"
STEPS = 20_000  # never reached


@pytest.fixture(scope="module")
def cache(tmp_path_factory, demo_model):
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
    if (left := folders.active()) is not None:  # a test that failed: its run would slow down the others
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
    before = {r.id for r in folders.list_runs()}
    page.locator("#train-start").click()
    (new,) = browser.until(lambda: {r.id for r in folders.list_runs()} - before)
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
    """The points that a plot's first line has, 0 where nothing is drawn."""
    return page.evaluate(
        "id => (document.querySelector(`#${id} .curve-line`)?.getAttribute('d').match(/[ML]/g) ?? []).length",
        f"plot-{plot}",
    )


def last_step(page, plot: str = "loss") -> int:
    """The step that a plot ends with, 0 where nothing is drawn."""
    return page.evaluate(
        "id => JSON.parse(document.getElementById(id)?.dataset.curve ?? '{\"lines\":[[0,0,[0]]]}').lines[0][2].at(-1)",
        f"plot-{plot}",
    )
