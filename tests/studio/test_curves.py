"""The drawing of curves: what a picture has in it, at which step it ends, what a zoom does, how numbers read."""

import json
import re
from html import unescape

import pytest

from kto_core.config import resolving
from kto_core.runs import folders
from kto_core.runs.events import EventLog, fold
from kto_studio.shared import curves, live, views
from kto_studio.train import curves_view

EVIL = "<img src=x onerror=alert(1)>"


def state(*events):
    return fold([{"t": 1.0, **e} for e in events])


def metrics(steps: int, **more) -> list[dict]:
    return [{"kind": "metric", "step": s, "loss": 0.5 - s / 1e5, **more} for s in range(1, steps + 1)]


def told(shown: str, plot: str) -> dict:
    (found,) = re.findall(rf'id="{plot}" data-curve="([^"]*)"', shown)
    return json.loads(unescape(found))


def test_a_curve_is_whole_in_the_html_and_ends_at_the_last_step():
    """Nothing is left for the page to load, measure or mount: what it got, it shows."""
    shown = curves.view(curves_view.made(state(*metrics(7))))
    assert told(shown, "plot-loss")["lines"][0][2] == [1, 2, 3, 4, 5, 6, 7]
    (line,) = re.findall(r'class="curve-line" d="([^"]+)"', shown)
    assert line.startswith("M0 ") and line.count("L") == 6 and line.split("L")[-1].startswith("1000 ")
    assert "plot-kl" not in shown and curves.view(curves_view.made(state())) == ""


def test_one_point_is_seen_and_validation_rows_are_dots():
    shown = curves.view(curves_view.made(state(*metrics(1, eval_loss=0.25))))
    dots = re.findall(r'class="curve-dots" d="([^"]+)" stroke="([^"]+)"', shown)
    assert [color for _, color in dots] == [views.COLORS["training"], views.COLORS["validation"]]
    assert "validation <b>0.25</b>" in shown


def test_curves_are_thinned_and_keep_their_ends():
    many = state(*({"kind": "metric", "step": s, "loss": 1.0, "eval_loss": 2.0} for s in range(5000)))
    shown = told(curves.view(curves_view.made(many)), "plot-loss")
    for line in shown["lines"]:
        assert len(line[2]) == views.POINTS and line[2][0] == 0 and line[2][-1] == 4999


def test_a_zoom_shows_every_point_of_its_range_and_is_the_runs_own():
    run = folders.create(resolving.resolve("demo", {}, origin="test"))
    log = EventLog(run.path / "events.jsonl")
    for step in range(1, 5001):
        log.metric(step, loss=1 / step)
    live.forget()
    whole, zoom = curves_view.key(run), {"run": run.id, "range": [100.0, 200.0]}
    assert curves_view.key(run, zoom) != whole
    (shown,) = curves_view.values(run, zoom)
    places = told(shown, "plot-loss")["lines"][0][2]
    assert places == list(range(99, 202)), "all of them, and one beyond each border"
    assert told(shown, "plot-loss")["range"] == [100.0, 200.0] and "Reset zoom" in shown
    for other in (None, {"run": "another", "range": [100.0, 200.0]}, {"run": run.id, "range": None}):
        assert curves_view.key(run, other) == whole and curves_view.values(run, other) == curves_view.values(run)
    beyond = curves_view.values(run, {"run": run.id, "range": [9000.0, 9001.0]})
    assert beyond == curves_view.values(run), "a range without a line is no picture"


def test_numbers_that_are_none_are_left_out():
    points = [(1, float("nan")), (2, 0.5), (3, float("inf")), (4, 1e300), (5, -1e300), (6, 0.25)]
    shown = curves.view([curves.Curve("c", EVIL, [curves.Line(EVIL, "red", points)], x=EVIL)])
    assert told(shown, "c")["lines"][0][2] == [2, 6] and EVIL not in shown
    assert 'id="c"' in curves.view([curves.Curve("c", "t", [curves.Line("l", "red", [(1, float("nan"))])])])


def test_an_axis_does_not_magnify_rounding_and_tells_its_numbers_apart():
    flat = told_axis([(1, 0.49999), (2, 0.500002), (3, 0.49999)])
    assert len(set(flat)) == len(flat) and all(len(text) <= 6 for text in flat)
    assert told_axis([(1, 0.0), (2, 0.0)])[0] == "0", "all zero: from 0"
    for points in ([(1, -3.2), (2, 4.1)], [(1, 1e-5), (2, 3e-5)], [(1, 12_000), (2, 90_000)]):
        found = told_axis(points)
        assert 3 <= len(set(found)) == len(found) <= 7, found


def told_axis(points) -> list[str]:
    shown = curves.view([curves.Curve("c", "t", [curves.Line("l", "red", points)])])
    return re.findall(r'style="top:[^"]+">([^<]+)<', shown)[::1]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.43214, "0.4321"),
        (12.3456, "12.35"),
        (1204.4, "1,204"),
        (2.5e-5, "2.5e-5"),
        (-0.0, "0"),
        (0.0, "0"),
        (1e-4, "1e-4"),
        (-1.921, "-1.921"),
    ],
)
def test_numbers_read_as_one_writes_them(value, text):
    assert curves.number(value) == text


def test_tiles_have_no_sign_before_nothing():
    shown = views.tiles(state({"kind": "metric", "step": 1, "loss": 0.5, "rewards/margins": -1e-9, "kl": -0.0,
                               "learning_rate": 0.0, "eval_loss": 0.3}))  # fmt: skip
    assert "-0" not in shown and "e+00" not in shown and "Val. loss" in shown


def test_rounding_in_a_reward_is_no_curve():
    """KL of 2e-7 at the first step: the axis keeps a size that means something."""
    ran = state(*({"kind": "metric", "step": i + 1, "loss": 0.5, "kl": kl} for i, kl in enumerate([2.4e-7, 0.0, 0.0])))
    (kl,) = (c for c in curves_view.made(ran) if c.id == "plot-kl")
    axis = re.findall(r'style="top:[^"]+">([^<]+)<', curves.view([kl]))
    assert axis and not any("e-" in text for text in axis), axis
