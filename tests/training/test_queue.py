"""A second run: refused with the first one's name, or it waits for its turn. The app that dies and comes back."""

import os
import signal
import subprocess
import sys

import pytest

from kto_core.errors import BusyError
from kto_core.runs import folders
from kto_core.runs import run as runs
from kto_core.training import start as starting
from tests.support.kills import ROOT, trainer_pid
from tests.support.training import events, resolved, wait

LONG = {"max_steps": 4000, "save_steps": 5, "logging_steps": 1, "save_total_limit": 2}
PATIENCE = 200


pytestmark = pytest.mark.usefixtures("nothing_left")


def ended(run):
    return wait(lambda: (s := run.state()).terminal and not run.alive() and s, PATIENCE)


def test_second_run_waits_for_the_first(tiny, data):
    first, second, third = (
        folders.create(resolved(tiny, data, run_name=n, **o))
        for n, o in (("a", LONG), ("b", {"max_steps": 1}), ("c", {"max_steps": 1}))
    )
    starting.start(first)
    with pytest.raises(BusyError, match=first.id):
        starting.start(second)
    starting.start(second, queue=True)
    starting.start(third, queue=True)
    for run, before in ((second, first), (third, first)):
        wait(lambda: before.id in run.state().message)  # noqa: B023
        assert run.state().state == "preparing" and run.alive() and runs.waiting_since(run.path)
    assert folders.active() == first
    with pytest.raises(BusyError):  # once is enough
        starting.start(second, queue=True)
    with pytest.raises(BusyError, match=first.id):
        starting.start(folders.create(resolved(tiny, data)))

    third.stop()  # it never began
    assert ended(third).state == "stopped" and "before it started" in third.state().message
    wait(lambda: first.state().step >= 1, PATIENCE)
    first.stop()
    assert ended(first).state == "stopped"
    assert ended(second).state == "finished", second.state().error
    assert runs.waiting_since(second.path) is None
    stopped = next(e["t"] for e in events(first.path) if e.get("state") == "stopped")
    assert stopped <= next(e["t"] for e in events(second.path) if e.get("state") == "training")
    starting.resume(third, block=True)
    assert third.state().state == "finished"


APP = """
import sys, time
from kto_core.runs import folders; from kto_core.training import start
start.start(folders.find(sys.argv[1]))
if len(sys.argv) > 2:
    start.start(folders.find(sys.argv[2]), queue=True)
print("started", flush=True)
time.sleep(600)
"""


def app(*found):
    """A process that starts runs, as the app does, and lives until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", APP, *(r.id for r in found)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    if process.stdout.readline() != "started\n":
        process.kill()
        raise AssertionError("it did not start")
    return process


def test_app_is_killed_with_a_thread(tiny, data):
    run, waiting = folders.create(resolved(tiny, data, **LONG)), folders.create(resolved(tiny, data, max_steps=1))
    process = app(run, waiting)
    try:
        wait(lambda: run.state().step >= 6 and run.checkpoints(), PATIENCE)
        assert waiting.state().state == "preparing" and run.id in waiting.state().message
    finally:
        process.kill()
        process.wait()
    state = wait(lambda: (s := run.state()).terminal and s)
    assert state.state == "interrupted" and f"after step {state.step}" in state.message
    assert waiting.state().state == "interrupted" and folders.active() is None
    before = state.step
    starting.resume(run)
    wait(lambda: run.state().step > before, PATIENCE)
    run.stop()
    assert ended(run).state == "stopped"
    assert [m["step"] for m in run.state().metrics] == list(range(1, run.state().step + 1))
    starting.resume(waiting, block=True)
    assert waiting.state().state == "finished"


def test_app_is_killed_with_a_process(tiny, data):
    run = folders.create(resolved(tiny, data, **LONG | {"worker": "process"}))
    process = app(run)
    try:
        pid = wait(lambda: trainer_pid(run))
        wait(lambda: run.state().step >= 2, PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert run.alive() and folders.active() == run and trainer_pid(run) == pid
    step = run.state().step
    wait(lambda: run.state().step > step)
    other = folders.create(resolved(tiny, data, max_steps=1))
    starting.start(other, queue=True)
    run.stop()
    state = ended(run)
    assert state.state == "stopped" and f"step {state.step} of" in state.message and run.adapter
    assert ended(other).state == "finished"

    starting.resume(run)  # and now without a supervisor: the app dies, then the training
    step = state.step
    wait(lambda: run.state().step > step, PATIENCE)
    os.kill(trainer_pid(run), signal.SIGKILL)
    assert ended(run).state == "interrupted"
