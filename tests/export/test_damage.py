"""Files that lie there broken, and a disk that is full: said in a sentence, and the run goes on from what is whole."""

import json
import os
import shutil
import subprocess

import pytest

from kto_core import files, paths
from kto_core.errors import ConfigError, ModelError
from kto_core.runs import events, folders
from kto_core.runs import run as runs
from kto_core.runs.events import EventLog
from kto_core.training import start as starting
from tests.support.kills import trainings
from tests.support.training import metrics, resolved, wait

SETTINGS = {"dtype": "float32", "load_in_4bit": False, "logging_steps": 1, "max_steps": 9, "save_steps": 2}


@pytest.fixture(scope="module")
def killed(tiny, data, tmp_path_factory):
    """A run that was killed after step 5 of 9 and has checkpoints 2 and 4, and its uninterrupted twin's metrics."""
    folder = tmp_path_factory.mktemp("killed")
    whole = folders.create(resolved(tiny, data, **SETTINGS, output_dir=str(folder / "whole")))
    assert trainings().run(whole.path) == 0
    run = folders.create(resolved(tiny, data, **SETTINGS, output_dir=str(folder / "run")))
    assert trainings().run(run.path, "the fifth metric") == -9
    assert [c.name for c in run.checkpoints()] == ["checkpoint-2", "checkpoint-4"]
    return run.path, metrics(whole.path)


@pytest.fixture
def run(killed, runs_dir):
    return runs.Run(shutil.copytree(killed[0], runs_dir / "run"))


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garbage(file):
    file.write_bytes(os.urandom(file.stat().st_size))


DAMAGE = {
    "half a checkpoint": (lambda p: (p / "checkpoints/checkpoint-4/manifest.json").unlink(), 2),
    "cut optimizer": (lambda p: cut(p / "checkpoints/checkpoint-4/optimizer.pt"), 2),
    "garbage in the adapter": (lambda p: garbage(p / "checkpoints/checkpoint-4/adapter_model.safetensors"), 2),
    "cut manifest": (lambda p: cut(p / "checkpoints/checkpoint-4/manifest.json"), 2),
    "all checkpoints": (lambda p: [cut(f) for f in p.rglob("trainer_state.json")], 0),
    "no lock": (lambda p: (p / "lock").unlink(), 4),
    "no dataset.json": (lambda p: (p / "dataset.json").unlink(), 4),
    "cut dataset.json": (lambda p: cut(p / "dataset.json"), 4),
    "dataset.json is a list": (lambda p: (p / "dataset.json").write_text("[1]"), 4),
    "left-overs": (lambda p: [(p / n).mkdir() for n in ("checkpoints/saving.part", "adapter.part")], 4),
    "an old stop": (lambda p: (p / "stop").write_text("now"), 4),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_goes_on_from_what_is_whole(run, killed, name):
    assert run.state().state == "interrupted" and "after step 5" in run.state().message
    damage, resumed = DAMAGE[name]
    damage(run.path)
    assert isinstance(run.dataset(), dict)
    starting.resume(run, block=True)
    state = run.state()
    assert state.state == "finished", state.error
    found = [e["resumed_from"] for e in events.read(run.path / "events.jsonl")[0] if "resumed_from" in e]
    assert found == [resumed]
    assert bool(resumed < 4) == any("Skipping checkpoint-" in e["text"] for e in state.logs)
    assert metrics(run.path) == killed[1]
    assert not [p.name for p in run.path.rglob("*.part")] and not (run.path / "stop").exists()


TORN = {
    "end": lambda text: text + b'{"t": 1, "kind": "metr',
    "middle": lambda text: text[: len(text) // 2] + b"\x00\x00\xff{[" + text[len(text) // 2 :],
    "zeros": lambda text: text + bytes(4096),
    "wrong types": lambda text: text + b'{"kind": "metric", "step": "x", "t": []}\n[]\n1\n{"kind": {}}\n',
    "deep": lambda text: text + b"[" * 100_000 + b"\n",
    "empty": lambda text: b"",
}


@pytest.mark.parametrize("name", TORN)
def test_event_log_that_is_torn(run, name):
    before = run.state()
    file = run.path / "events.jsonl"
    file.write_bytes(TORN[name](file.read_bytes()))
    fresh = runs.Run(run.path)
    runs._folded.clear()
    state = fresh.state()
    assert name == "empty" or state.step in (before.step, before.step - 1)
    starting.resume(fresh, block=True)
    runs._folded.clear()
    state = fresh.state()
    assert state.state == "finished" and state.step == 9
    steps = [m["step"] for m in state.metrics]
    assert steps == sorted(set(steps)) and steps[-1] == 9


def test_config_that_is_torn(run):
    cut(run.path / "config.yaml")
    garbage_too = shutil.copytree(run.path, run.path.with_name("other"))
    garbage(garbage_too / "config.yaml")
    for broken in (run, runs.Run(garbage_too)):
        assert broken in folders.list_runs() and broken.state().state == "interrupted"
        with pytest.raises(ConfigError) as e:
            starting.start(broken)
        assert "Traceback" not in str(e.value) and len(str(e.value)) < 1000


def test_adapter_that_is_lost_is_made_again(run):
    from kto_core.chat import chat

    starting.resume(run, block=True)
    good = (run.path / "adapter" / "adapter_model.safetensors").read_bytes()
    garbage(run.path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="adapter"):
        chat.Chat.load(run)
    for damage in (lambda: None, lambda: shutil.rmtree(run.path / "adapter")):
        damage()
        starting.resume(run, block=True)
        state = run.state()
        assert state.state == "finished" and state.step == 9, state.error
        assert (run.path / "adapter" / "adapter_model.safetensors").read_bytes() == good
    (run.path / "adapter").rename(run.path / "adapter.old")  # killed between the two renames
    assert run.adapter == run.path / "adapter.old"
    files.clean(run.path)
    assert run.adapter == run.path / "adapter" and not files.problem(run.adapter)


@pytest.mark.parametrize("text", [b"", b"no database", b"SQLite format 3\x00" + bytes(5000)])
def test_reference_cache_that_is_broken(tiny, data, tmp_path, monkeypatch, text):
    monkeypatch.setenv("KTO_STUDIO_CACHE", str(tmp_path / "cache"))
    file = paths.cache_dir() / "reference" / "logps.sqlite"
    settings = SETTINGS | {"engine": "packed", "max_steps": 2}
    first = folders.create(resolved(tiny, data, **settings))
    starting.start(first, block=True)
    assert first.state().state == "finished" and file.stat().st_size > 0, first.state().error
    file.write_bytes(text)
    second = folders.create(resolved(tiny, data, **settings))
    starting.start(second, block=True)
    assert second.state().state == "finished", second.state().error
    assert metrics(second.path) == metrics(first.path)


# ---- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MiB; where mounting is not allowed, None."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", folder], capture_output=True)
    yield folder if mounted.returncode == 0 else None
    if mounted.returncode == 0:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("worker", ["thread", "process"])
def test_disk_that_fills_up(tiny, data, tmp_path, small_disk, monkeypatch, worker, killed):
    from kto_core.planning import checks

    if small_disk is None:
        pytest.skip("this user cannot mount; the same is tested with a writer that fails")
    monkeypatch.setattr(checks, "check_disk", lambda *a: None)
    settings = SETTINGS | {"max_steps": 400, "worker": worker, "output_dir": str(small_disk / "run")}
    if worker == "process":  # there the check is real: it refuses before anything is loaded
        run = folders.create(resolved(tiny, data, **settings))
        starting.start(run, block=True)
        state = run.state()
        assert state.state == "failed" and "GiB are free" in state.error and state.step == 0
        return
    run = folders.create(resolved(tiny, data, **settings))
    starting.start(run)
    wait(lambda: run.state().step >= 5 or run.state().terminal, 200)
    ballast = small_disk / "ballast"
    with open(ballast, "wb", buffering=0) as f:
        while True:
            try:
                f.write(bytes(4096))
            except OSError:
                break
    state = wait(lambda: not run.alive() and (s := run.state()).terminal and s, 200)
    assert state.state in ("failed", "interrupted")
    assert "disk is full" in state.message or "is not writable (No space left" in state.message, state.message
    whole = [c for c in run.checkpoints() if not files.problem(c)]
    assert whole == run.checkpoints() and whole
    ballast.unlink()
    before = state.step
    starting.resume(run)
    wait(lambda: run.state().step > before or run.state().terminal, 200)
    run.stop()
    state = wait(lambda: not run.alive() and (s := run.state()).terminal and s, 200)
    assert state.state == "stopped", state.error
    steps = [m["step"] for m in state.metrics]
    assert steps == list(range(1, state.step + 1))


@pytest.mark.parametrize("what", ["events", "checkpoint", "adapter"])
def test_writer_that_finds_the_disk_full(run, killed, monkeypatch, what):
    with monkeypatch.context() as patch:
        no_room(patch, what)
        starting.resume(run, block=True)
        state = run.state()
        assert state.state in ("failed", "interrupted")
        assert "full" in state.message or "No space left" in state.message, state.message
        assert not [c for c in run.checkpoints() if files.problem(c)]
        assert run.adapter is None
    starting.resume(run, block=True)
    assert run.state().state == "finished", run.state().error
    assert metrics(run.path) == killed[1]


def no_room(patch, what: str) -> None:
    full = OSError(28, "No space left on device")
    if what == "events":
        write = EventLog.append

        def append(self, kind, **fields):
            if fields.get("step", 0) >= 7 or append.full:
                append.full = True
                raise full
            return write(self, kind, **fields)

        append.full = False
        patch.setattr(EventLog, "append", append)
        return
    from kto_core.training import trainer

    save = trainer.save_adapter

    def failing(model, tokenizer, folder, base):
        save(model, tokenizer, folder, base)
        if folder.name == ("adapter.part" if what == "adapter" else "checkpoint-8"):
            raise full

    patch.setattr(trainer, "save_adapter", failing)


def test_manifest_names_every_file(killed):
    folder = killed[0] / "checkpoints" / "checkpoint-4"
    named = set(json.loads((folder / "manifest.json").read_text())["files"])
    assert named == {p.name for p in folder.iterdir()} - {"manifest.json"}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "meters.json"} <= named


def test_full_disk_in_the_words_of_each_library():
    from safetensors import SafetensorError

    from kto_core.training.train import _understood

    for error in (
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ):
        assert "disk is full" in str(_understood(error))
    assert _understood(RuntimeError("shapes do not match")) is None
