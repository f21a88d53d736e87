"""One bad run folder spoils that run only: the lists, the page and the other runs go on."""

import json
import os
import re
import resource
import shutil
import time
from types import SimpleNamespace

import gradio as gr
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kto_core import cli
from kto_core.errors import KTOError, ModelError
from kto_core.runs import checkpoints, events, folders, run
from kto_core.training import start as starting
from kto_studio.export import tab
from kto_studio.shared import curves, live, model_choices, views
from kto_studio.shared.context import Context
from kto_studio.train import curves_view, form, run_side
from tests.support.bad_runs import GOOD, HARMLESS, SKIPPED, UNREADABLE, make, text_of

ALL = {**UNREADABLE, **SKIPPED, **HARMLESS}
SOON = 20  # seconds of the processor, on a busy machine; the first of these took minutes and gigabytes


@pytest.fixture(autouse=True)
def fresh():
    live.forget()
    yield
    live.forget()


@pytest.fixture
def good(runs_dir):
    return make(runs_dir / "good")


@pytest.fixture(scope="module")
def side():
    with gr.Blocks() as blocks, gr.Tabs() as tabs, gr.Tab("Train"):
        ctx = Context(blocks, tabs, gr.Timer(1), gr.BrowserState(""), gr.BrowserState(""), gr.State(), gr.State())
        shown = run_side.build(ctx)
    return shown, [fn for fn, *_ in ctx.ticks]


def called(capsys, *args) -> tuple[int, str, str]:
    code = cli.main(list(args))
    said = capsys.readouterr()
    assert "Traceback" not in said.err, said.err[-3000:]
    return code, said.out, said.err


def listed(capsys) -> dict[str, dict]:
    code, out, _ = called(capsys, "runs", "list", "--json")
    assert code == 0
    return {r["id"]: r for r in json.loads(out)["runs"]}


@pytest.mark.parametrize("name", ALL)
def test_the_command_line_says_it_and_the_others_stay(good, runs_dir, capsys, name):
    ALL[name](make(runs_dir / "bad"))
    began = time.process_time()
    found = listed(capsys)
    assert set(found) == {"good", "bad"} and set(found["bad"]) == set(found["good"])
    assert (found["good"]["state"], found["good"]["step"], found["good"]["error"]) == ("finished", 3, "")
    code, out, _ = called(capsys, "runs", "list")
    assert code == 0 and len(out) < 2000
    shown, _, err = called(capsys, "runs", "show", "bad")
    as_json, out, _ = called(capsys, "runs", "show", "bad", "--json")
    assert called(capsys, "runs", "show", "good")[0] == 0 and len(err) < 1000
    if name in UNREADABLE:
        assert found["bad"]["model"].startswith("cannot be read: ")
        assert found["bad"]["error"].startswith(("cannot be read: ", "This run cannot be read: "))
        assert not re.search(r"\.\.(?!\d)", err) and "Fix it" not in found["bad"]["model"], (
            "one sentence inside another"
        )
        assert shown == as_json == 1 and "bad cannot be read: " in err and "cannot be read" in json.loads(out)["error"]
    else:
        assert shown == as_json == 0 and found["bad"]["state"] == "finished" and found["bad"]["model"] == "demo"
        assert (json.loads(out)["skipped_events"] > 0) is (name in SKIPPED)
    assert time.process_time() - began < SOON


@pytest.mark.parametrize("name", ALL)
def test_the_page_says_it_and_the_others_stay(good, runs_dir, side, name):
    shown, ticks = side
    ALL[name](make(runs_dir / "bad"))
    os.utime(runs_dir / "bad", (1, 1))
    for chosen in ("bad", "good", ""):
        for tick in ticks:
            json.dumps(tick(chosen, None)[-1])
        sent = " ".join(str(v.get("value", "") if isinstance(v, dict) else v) for v in shown.everything(chosen))
        assert chosen != "bad" or ("cannot be read" in sent) is (name in UNREADABLE or name in SKIPPED)
        sent.encode()  # as JSON for the browser is
    labels = {value: label for label, value in run_side._picker(None)[0]["choices"]}
    assert labels["good"] == "good · finished"
    assert ("bad · cannot be read: " in labels["bad"]) is (name in UNREADABLE) and len(labels["bad"]) <= 200
    for choices in (model_choices.choices(), form.adapter_choices(), export_choices()):
        of_runs = {value.removeprefix("run:"): label for label, value in choices}
        assert of_runs["good"] == "Run good" and ("cannot be read" in of_runs["bad"]) is (name in UNREADABLE)
    if name in UNREADABLE:
        with pytest.raises(ModelError, match="cannot be read"):
            form.resolve(form.empty("demo") | {"adapter": "bad"})
        facts, *_ = tab.show_run("bad", ["q4_k_m"])
        assert "cannot be read" in facts
    assert "cannot be read" not in str(tab.show_run("good", ["q4_k_m"], ask=False))


def export_choices() -> list:
    return [(label, name) for name, label in model_choices.with_adapter()]


def test_the_header_and_the_active_run_do_not_mind(good, runs_dir):
    for i, damage in enumerate(ALL.values()):
        damage(make(runs_dir / f"bad-{i}"))
    assert folders.active() is None and live.active() is None
    assert {r.id for r in folders.list_runs()} == {"good", *(f"bad-{i}" for i in range(len(ALL)))}


@pytest.mark.parametrize("name", UNREADABLE)
def test_nobody_goes_on_with_it_but_it_can_be_deleted(good, runs_dir, name):
    UNREADABLE[name](make(runs_dir / "bad"))
    bad = folders.find("bad")
    with pytest.raises(KTOError) as e:
        starting.resume(bad)
    assert len(str(e.value)) < 1000 and not bad.alive()
    if name != "settings are lost":  # then it may be anything
        folders.delete(bad)
        assert folders.list_runs() == [folders.find("good")]


def test_resume_of_the_newest_passes_over_it(good, runs_dir, capsys):
    from kto_core.cli import train

    folder = make(runs_dir / "bad", text_of(GOOD[:2]))
    for name in ("good", "bad"):
        (runs_dir / name / "checkpoints" / "checkpoint-3").mkdir(parents=True)
        (runs_dir / name / "checkpoints" / "checkpoint-3" / "manifest.json").write_text('{"files": {}}')
    events.EventLog(good / "events.jsonl").status("stopped")
    found = lambda: train._existing("", SimpleNamespace(no_resume=False, resume=True))  # noqa: E731
    assert found() == folders.find("bad")
    UNREADABLE["one alias"](folder)
    assert found() == folders.find("good")


def test_a_line_of_a_gibibyte_takes_no_memory(runs_dir):
    SKIPPED["a line of 1 GiB"](folder := make(runs_dir / "bad"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    state = run.Run(folder).state()
    assert state.state == "finished" and state.skipped == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB
    began = time.process_time()
    run.Run(folder).state()
    assert time.process_time() - began < 0.05, "it is not read again"
    events.EventLog(folder / "events.jsonl").log("after it")
    assert run.Run(folder).state().logs[-1]["text"] == "after it"


def test_skipped_lines_are_counted_in_the_log(runs_dir):
    SKIPPED["other JSON"](folder := make(runs_dir / "bad"))
    assert "7 lines of the events cannot be read" in views.logs(run.Run(folder).state())
    assert "cannot be read" not in views.logs(run.Run(make(runs_dir / "good")).state())


def test_a_folder_whose_name_is_no_unicode(good, runs_dir, capsys):
    os.rename(make(runs_dir / "bad"), os.fsencode(runs_dir) + b"/b\xe4d")
    (found,) = set(listed(capsys)) - {"good"}
    json.dumps(found, ensure_ascii=False).encode()
    assert folders.find(found).state().step == 3 and called(capsys, "runs", "show", found)[0] == 0
    json.dumps(model_choices.choices(), ensure_ascii=False).encode()


# ---- any bytes


BYTES = st.binary(max_size=40) | st.sampled_from(
    [b"[" * 200, b"&a", b"*a", b"!!", b": ", b"\n", b"-", b"{", b"NaN", b"1e999", b"9" * 5000, b"null", b"\xff",
     b"\x00", b'"\\ud800"', b"\x1b[2J", b"\r", b"- - ", b"!!set", b"2025-13-45", b"0x", b"true", b"-1", b'"x"', b"}"]
)  # fmt: skip
NAMES = ["config.yaml", "events.jsonl", "dataset.json", "adapter/manifest.json"]
CHANGE = st.tuples(st.sampled_from(NAMES), st.floats(0, 1), st.integers(0, 60), BYTES)
MUTATIONS = st.lists(CHANGE, min_size=1, max_size=6)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations=MUTATIONS)
def test_any_bytes_anywhere(runs_dir, mutations):
    """Cut out, put in, anywhere in any file: nothing is raised, and the other run is listed."""
    shutil.rmtree(runs_dir, ignore_errors=True)
    make(runs_dir / "good")
    folder = make(runs_dir / "bad")
    (folder / "dataset.json").write_text(json.dumps({"report": {"kept": 3}, "source": "x"}))
    for name, where, length, put in mutations:
        file = folder / name
        data = file.read_bytes()
        at = int(where * len(data))
        file.write_bytes(data[:at] + put + data[at + length :])
    bad = folders.find("bad")
    found = {r.id: views.run_label(r.id, known.brief(r)) for known in [_looked()] for r in known.runs()}
    assert found["good"] == "good · finished" and set(found) == {"good", "bad"}
    state = bad.state()
    for text in (views.head("bad", state, bad.problem()), views.tiles(state), views.logs(state), found["bad"]):
        text.encode()
    curves.view(curves_view.made(state)).encode()
    assert isinstance(bad.dataset(), dict) and isinstance(bad.problem(), str)
    assert isinstance(checkpoints.problem(folder / "adapter"), str)
    assert cli.main(["runs", "list", "--json"]) == 0 and cli.main(["runs", "show", "bad"]) in (0, 1)


def _looked():
    from kto_core.runs.run_list import RunList

    known = RunList()
    known.look(whole=True, patient=True)
    return known


def test_the_good_events_are_good():
    assert events.fold(GOOD).state == "finished" and text_of(GOOD).count("\n") == 3
