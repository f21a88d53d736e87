"""Long work and the disk: room is checked before it begins, with numbers; cancel and kill leave no half file."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from kto_core import files
from kto_core.errors import Cancelled, DiskError
from kto_core.export import export, publish, sources
from kto_core.models import facts as model_info
from kto_core.runs import folders
from kto_core.runs import run as runs
from kto_core.training import start as starting
from tests.support.kills import ROOT
from tests.support.training import make_data, resolved, wait

GB = 10**9


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """A finished run of the tiny model."""
    folder = tmp_path_factory.mktemp("trained")
    run = folders.create(
        resolved(tiny_model, make_data(folder / "rows.jsonl"), max_steps=2, output_dir=str(folder / "run"))
    )
    starting.start(run, block=True)
    assert run.state().state == "finished", run.state().error
    return run


@pytest.fixture
def run(trained, runs_dir):
    return runs.Run(shutil.copytree(trained.path, runs_dir / "run"))


def free(monkeypatch, count: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100 * GB, 100 * GB - count, count))


def left(run) -> list[str]:
    exports = run.path / "exports"
    return sorted(str(p.relative_to(exports)) for p in exports.rglob("*") if p.is_file() and p.name != ".lock")


@pytest.mark.parametrize("work", ["merge", "gguf", "upload"])
def test_export_says_what_it_needs(run, monkeypatch, work):
    from kto_core.export.gguf import converter

    free(monkeypatch, (16 if work == "upload" else 12) * GB)  # of an upload the merged model alone would have room
    facts = dataclasses.replace(model_info.model_facts(run.config().config.model), parameters=7 * GB)
    monkeypatch.setattr(model_info, "model_facts", lambda name: facts)
    monkeypatch.setattr(converter, "converter", lambda *a: None)
    monkeypatch.setattr(converter, "require_convertible", lambda *a: None)
    # 2 bytes a weight: merged, f16; 0.81 of the default where the width is no multiple of 256; 0.1 GB that stay free
    needed = {"merge": "14.1", "gguf": "28.1", "upload": "33.8"}[work]
    works = {
        "merge": lambda: export.merge(run),
        "gguf": lambda: export.gguf(run, ["f16"]),
        "upload": lambda: publish._to_upload(run, run.adapter, "demo", ["merged", "gguf"], export.no_progress, None),
    }
    with pytest.raises(DiskError, match=rf"{needed} GB; free in .*: 1[26]\.0 GB. Free up disk space"):
        works[work]()
    assert not left(run)


def test_training_says_what_it_needs(tiny_model, tmp_path, monkeypatch):
    data = make_data(tmp_path / "rows.jsonl")
    free(monkeypatch, 100_000_000)
    run = folders.create(resolved(tiny_model, data, max_steps=40, save_steps=1, save_total_limit=9))
    starting.start(run, block=True)
    state = run.state()
    assert state.state == "failed" and state.step == 0 and not run.checkpoints()
    assert "10 checkpoints and the adapter need" in state.error and "0.09 GiB are free" in state.error
    assert "save_total_limit" in state.error
    monkeypatch.undo()
    monkeypatch.setenv("KTO_STUDIO_RUNS", str(run.path.parent))
    starting.resume(runs.Run(run.path))
    wait(lambda: run.checkpoints() or run.state().terminal, 200)
    while run.alive():
        run.stop()
    assert run.checkpoints(), run.state().error


def test_cancelled_merge_leaves_nothing(run):
    cancel, texts = threading.Event(), []

    def progress(fraction, text):
        texts.append(text)
        if len(texts) == 2:  # the child works by then
            cancel.set()

    with pytest.raises(Cancelled):
        export.merge(run, progress=progress, cancel=cancel)
    assert texts and not left(run)


def cancels_at(words: str):
    """A progress that cancels at the first text which begins so, and its event."""
    cancel = threading.Event()
    return lambda _, text: cancel.set() if text.startswith(words) else None, cancel


def test_the_checksum_of_a_merged_model_can_be_cancelled(run):
    progress, cancel = cancels_at("Verifying the merged model")
    with pytest.raises(Cancelled):
        export.merge(run, progress=progress, cancel=cancel)
    assert not left(run)
    said = []
    merged = export.merge(run, progress=lambda f, text: said.append((f, text)))
    fractions = [f for f, text in said if text.startswith("Verifying the merged model: ")]
    assert len(fractions) > 3 and fractions == sorted(fractions) and 0.98 < fractions[0] < fractions[-1] <= 1
    progress, cancel = cancels_at("Verifying the existing merge")  # its checksum is compared
    with pytest.raises(Cancelled):
        export.merge(run, progress=progress, cancel=cancel)
    assert not files.problem(merged)
    assert sources.sha256(run.adapter / "adapter_model.safetensors", threading.Event())
    with pytest.raises(Cancelled):
        sources.sha256(run.adapter / "adapter_model.safetensors", cancel)


EXPORT = (
    "import sys; from kto_core.export import export; from kto_core.runs import folders; "
    "export.merge(folders.find(sys.argv[1]))"
)


def test_killed_merge_is_not_taken_for_a_whole_one(run):
    process = subprocess.Popen([sys.executable, "-c", EXPORT, str(run.path)], cwd=ROOT)
    part = run.path / "exports" / "merged.part"
    wait(lambda: (part.is_dir() and any(part.iterdir())) or process.poll() is not None, 200)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (run.path / "exports" / "merged").exists()
    wait(lambda: not children_of(part), 60)  # the child does not go on without its parent
    merged = export.merge(run)
    assert all(name.startswith("merged/") for name in left(run)) and not files.problem(merged)
    before = (merged / "model.safetensors").stat().st_mtime_ns
    assert export.merge(run) == merged and (merged / "model.safetensors").stat().st_mtime_ns == before


def children_of(part) -> list[str]:
    """Processes that have a file below the folder open, or were started in vain for it."""
    found = []
    for fd in os.scandir("/proc"):
        if fd.name.isdigit() and int(fd.name) != os.getpid():
            try:
                links = [os.readlink(f"/proc/{fd.name}/fd/{n}") for n in os.listdir(f"/proc/{fd.name}/fd")]
            except OSError:
                continue
            found += [fd.name for link in links if link.startswith(str(part))]
    return found
