"""Runs: folders and ids, threads and processes, kills at any moment, adoption, stop, two at once."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kto_core.errors import BusyError, RunError
from kto_core.runs import folders, locks
from kto_core.runs import run as runs
from kto_core.runs.events import EventLog
from kto_core.training import start as starting
from tests.support.kills import trainer_pid
from tests.support.training import events, make_data, metrics, resolved, wait

LONG = {"max_steps": 4000, "save_steps": 3, "logging_steps": 1, "save_total_limit": 3}


pytestmark = pytest.mark.usefixtures("nothing_left")


def ended(run, seconds=60):
    return wait(lambda: (s := run.state()).terminal and not run.alive() and s, seconds)


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_create_list_find_delete(tiny, data, runs_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(data.parent)
    first = folders.create(resolved(tiny, data.name))
    assert first.path.parent == runs_dir and first.id.split("-")[2] == "demo"
    assert first.config().config.data == str(data)  # found from any working directory
    second = folders.create(resolved(tiny, data, output_dir=str(tmp_path / "here" / "mine")))
    assert second.id == "mine" and second.path == tmp_path / "here" / "mine"
    os.utime(first.path / "config.yaml", (1, 1))
    assert folders.list_runs() == [second, first]
    assert folders.find(first.id) == first and folders.find("mine") == second
    assert folders.find(str(second.path)) == second
    for wrong in ("", "..", "../x", "nowhere", str(tmp_path)):
        with pytest.raises(RunError, match="does not exist"):
            folders.find(wrong)
    assert first.state().state == "preparing" and not first.alive() and first.adapter is None
    assert first.dataset() == {} and first.checkpoints() == []
    folders.delete(second)
    assert folders.list_runs() == [first] and not second.path.exists()
    with pytest.raises(RunError, match="not a run"):
        folders.delete(runs.Run(tmp_path))


def test_new_run_moves_an_old_one_aside(tiny, data, tmp_path):
    folder = tmp_path / "out"
    run = folders.create(resolved(tiny, data, output_dir=str(folder), max_steps=1))
    starting.start(run, block=True)
    assert run.state().state == "finished" and run.adapter
    again = folders.create(resolved(tiny, data, output_dir=str(folder)))
    assert again == run and again.state().started is None
    old = next(p for p in tmp_path.iterdir() if p.name.startswith("out-before-"))
    assert (old / "adapter" / "adapter_model.safetensors").is_file()


def test_state_is_cheap_and_incremental(tiny, data):
    run = folders.create(resolved(tiny, data))
    log = EventLog(run.path / "events.jsonl")
    with locks.holding(run.path):
        for step in range(10_000):
            log.metric(step, loss=0.5)
        log.status("training", total_steps=10_000)
        assert len(run.state().metrics) == 10_000
        times = []
        for _ in range(50):
            start = time.perf_counter()
            runs.Run(run.path).state()
            times.append(time.perf_counter() - start)
        assert sorted(times)[45] < 0.005
        log.metric(10_001, loss=0.4)
        assert run.state().latest("loss") == 0.4 and len(run.state().metrics) == 10_001
    log.status("finished")
    assert run.state().state == "finished"


def test_interrupted_is_noted_once(tiny, data):
    run = folders.create(resolved(tiny, data))
    EventLog(run.path / "events.jsonl").status("training", total_steps=5)
    assert run.state().state == runs.Run(run.path).state().state == "interrupted"
    assert [e["state"] for e in events(run.path)] == ["training", "interrupted"]


# ---- in a thread -----------------------------------------------------------------------------------------------------


def test_thread_stops_saves_and_goes_on(tiny, data):
    run = folders.create(resolved(tiny, data, **LONG))
    starting.start(run)
    wait(lambda: run.state().step >= 2)
    assert folders.active() == run and run.alive()
    other = folders.create(resolved(tiny, data))
    with pytest.raises(BusyError, match=run.id):
        starting.start(other)
    with pytest.raises(BusyError, match=run.id):
        starting.resume(run)
    with pytest.raises(BusyError):
        folders.delete(run)
    run.stop()
    assert run.state().state in ("stopping", "stopped")
    state = ended(run)
    assert state.state == "stopped" and f"step {state.step} of 4,000" in state.message
    assert run.adapter and run.checkpoints()[-1].name == f"checkpoint-{state.step}"
    assert folders.active() is None
    with pytest.raises(RunError, match="is not running"):
        run.stop()

    before = state.step
    starting.resume(run)
    wait(lambda: run.state().step > before)
    run.stop()
    state = ended(run)
    steps = [m["step"] for m in state.metrics]
    assert steps == list(range(1, state.step + 1)) and state.step > before


def long_step(tiny, tmp_path, **overrides):
    """A run whose first step takes half a minute."""
    rows = make_data(tmp_path / "many.jsonl", rows=2000)
    run = folders.create(
        resolved(
            tiny, rows, **LONG | {"gradient_accumulation_steps": 1000, "precompute_ref_log_probs": False, **overrides}
        )
    )
    starting.start(run)
    assert wait(lambda: (s := run.state()).state in ("training", "failed") and s.state, 90) == "training"
    return run


def test_second_stop_does_not_wait(tiny, tmp_path):
    run = long_step(tiny, tmp_path)
    run.stop()
    run.stop()
    assert ended(run, 20).state == "stopped"
    assert run.adapter is None


def test_stop_while_preparing(tiny, data):
    run = folders.create(resolved(tiny, data, **LONG))
    starting.start(run)
    run.stop()
    assert ended(run).state == "stopped" and run.state().step <= 1


def test_finished_run_is_not_resumed_and_a_failed_one_is(tiny, data, tmp_path):
    file = tmp_path / "rows.jsonl"
    run = folders.create(resolved(tiny, file, max_steps=2))
    starting.start(run, block=True)
    assert run.state().state == "failed" and "rows.jsonl" in run.state().error
    make_data(file)
    starting.resume(run, block=True)
    assert run.state().state == "finished" and run.state().error == ""
    with pytest.raises(RunError, match="finished"):
        starting.resume(run)


# ---- in a process ----------------------------------------------------------------------------------------------------


def test_killed_process_is_interrupted_and_resumes_exactly(tiny, data, tmp_path):
    whole = folders.create(resolved(tiny, data, max_steps=100, save_steps=5))
    starting.start(whole, block=True)
    run = folders.create(resolved(tiny, data, max_steps=100, save_steps=5, worker="process"))
    rng = random.Random(7)
    starting.start(run)
    for _ in range(2):
        before = run.state().step
        wait(lambda: run.state().step > before + rng.randint(3, 8) or run.state().terminal, 90)  # noqa: B023
        os.kill(trainer_pid(run), signal.SIGKILL)
        assert ended(run).state == "interrupted"
        assert "SIGKILL" in run.state().message
        starting.resume(run)
    state = ended(run, 300)
    assert state.state == "finished", state.error
    assert metrics(run.path) == metrics(whole.path)
    assert [e["state"] for e in events(run.path) if e.get("state") in ("interrupted", "finished")][-1] == "finished"


def test_killed_while_preparing(tiny, data):
    run = folders.create(resolved(tiny, data, max_steps=2, worker="process"))
    starting.start(run)
    os.kill(wait(lambda: trainer_pid(run)), signal.SIGKILL)
    assert ended(run).state == "interrupted" and "before the first step" in run.state().message


def test_process_outlives_the_app_and_is_adopted(tiny, data):
    run = folders.create(resolved(tiny, data, **LONG | {"worker": "process"}))
    app = (
        "import sys; from kto_core.runs import folders; from kto_core.training import start; "
        "start.start(folders.find(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", app, run.id], check=True, cwd=Path(runs.__file__).parents[2])
    assert run.alive()  # at once, before the child has said anything
    wait(lambda: run.state().step >= 2, 90)
    assert folders.active() == run
    with pytest.raises(BusyError, match=run.id):
        starting.start(folders.create(resolved(tiny, data)))
    run.stop()
    state = ended(run)
    assert state.state == "stopped" and run.adapter
    assert sum(e.get("state") == "stopping" for e in events(run.path)) == 1


def test_process_second_stop(tiny, tmp_path):
    run = long_step(tiny, tmp_path, worker="process")
    run.stop()
    run.stop()
    assert ended(run, 20).state == "stopped"


def test_broken_config_is_said(tiny, data):
    run = folders.create(resolved(tiny, data, worker="process"))
    worker = [sys.executable, "-m", "kto_core.worker", str(run.path)]
    text = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(text.replace("beta: 0.5", "beta: -1"))
    done = subprocess.run(worker, cwd=Path(runs.__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert run.state().state == "failed" and "beta" in run.state().error
    json.dumps(run.state().message)


def test_a_folder_with_files_of_its_own_does_not_become_a_run(tiny_model, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="not part of a run"):
        folders.create(resolved(tiny_model, "x.jsonl", output_dir=str(home)))
    assert [p.name for p in home.iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    assert folders.create(resolved(tiny_model, "x.jsonl", output_dir=str(tmp_path / "empty"))).path.is_dir()


def test_two_starts_at_once_are_one(tiny_model, tmp_path, monkeypatch):
    began = []

    def worker(run, config):
        began.append(run)
        thread = threading.Thread(target=lambda: None)
        thread.start()
        return thread

    monkeypatch.setattr(starting, "in_thread", worker)
    two = [folders.create(resolved(tiny_model, "x.jsonl")) for _ in range(2)]
    gate, refused = threading.Barrier(2), []

    def start(run):
        gate.wait()
        try:
            starting.start(run)
        except BusyError as e:
            refused.append(e)

    threads = [threading.Thread(target=start, args=(run,)) for run in two]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(began) == 1 and len(refused) == 1
    locks.release(began[0].path)


def test_many_stops_at_once(tiny_model, tmp_path):
    run = folders.create(resolved(tiny_model, "x.jsonl"))
    locks.acquire(run.path, run.id)
    failed = []

    def press():
        for _ in range(30):
            try:
                run.stop()
            except Exception as e:
                failed.append(e)

    threads = [threading.Thread(target=press) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed and (run.path / "stop").read_text() == "now" and not list(run.path.glob("*.part"))
    locks.release(run.path)


def test_a_run_that_is_exported_is_not_deleted(tiny_model):
    from kto_core.runs.locks import only_one

    run = folders.create(resolved(tiny_model, "x.jsonl"))
    with only_one(run), pytest.raises(BusyError, match="being exported"):
        folders.delete(run)
    assert run.path.is_dir() and not run.alive()
    folders.delete(run)
    assert not run.path.exists()
