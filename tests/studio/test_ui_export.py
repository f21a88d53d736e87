"""The Export tab and the view of long jobs: what they show, and a GGUF made, checked and downloaded in a browser."""

import json
import threading
from pathlib import Path

import pytest

from kto_core import jobs
from kto_core.errors import BusyError, Cancelled, ExportError
from kto_studio.export import tab, view
from kto_studio.shared import jobs_view


@pytest.fixture
def folder(tmp_path):
    """A run's folder with exports, as the tab sees it."""
    run = tmp_path / "run"
    for name in ("exports/gguf/m-q8_0.gguf", "exports/gguf/Modelfile-q8_0", "exports/m-f16.gguf.part", "config.yaml",
                 "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "events.jsonl"):  # fmt: skip
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x" * 2000)
    return run


# ---- files


def test_downloads_are_the_finished_files_ggufs_first(folder):
    assert [p.name for p in view.downloads(folder)] == [
        "m-q8_0.gguf", "Modelfile-q8_0", "adapter_model.safetensors", "adapter_config.json",
    ]  # fmt: skip
    assert view.downloads(folder / "none") == []


def test_files_have_ids_and_no_path_is_one(folder):
    path = view.gguf_files(folder)[0]
    name = view.file_id(path, folder)
    assert name == "exports/gguf/m-q8_0.gguf" and view.by_id(name, folder) == path
    for bad in (None, "", str(path), "../run/exports/gguf/m-q8_0.gguf", "config.yaml"):
        with pytest.raises(ExportError):
            view.by_id(bad, folder)


def test_what_ollama_does_otherwise_is_shown_once_and_escaped(folder):
    manifest = {"m-q8_0.gguf": {"remarks": ["No <tools>."]}, "m-f16.gguf": {"remarks": ["No <tools>."]}, "old": {}}
    (folder / "exports" / "gguf" / "manifest.json").write_text(json.dumps(manifest))
    assert view.remarks(folder) == ["No <tools>."] and view.remarks(folder / "none") == []
    shown = view.facts({"model": "m", "state": "finished", "remarks": view.remarks(folder)})
    assert "Ollama: 1 remark<" in shown and "No &lt;tools&gt;." in shown
    assert "Ollama" not in view.facts({"model": "m", "state": "finished"})


@pytest.mark.parametrize("name", [None, "", "..", "../x", "/etc", "a/b"])
def test_runs_have_ids_too(name):
    with pytest.raises(ExportError):
        tab.find(name)


# ---- disk


def test_disk_needed():
    assert view.needed(None, ["q8_0"], False) is None
    assert view.needed(1e9, [], True) == 0
    assert view.needed(1e9, ["f16"], False) == pytest.approx(4e9)
    assert view.needed(1e9, ["q8_0", "f16"], True) == pytest.approx(3.07e9)
    assert "4.0 GB" in view.disk(4e9, 10**11) and "note-bad" in view.disk(4e9, 10**9)
    assert [view.size(n) for n in (12, 3_400, 145_000_000, 2.5e9)] == ["12 B", "3.4 kB", "145 MB", "2.5 GB"]


def test_a_verdict_is_shown_with_both_answers_as_text():
    found = {
        "ok": False, "text": "<script>x</script>", "tokens_per_second": 5.12, "engine": "cyllama",
        "reference_text": "Paris",
        "checks": [{"name": "Tokens", "ok": False, "text": "2 of <28> texts"},
                   {"name": "Weights", "ok": None, "text": "x"}],
    }  # fmt: skip
    shown = view.verdict(found)
    assert "&lt;script&gt;" in shown and "✗ Tokens" in shown and "&lt;28&gt;" in shown and "– Weights" in shown
    assert "Paris" in shown and "note-bad" in shown and "5.1 tokens/s" in shown
    assert "note-good" in view.verdict(found | {"ok": True})


# ---- jobs


@pytest.fixture
def clean_jobs(monkeypatch):
    monkeypatch.setattr(jobs, "_JOBS", {})


def test_a_job_is_shown_from_start_to_end(clean_jobs):
    go = threading.Event()

    def work(progress, cancel):
        progress(0.25, "Writing <f16>")
        assert go.wait(20)
        return 1

    job = jobs.start("Export GGUF of r1", work)
    while job.fraction is None:
        pass
    text = jobs_view.view(jobs_view.mine("Export "), "Export ")
    assert "GGUF of r1" in text and 'aria-valuenow="25"' in text and "left" in text and "&lt;f16&gt;" in text
    assert jobs_view.busy("Export ") is job and jobs_view.busy("Load ") is None
    with pytest.raises(BusyError, match="is still running"):
        tab.start("another", work)
    go.set()
    job.thread.join(20)
    text = jobs_view.view(jobs_view.mine("Export "), "Export ")
    assert "done in" in text and "progressbar" not in text and jobs_view.busy("Export ") is None


def test_failure_and_cancel_are_said(clean_jobs):
    def fail(progress, cancel):
        raise ExportError("The disk <is> full. Make room.")

    def stopped(progress, cancel):
        assert cancel.wait(20)
        raise Cancelled("Stopped.")

    jobs.start("Export a", fail).thread.join(20)
    assert "The disk &lt;is&gt; full." in jobs_view.view(jobs_view.mine("Export "))
    job = jobs.start("Export b", stopped)
    job.cancel()
    job.thread.join(20)
    assert "stopped in" in jobs_view.view([job])
    done = jobs.Job("Export upload", state="done", ended=1.0, result="https://hub/jane/m?x=<b>")
    assert '<a href="https://hub/jane/m?x=&lt;b&gt;"' in jobs_view.view([done])
    done.result = Path(__file__).parent
    assert f"{Path(__file__).parent.name}" in jobs_view.view([done])


def test_only_the_newest_jobs_are_shown():
    shown = jobs_view.view([jobs.Job(f"job {i}", state="done", ended=1.0) for i in range(9)])
    assert shown.count('class="job ') == jobs_view.SHOWN and "job 8" in shown and "job 4" not in shown


def test_unknown_progress_has_no_value():
    assert "aria-valuenow" not in jobs_view.bar(None, "x") and "job-unknown" in jobs_view.bar(None, "x")
    assert jobs.duration(3725) == "1 h 2 min" and jobs.duration(65) == "1 min 5 s"


# ---- in a browser


@pytest.mark.browser
def test_a_job_on_the_page_survives_a_reload_and_can_be_cancelled(clean_jobs):
    from tests.support.tabs import opened, served

    def work(progress, cancel):
        progress(0.4, "Writing the file")
        assert cancel.wait(60)
        raise Cancelled("Stopped.")

    with served(export=lambda ctx: jobs_view.build(ctx, "Export ")) as url, opened(url) as page:
        page.get_by_role("tab", name="Data").wait_for()
        jobs.start("Export GGUF of r1", work)
        page.get_by_role("progressbar").wait_for()
        page.reload()
        page.get_by_text("40 %").wait_for()
        page.locator("#cancel-export").click()
        page.get_by_text("stopped in").wait_for()
        page.locator("#cancel-export").wait_for(state="hidden")


@pytest.fixture
def trained(demo_model, tmp_path):
    """A run of the demo model that ended with an adapter (random: what it learned does not matter here)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from kto_core import files
    from kto_core.config import resolving
    from kto_core.runs import folders
    from kto_core.runs.events import EventLog

    found = folders.create(resolving.resolve("demo", {"data": "rows.jsonl"}))
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(demo_model)
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    tuned.save_pretrained(found.path / "adapter")
    files.seal(found.path / "adapter")
    EventLog(found.path / "events.jsonl").status("finished", total_steps=3)
    return found


@pytest.mark.browser
def test_gguf_is_made_checked_and_downloaded(clean_jobs, trained):
    from tests.support.tabs import opened, served

    with served(export=tab.build) as url, opened(url) as page:
        page.locator("#export-facts").get_by_text("finished").wait_for()
        assert page.locator("#export-run input").input_value() == f"Run {trained.id}"
        for label, wanted in (("q8_0", True), ("q4_k_m", False)):
            page.locator(f"#export-quants input[name={label}]").set_checked(wanted)
        page.locator("#export-disk").get_by_text("are free").wait_for()
        page.locator("#export-gguf").click()
        page.get_by_role("progressbar").wait_for()
        page.reload()  # the job does not care
        page.get_by_text("done in").wait_for(timeout=240_000)

        button = page.locator("button.download, .download button").filter(has_text="q8_0.gguf")
        button.wait_for()
        with page.expect_download() as download:
            button.click()
        made = view.gguf_files(trained.path)
        assert len(made) == 1 and download.value.path().read_bytes() == made[0].read_bytes()
        assert made[0].read_bytes()[:4] == b"GGUF"
        assert page.locator("button").filter(has_text="Modelfile").count() >= 1

        page.locator("#export-check:enabled").click()
        page.locator("pre.answer").first.wait_for(timeout=120_000)
        assert page.locator("pre.answer").first.inner_text().strip() not in ("", "(no text)")
        page.locator("#export-answer").get_by_text(f"q8_0.gguf of run {trained.id}").wait_for()  # whose answer it is
        page.locator("#export-check:enabled").wait_for()


@pytest.mark.browser
def test_an_answer_of_the_check_stays_with_its_run(clean_jobs, trained, monkeypatch):
    import shutil

    from kto_core.config import resolving
    from kto_core.export import export
    from kto_core.runs import folders
    from tests.support import browser
    from tests.support.tabs import opened, served

    other = folders.create(resolving.resolve("demo", {"data": "rows.jsonl"}))
    for name in ("adapter", "events.jsonl"):
        copy = shutil.copytree if (trained.path / name).is_dir() else shutil.copy
        copy(trained.path / name, other.path / name)
    file = trained.path / "exports" / "gguf" / "model-q8_0.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"GGUF")
    ready, checked = threading.Event(), view.by_id(view.file_id(file, trained.path), trained.path)

    def check(path, question, *, progress, cancel):
        assert path == checked and ready.wait(60)
        raise ExportError("llama.cpp does not know this model.")

    monkeypatch.setattr(export, "check_gguf", check)
    with served(export=tab.build) as url, opened(url) as page:

        def choose(found) -> None:
            browser.choose(page, "#export-run", found.id)
            page.wait_for_function(f"document.querySelector('#export-run input').value === 'Run {found.id}'")

        answer, enabled = page.locator("#export-answer"), page.locator("#export-check:enabled")
        choose(trained)
        enabled.click()
        answer.get_by_text("Loading the file").wait_for()
        choose(other)
        answer.get_by_text("Loading the file").wait_for(state="detached")
        ready.set()
        page.locator(".jobs").get_by_text("does not know this model").wait_for()
        page.wait_for_timeout(1000)  # the answer would come in this time
        assert not answer.inner_text().strip()
        choose(trained)
        answer.get_by_text(f"q8_0.gguf of run {trained.id}").wait_for()
        enabled.wait_for()


@pytest.mark.browser
def test_push_asks_for_what_is_missing_and_forgets_the_token(clean_jobs, trained, monkeypatch):
    from kto_core.errors import HubError
    from tests.support.tabs import opened, served

    sent = []

    def refuse(run, repo, *, what, private, token, progress, cancel):
        sent.append((repo, what, private, token))
        raise HubError("The Hub refused the token. Check that it may write.")

    monkeypatch.setattr("kto_core.export.publish.push", refuse)
    with served(export=tab.build) as url, opened(url) as page:
        token = page.locator("#export-token input")
        assert token.get_attribute("type") == "password"
        page.locator("#export-push:enabled").click()
        page.locator(".toast-wrap").get_by_text("owner/name").wait_for()
        page.locator("#export-repo input, #export-repo textarea").fill("jane/my-model")
        token.fill("hf_secret")
        page.locator("#export-push").click()
        page.locator(".jobs").get_by_text("refused the token").wait_for()
        assert sent == [("jane/my-model", ["adapter"], True, "hf_secret")]
        page.wait_for_function("document.querySelector('#export-token input').value === ''")
        kept = page.evaluate("JSON.stringify(localStorage) + JSON.stringify(sessionStorage)")
        assert "hf_secret" not in kept


@pytest.mark.browser
def test_without_a_run_the_tab_says_what_to_do(clean_jobs):
    from tests.support.tabs import opened, served

    with served(export=tab.build) as url, opened(url) as page:
        page.get_by_text("No run has an adapter yet").wait_for()
        assert page.locator("#export-gguf").is_disabled() and page.locator("#export-push").is_disabled()
