"""A run on several processes as `run_workers` starts it: who ends it, what is said of it.

With gloo on the CPU; ``KTO_TESTS_CARDS=1 python -m pytest tests/test_ranks.py`` with NCCL on two cards.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kto_core.runs import folders, locks, ranks
from kto_core.runs import run as runs
from kto_core.runs.events import EventLog, read
from kto_core.training import start as starting
from kto_core.training import workers
from tests.support.training import PLACE, events, make_data, resolved, wait

ROOT = Path(__file__).resolve().parents[2]
GONE = 20.0  # seconds; torch's timeout for a silent process is half an hour

# what goes wrong in which process, put into the children through sitecustomize.py
IN_STEP_TWO = """
from kto_core.training import callbacks
from kto_core.errors import ModelError
real = callbacks.RunCallback.on_step_end
def on_step_end(self, args, state, control, **_):
    if state.global_step == 2:
        {what}
    real(self, args, state, control)
callbacks.RunCallback.on_step_end = on_step_end
"""
STUCK = """
import threading
def waits(*args, **kwargs):
    threading.Event().wait()  # as in a collective that nobody else comes to
import kto_core.training.train
kto_core.training.train.plan_data = waits
"""
CPU_ZERO = """
import torch
torch.serialization.register_package(5, lambda storage: None, lambda storage, to: storage if to == 'cpu:0' else None)
"""
LATE = """
from kto_core.training import callbacks; from kto_core.runs import stopping
look, begin = stopping.StopWatch.look, callbacks.RunCallback.on_train_begin
def on_train_begin(self, *args, **kwargs):
    stopping.StopWatch.look = look
    begin(self, *args, **kwargs)
stopping.StopWatch.look, callbacks.RunCallback.on_train_begin = lambda self: False, on_train_begin
"""


@pytest.fixture
def two(tmp_path, tiny_model, monkeypatch):
    """Makes runs, and starts them on two processes of this machine; nothing of them is left afterwards."""
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("KTO_STUDIO_CACHE", str(tmp_path / "cache"))
    data, made = make_data(tmp_path / "rows.jsonl", 32), []

    def start(rank="", trouble="", stop=False, again=None, **config):
        run = again or folders.create(resolved(tiny_model, data, **{"logging_steps": 1, "engine": "packed", **config}))
        made.append(run)
        if trouble:
            lines = "".join(f"    {line}\n" for line in trouble.splitlines())
            (tmp_path / "sitecustomize.py").write_text(
                f"import os\nif '{rank}' in os.environ.get('RANK', ' '):\n{lines}"
            )
            monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        locks.acquire(run.path)
        EventLog(run.path / "events.jsonl").status("preparing")
        if stop:
            (run.path / "stop").touch()
        workers.in_process(run, run.config().config.model_copy(update={"num_gpus": 2}))
        return run

    yield start
    for run in made:
        for pid in processes(run):
            os.kill(pid, signal.SIGKILL)
        wait(lambda: not processes(run) and not locks.supervised(run.path))  # noqa: B023


def processes(run, word="") -> list[int]:
    """The launcher and its workers: they have the run's folder in their command line."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            if str(run.path).encode() in words and (not word or word.encode() in words) and not zombie:
                found.append(int(folder.name))
    return found


def launcher(run) -> int:
    return wait(lambda: processes(run, "accelerate.commands.launch"))[0]


def ended(run, seconds=120.0):
    """Its state, once there is no process left and its supervisor has looked."""
    wait(lambda: not processes(run) and not locks.supervised(run.path), seconds)
    return run.state()


def states(run) -> list[str]:
    return [e["state"] for e in events(run.path) if e["kind"] == "status"]


LONG = {"max_steps": 5000, "save_steps": 2, "save_total_limit": 2}


def test_cards_are_numbered_as_nvml_numbers_them():
    """Unless somebody has chosen otherwise; it must stand before CUDA is first looked at."""
    code = "import kto_core, os, sys; assert 'torch' not in sys.modules; print(os.environ['CUDA_DEVICE_ORDER'])"
    env = {k: v for k, v in os.environ.items() if k != "CUDA_DEVICE_ORDER"}
    for chosen in ({}, {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}):
        done = subprocess.run([sys.executable, "-c", code], env=env | chosen, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.strip() == chosen.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID"), done.stderr


# ---- who ends it -----------------------------------------------------------------------------------------------------


def test_workers_die_with_their_launcher(two):
    run = two(**LONG)
    wait(lambda: run.state().step >= 2, 120)
    assert len(processes(run)) == 3
    os.kill(launcher(run), signal.SIGKILL)
    state = ended(run, 10)
    assert state.state == "interrupted" and "SIGKILL" in state.message and not run.alive()


def test_a_worker_whose_launcher_died_before_it_began_ends(tmp_path, tiny_model):
    run = folders.create(resolved(tiny_model, make_data(tmp_path / "rows.jsonl"), max_steps=1))
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "kto_core.worker", str(run.path), "--lock-fd", "-1"]
    assert subprocess.run(command, env=env, timeout=60).returncode == 1  # its parent is no launcher
    assert events(run.path) == []


def test_second_stop_leaves_no_process(two):
    run = two(**LONG)
    wait(lambda: run.state().step >= 1, 120)
    run.stop()
    run.stop()
    assert ended(run, GONE).state == "stopped"


# ---- stopping before the first step ----------------------------------------------------------------------------------


def test_stopped_before_the_first_step(two):
    run = two(stop=True)
    assert ended(run).state == "stopped"
    assert "failed" not in states(run) and not [e for e in events(run.path) if e["kind"] == "error"]
    assert "ChildFailedError" not in (run.path / "worker.log").read_text()


def test_a_helper_that_waits_for_the_main_process_ends_with_it(two):
    run = two(rank=1, trouble=STUCK)
    wait(lambda: (run.path / "rank-1.log").exists() or len(processes(run)) == 3, 60)
    (run.path / "stop").touch()
    wait(lambda: states(run)[-1] == "stopped", 120)
    assert ended(run, GONE).state == "stopped"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # `leave`'s SystemExit
@pytest.mark.parametrize(("before", "ends"), [(60.0, True), (-60.0, False)])
def test_a_process_that_begins_when_all_is_over_ends(tmp_path, monkeypatch, before, ends):
    """Unless what is over was another start, before its launcher began."""
    log = EventLog(tmp_path / "events.jsonl")
    log.status("preparing")
    log.status("stopped")
    left = threading.Event()

    def leave(code):
        left.set()
        raise SystemExit

    monkeypatch.setattr(ranks.os, "_exit", leave)
    monkeypatch.setattr(ranks, "PATIENCE", 0.0)
    monkeypatch.setattr(ranks, "launched", lambda: time.time() - before)
    ranks.end_with_main(tmp_path)
    assert left.wait(3) == ends


def test_no_process_leaves_while_the_main_one_has_not_seen_the_stop(two):
    """It would wait for the other in its next collective."""
    run = two(rank=0, trouble=LATE, stop=True, **LONG)
    assert ended(run, 150).state == "stopped" and "failed" not in states(run)


def test_stop_after_a_step_ends_all(two):
    run = two(**LONG)
    wait(lambda: run.state().step >= 1, 120)
    run.stop()
    state = ended(run)
    assert state.state == "stopped" and run.adapter and "failed" not in states(run)


# ---- what is said of it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("raise ModelError('Number two is ill. Call a doctor.')", "Number two is ill. Call a doctor."),
        ("raise ZeroDivisionError('by naught')", "Unexpected ZeroDivisionError on GPU 1: by naught."),
    ],
)
def test_an_error_of_another_rank_is_the_runs(two, what, said):
    run = two(rank=1, trouble=IN_STEP_TWO.format(what=what), max_steps=6)
    state = ended(run)
    assert state.state == "failed" and state.message.startswith(said) and state.error == state.message
    assert [s for s in states(run) if s == "failed"] == ["failed"]
    (run.path / "stop").unlink(missing_ok=True)
    ranks.forget_errors(run.path)
    assert not list(run.path.glob("*.error*"))


def test_an_error_of_the_main_process_stays_its_own(two):
    run = two(rank=0, trouble=IN_STEP_TWO.format(what="raise ModelError('Number one is ill.')"), max_steps=6)
    state = ended(run)
    assert state.state == "failed" and state.message == "Number one is ill."


def test_the_main_process_does_not_wait_for_one_that_has_failed(two):
    """As in NCCL, which tells it nothing; the launcher would wait half a minute."""
    waits = "import threading; os.environ['RANK'] == '1' or threading.Event().wait()"
    run = two(trouble=IN_STEP_TWO.format(what=f"{waits}; raise ModelError('Number two is ill.')"), max_steps=6)
    wait(lambda: ranks.first_error(run.path), 120)
    state = ended(run, GONE)
    assert state.state == "failed" and state.message == "Number two is ill."


def test_a_killed_rank_is_said(two):
    run = two(rank=1, trouble=IN_STEP_TWO.format(what="os.kill(os.getpid(), 9)"), max_steps=6)
    state = ended(run)
    if PLACE:  # gloo tells the main process that the other is gone
        assert state.state == "failed" and "ended without an error message" in state.message
    else:  # in NCCL it waits, until the launcher ends it
        assert state.state == "interrupted" and "SIGKILL" in state.message
    run = two(rank=0, trouble=IN_STEP_TWO.format(what="os.kill(os.getpid(), 9)"), max_steps=6)
    state = ended(run)
    assert state.state == "interrupted" and "SIGKILL" in state.message and "after step" in state.message


LOG = """RuntimeError: an earlier line
ValueError: the last word of a worker
W1125 23:16:09.1 18 torch/distributed/elastic/multiprocessing/api.py:999] Sending process 9 closing signal SIGTERM
E1125 23:16:09.657000 18761 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1) local_rank: 0
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
  rank      : 0 (local_rank: 0)
  exitcode  : {code} (pid: 18911)
============================================================
"""


def test_the_ending_is_the_workers_word(tmp_path, tiny_model):
    run = folders.create(resolved(tiny_model, make_data(tmp_path / "rows.jsonl")))
    (run.path / "worker.log").write_text("an earlier attempt\n" + LOG.format(code=1))
    assert "the last word of a worker" in workers._ending(1, run)
    assert "no message" in workers._ending(1, run, (run.path / "worker.log").stat().st_size)
    (run.path / "worker.log").write_text(LOG.format(code=-9))
    assert "SIGKILL" in workers._ending(1, run)


def test_what_a_helper_left_is_told_when_the_main_process_could_not(tmp_path, tiny_model, monkeypatch):
    run = folders.create(resolved(tiny_model, make_data(tmp_path / "rows.jsonl"), max_steps=1))
    EventLog(run.path / "events.jsonl").status("training", total_steps=5)
    for rank in ("2", "1"):  # the first to fail is the cause
        monkeypatch.setenv("RANK", rank)
        ranks.note_error(run.path, f"GPU {rank} ran out of memory.")
        os.utime(run.path / f"rank-{rank}.error", (9 - int(rank), 9 - int(rank)))
    monkeypatch.delenv("RANK")
    assert run.state().state == "failed" and run.state().error == "GPU 2 ran out of memory."
    starting.resume(run, block=True)
    assert run.state().state == "finished" and ranks.first_error(run.path) == ""


# ---- resumed ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_logs_the_same_loss(two, tmp_path):
    """TRL's loss differs between the ranks: half-averaged, each must go on with what sums to the same mean."""
    run = two(max_steps=3, save_steps=2, logging_steps=3, engine="trl")
    whole = ended(run)
    assert whole.state == "finished", whole.error
    again = runs.Run(tmp_path / "again")
    (again.path / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "dataset.json"):
        shutil.copy(run.path / name, again.path / name)
    shutil.copytree(run.path / "checkpoints" / "checkpoint-2", again.path / "checkpoints" / "checkpoint-2")
    two(again=again, trouble=CPU_ZERO)
    resumed = ended(again)
    assert resumed.state == "finished", resumed.error
    assert resumed.latest("loss") == pytest.approx(whole.latest("loss"), abs=1e-7)


def test_two_processes_find_one_rate(two):
    """They try the same rates, agree on what they cost, and train with the same."""
    from kto_core.runs import rates

    short = "from kto_core.training.rate import choosing\nchoosing.FLOOR[False], choosing.SIZES = 1e6, ((3, 3),)"
    settings = {"learning_rate": "auto", "test_size": 0.5, "gradient_accumulation_steps": 1, "max_steps": 3}
    run = two(trouble=short, **settings)
    assert ended(run).state == "finished", run.state().error
    found = rates.read(run.path)
    assert found is not None and len(found.trials) >= 2 and found.rate == run.state().used["learning_rate"]
    (used,) = (e for e in read(run.path / "rank-1.log")[0] if e["kind"] == "used" and "learning_rate" in e)
    assert used["learning_rate"] == found.rate
