"""The moments around a start: a run that has just ended, folders that cannot be made, a disk that is full."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kto_core.config import resolving as config
from kto_core.errors import BusyError, DiskError, RunError
from kto_core.runs import folders, locks
from kto_core.runs import run as runs
from kto_core.runs.events import EventLog
from kto_core.training import queue
from kto_core.training import start as starting
from tests.support.bad_runs import make
from tests.support.training import resolved

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from kto_core.runs import locks as alive
alive.acquire(sys.argv[1])
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def holding():
    """Another process has a run's lock for some seconds, as one that has said its last word and still ends."""
    children = []

    def hold(run, seconds: float):
        child = subprocess.Popen([sys.executable, "-c", HOLDER, str(run.path), str(seconds)], cwd=ROOT,
                                 stdout=subprocess.PIPE, text=True)  # fmt: skip
        children.append(child)
        assert child.stdout.readline() == "held\n"

    yield hold
    for child in children:
        child.kill()
        child.communicate()


@pytest.fixture
def trained(monkeypatch):
    """The runs that were started, instead of their training."""
    began = []

    def worker(run, config):
        began.append(run)
        EventLog(run.path / "events.jsonl").status("finished")
        locks.release(run.path)
        thread = threading.Thread(target=lambda: None)
        thread.start()
        return thread

    monkeypatch.setattr(starting, "in_thread", worker)
    return began


@pytest.fixture
def stopped(runs_dir):
    run = runs.Run(make(runs_dir / "stopped"))
    EventLog(run.path / "events.jsonl").status("stopped", message="Stopped.")
    return run


def test_resume_waits_for_the_process_that_ends(stopped, holding, trained):
    holding(stopped, 1.5)
    assert stopped.alive() and stopped.state().state == "stopped"
    starting.resume(stopped, block=True)
    assert trained == [stopped]


def test_another_start_waits_too_and_so_does_delete(stopped, holding, trained, tiny_model):
    holding(stopped, 1.5)
    other = folders.create(resolved(tiny_model, "x.jsonl"))
    assert folders.active() == stopped and folders.active(settle=True) is None
    holding(stopped, 1.5)
    starting.start(other, block=True)
    assert trained == [other]
    holding(stopped, 1.5)
    folders.delete(stopped)
    assert not stopped.path.exists()


def test_who_trains_is_not_waited_for(stopped, holding, trained, monkeypatch):
    holding(stopped, 600)
    EventLog(stopped.path / "events.jsonl").status("training")
    began = time.monotonic()
    for act in (starting.resume, folders.delete, starting.start):
        with pytest.raises(BusyError):
            act(stopped)
    assert folders.active(settle=True) == stopped and time.monotonic() - began < 5
    EventLog(stopped.path / "events.jsonl").status("stopped")
    monkeypatch.setattr(runs, "PATIENCE", 0.5)  # one that never ends is said
    with pytest.raises(BusyError):
        starting.resume(stopped)
    assert trained == []


def test_a_waiting_run_does_not_read_the_list_again_and_again(stopped, holding, runs_dir, monkeypatch):
    waiting = runs.Run(make(runs_dir / "waiting"))
    (waiting.path / queue.MARK).write_text(str(time.time_ns()))
    holding(stopped, 600)
    listed = []
    real = folders.list_runs
    monkeypatch.setattr(starting, "list_runs", lambda: listed.append(1) or real())
    ask = starting._blocker(waiting)
    assert {ask() for _ in range(20)} == {"run stopped is ahead in the queue."} and len(listed) == 1


# ---- folders


@pytest.fixture
def no_folder(tmp_path) -> Path:
    """A place where nobody can make a folder, root included."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "here"


@pytest.mark.parametrize("name", ["KTO_STUDIO_RUNS", "KTO_STUDIO_DATA", "KTO_STUDIO_CACHE", "GRADIO_TEMP_DIR"])
def test_the_app_names_a_folder_that_cannot_be_made(no_folder, monkeypatch, capsys, name):
    from kto_studio import __main__ as app

    monkeypatch.setenv(name, str(no_folder))
    assert app.main([]) == 1
    said = capsys.readouterr().err
    assert str(no_folder) in said and f"set {name}" in said and "cannot be created" in said
    assert "listen" not in said and "Traceback" not in said and said.count("\n") == 1


def test_a_download_names_the_hubs_cache(no_folder, monkeypatch):
    from huggingface_hub import constants

    from kto_core.models.hub_files import _explained

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(no_folder))
    with pytest.raises(DiskError, match=r"here is not writable \(Not a directory\). Set HF_HOME"), _explained("a/b"):
        os.makedirs(no_folder / "models--a--b")


def test_a_start_names_the_runs_folder(no_folder, monkeypatch, tmp_path, tiny_model):
    run = folders.create(resolved(tiny_model, "x.jsonl", output_dir=str(tmp_path / "run")))
    monkeypatch.setenv("KTO_STUDIO_RUNS", str(no_folder))
    for act in (lambda: starting.start(run), lambda: folders.create(resolved(tiny_model, "x.jsonl"))):
        with pytest.raises(DiskError, match="cannot be created"):
            act()
    assert folders.list_runs() == [] and folders.active() is None


@pytest.mark.parametrize("when", ["write", "rename"])
@pytest.mark.parametrize("where", ["", "new", "empty"])
def test_a_full_disk_leaves_nothing_half_made(runs_dir, tmp_path, tiny_model, monkeypatch, when, where):
    settings = resolved(tiny_model, "x.jsonl", **({"output_dir": str(tmp_path / "a" / "b")} if where else {}))
    if where == "empty":
        (tmp_path / "a" / "b").mkdir(parents=True)
    runs_dir.mkdir()

    def full(resolved, path):
        (path.with_name("config.yaml.part") if when == "write" else path).write_text("")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(config, "save_config", full)
        with pytest.raises(DiskError, match="No space left"):
            folders.create(settings)
    assert list(runs_dir.iterdir()) == [] and list(tmp_path.rglob("config.yaml*")) == []
    assert (tmp_path / "a").exists() is (where == "empty")
    assert folders.create(settings).path.is_dir()


def test_a_full_disk_leaves_the_run_that_was_there(runs_dir, tmp_path, tiny_model, monkeypatch):
    settings = resolved(tiny_model, "x.jsonl", output_dir=str(tmp_path / "mine"))
    old = folders.create(settings)
    (old.path / "adapter").mkdir()
    (old.path / "adapter" / "manifest.json").write_text("{}")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(runs.os, "replace", full)
        with pytest.raises(DiskError):
            folders.create(settings)
    assert (old.path / "config.yaml").is_file() and old.adapter
    with pytest.raises(RunError, match="finished"):
        EventLog(old.path / "events.jsonl").status("finished", total_steps=0)
        (old.path / "adapter" / "manifest.json").write_text('{"files": {}}')
        starting.resume(old)
