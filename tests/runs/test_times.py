"""How long a run took: its work over stops and resumes, whatever the clock of the machine did meanwhile."""

import json
import re
import time

import pytest

from kto_core.runs import folders
from kto_core.runs import log as run_log
from kto_core.runs.events import EventLog, fold, state_of
from kto_core.training import start as starting
from kto_studio.shared import views
from tests.support.training import events as events_of
from tests.support.training import resolved, wait

DAY = 86_400


def status(t, clock, state, message="", **more):
    return {"t": t, "clock": clock, "kind": "status", "state": state, "message": message, **more}


def metric(t, clock, step):
    return {"t": t, "clock": clock, "kind": "metric", "step": step, "loss": 0.5}


def begin(t, clock):
    return status(t, clock, "preparing", "Starting.", gap=True)


def run_of(shift=lambda t: t):
    """Works 100 s, waits 1,000 s stopped, works 60 s and is killed, is noticed 5,000 s later, works 40 s."""
    found = [
        begin(0, 0), status(10, 10, "training", total_steps=3), metric(50, 50, 1), status(100, 100, "stopped"),
        begin(1100, 1100), status(1110, 1110, "training", resumed_from=1), metric(1160, 1160, 2),
        status(6160, 6160, "interrupted"),
        begin(6200, 6200), status(6210, 6210, "training", resumed_from=2), metric(6230, 6230, 3),
        status(6240, 6240, "finished"),
    ]  # fmt: skip
    return [e | {"t": 1.7e9 + shift(e["t"])} for e in found]


SHIFTS = {
    "a clock that is right": lambda t: t,
    "400 days on": lambda t: t + 400 * DAY * (t > 1120),
    "a year back": lambda t: t - 365 * DAY * (t > 20),
    "to and fro": lambda t: t + DAY * (-1) ** int(t / 50),
}


@pytest.mark.parametrize("name", SHIFTS)
def test_the_work_is_counted_and_the_log_stays_in_order(name):
    found = fold(run_of(SHIFTS[name]))
    assert found.seconds == 200
    assert "took 3 min 20 s" in views.head("r", found)
    texts = [text for _, _, text in run_log.lines(found, 100)[0]]
    assert [t for t in texts if t.startswith("step")] == [f"step {i}/3  loss 0.5000" for i in (1, 2, 3)]
    shown = views.logs(found)
    places = [shown.index(f"step {i}/3") for i in (1, 2, 3)]
    assert places == sorted(places)


def test_an_earlier_versions_events_are_counted_by_the_time_of_day():
    old = [{k: v for k, v in e.items() if k not in ("clock", "gap")} for e in run_of()]
    assert fold(old).seconds == 200
    jumped = [{k: v for k, v in e.items() if k not in ("clock", "gap")} for e in run_of(SHIFTS["400 days on"])]
    assert 150 <= fold(jumped).seconds <= 200, "the stretch with the jump is not known"
    back = [{k: v for k, v in e.items() if k not in ("clock", "gap")} for e in run_of(SHIFTS["a year back"])]
    assert 150 <= fold(back).seconds <= 200


def test_waiting_for_another_run_is_no_work():
    found = fold([
        begin(1e9, 0), status(1e9, 1, "preparing", "Waiting: run x comes first."),
        status(1e9, 500, "preparing", "Waiting: run y comes first."), begin(1e9, 900),
        status(1e9, 910, "training", "Training."), status(1e9, 930, "finished"),
    ])  # fmt: skip
    assert found.seconds == 31


def test_a_machine_that_was_started_again():
    """Its clock begins anew; what was before was killed by that."""
    found = fold([begin(1e9, 50_000), metric(1e9, 50_100, 1), begin(1e9, 20), metric(1e9, 90, 2)])
    assert found.seconds == 170
    assert fold([begin(1e9, 50_000), metric(1e9, 50_100, 1), metric(1e9, 90, 2)]).seconds == 100


def test_an_error_that_is_told_later_is_no_work():
    log = [begin(1e9, 0), metric(1e9, 60, 1), {"t": 1e9, "clock": 9999, "kind": "error", "message": "x", "gap": True},
           status(1e9, 9999, "failed", "x", gap=True)]  # fmt: skip
    assert fold(log).seconds == 60 and fold(log).error == "x"


def test_events_have_the_clock_and_metrics_do_not(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    before = time.monotonic()
    log.begin()
    log.metric(1, loss=0.5)
    log.append("used", engine="trl")
    for e in events_of(tmp_path):
        assert before - 0.01 <= e["clock"] <= time.monotonic() + 0.01
    found = state_of(log.path)
    assert set(found.metrics[0]) == {"t", "step", "loss"} and found.used == {"engine": "trl"}


def test_finished_says_the_whole_runs_time_as_the_head_does(tiny, data):
    """Stopped, left alone, and resumed: message, head and events agree, and the pause is not in it."""
    run = folders.create(resolved(tiny, data, max_steps=3000, save_steps=3, logging_steps=1))
    starting.start(run)
    wait(lambda: run.state().step >= 2)
    run.stop()
    wait(lambda: run.state().terminal and not run.alive())
    first = run.state().seconds
    assert first > 0
    time.sleep(3)
    text = (run.path / "config.yaml").read_text().replace("max_steps: 3000", f"max_steps: {run.state().step + 2}")
    (run.path / "config.yaml").write_text(text)
    lines = events_of(run.path)
    starts = max(i for i, e in enumerate(lines) if e.get("gap"))
    for e in lines[: starts + 1]:  # as if that stretch had taken ten minutes more
        e["clock"] -= 600
    del lines[-1]["seconds"]
    (run.path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines))
    began = time.monotonic()
    starting.resume(run, block=True)
    state = run.state()
    assert state.state == "finished", state.error
    assert first + 600 <= state.seconds <= first + 600 + (time.monotonic() - began) + 1  # the pause had three
    (said,) = re.findall(r"Finished: [\d,]+ steps in (.*?);", state.message)
    assert f"took {said}" in views.head(run.id, state) and said.startswith("10 min")
