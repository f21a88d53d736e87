"""The run's side of the Train tab without a browser: what a tick sends, the picker, a rate's trials; the demo panel."""

import json

import pytest

from kto_core import jobs
from kto_core.config import resolving
from kto_core.errors import KTOError
from kto_core.runs import folders, run
from kto_core.runs.events import EventLog
from kto_studio import demo_panel
from kto_studio.shared import data_sources, live
from kto_studio.train import form as train_form
from kto_studio.train import run_side
from tests.support.train_tab import data, fresh  # noqa: F401 (fixtures)

EVIL = "<img src=x onerror=alert(1)>"


def form(preset: str = "demo", model: str | None = None, **values) -> dict:
    found = train_form.empty(preset)
    return found | {"values": values, "model": model or found["model"]}


def make_run(data: str, steps: int = 3, state: str = "training", name: str = "") -> run.Run:
    overrides = {"data": data_sources.locate(data)[0], **({"run_name": name} if name else {})}
    made = folders.create(resolving.resolve("demo", overrides, origin="test"))
    log = EventLog(made.path / "events.jsonl")
    log.status(state, total_steps=10)
    for step in range(1, steps + 1):
        log.metric(step, loss=0.5 - step / 100, kl=0.01, learning_rate=1e-4)
    log.log(EVIL)
    live.forget()
    return made


def plain(value) -> str:
    return str(value.get("value", "") if isinstance(value, dict) else value)


@pytest.fixture
def side():
    """The run side of the tab, built: (Shown, its ticks)."""
    import gradio as gr

    from kto_studio.shared.context import Context

    with gr.Blocks() as blocks, gr.Tabs() as tabs, gr.Tab("Train"):
        data, chosen = gr.BrowserState(""), gr.BrowserState("")
        ctx = Context(blocks, tabs, gr.Timer(1), data, chosen, gr.State(None), gr.State(None))
        shown = run_side.build(ctx)
    return shown, [fn for fn, *_ in ctx.ticks]


def text_of(shown, run_id: str) -> str:
    return " ".join(plain(v) for v in shown.everything(run_id))


def test_a_tick_sends_only_what_is_new(data, side):
    shown, ticks = side
    made = make_run(data, state="finished")
    text = text_of(shown, made.id)
    assert made.id in text and "0.4700" in text and EVIL not in text and "&lt;img" in text
    seen = [tick("", None)[-1] for tick in ticks]
    for tick, before in zip(ticks, seen, strict=True):
        assert all(isinstance(v, dict) and "value" not in v for v in tick("", before)), "nothing new: nothing sent"
    EventLog(made.path / "events.jsonl").metric(4, loss=0.1)
    new = " ".join(plain(v) for tick, before in zip(ticks, seen, strict=True) for v in tick("", before))
    assert "0.1000" in new
    buttons = ticks[1]("", seen[1])
    assert all(isinstance(v, dict) and "value" not in v for v in buttons), "what can be done is the same: not sent"


def test_a_run_without_a_process_is_offered_for_resume(data, side):
    made = make_run(data)
    text = text_of(side[0], made.id)
    assert "Interrupted" in text and "after step 3" in text


def test_the_picker_is_corrected_where_it_shows_another_run(data, side):
    first, second = make_run(data, state="finished"), make_run(data, state="finished", name="Short A")
    _, ticks = side
    seen = ticks[0](first.id, None, first.id)[-1]
    assert "value" not in ticks[0](first.id, seen, first.id)[0]
    sent = ticks[0](first.id, seen, second.id)[0]
    assert sent["value"] == first.id and any("Short A" in label for label, _ in sent["choices"])


def test_a_run_that_is_watched_stays_when_the_next_one_begins(data, side, monkeypatch):
    first, second = make_run(data, state="finished"), make_run(data)
    monkeypatch.setattr(live, "active", lambda: second)
    assert run_side.stay("")[0] == second.id and "value" not in run_side.stay(first.id)[0]
    shown = {c.elem_id: v for c, v in zip(side[0].outputs, side[0].everything(first.id), strict=True)}
    assert shown["train-other"]["visible"] is True
    shown = {c.elem_id: v for c, v in zip(side[0].outputs, side[0].everything(second.id), strict=True)}
    assert shown["train-other"]["visible"] is False


def test_without_a_run_the_page_says_what_to_do_and_a_deleted_run_is_gone(data, side):
    assert "Start training" in text_of(side[0], "")
    made = make_run(data, state="finished")
    folders.delete(made)
    live.forget()
    assert made.id not in text_of(side[0], made.id)


# ---- the demo


RESULT = {
    "run": "r",
    "seconds": 200.0,
    "habit": {
        "before": {"words": 61.4, "short_share": 0.04, "right_share": 0.66},
        "after": {"words": 9.8, "short_share": 0.92, "right_share": 0.71},
    },
    "margin": 0.73,
    "auc": 0.98,
    "samples": [{"prompt": "Why?", "base": EVIL, "tuned": "Because."}],
}


def test_the_demo_shows_before_and_after_as_text():
    shown = demo_panel.view(RESULT)
    assert "61 → 10" in shown and "4 % → 92 %" in shown and "+0.730" in shown and "0.98" in shown
    assert "Because." in shown and EVIL not in shown and "3 min 20 s" in shown


def test_the_demos_result_comes_back_from_disk_and_a_broken_one_does_not(data):
    made = make_run(data, state="finished")
    assert demo_panel.latest() == (None, None)
    for broken in ("{", "[]", "{}", json.dumps(RESULT | {"habit": 1})):
        (made.path / demo_panel.RESULT).write_text(broken)
        assert demo_panel.latest() == (None, None)
    (made.path / demo_panel.RESULT).write_text(json.dumps(RESULT))
    assert demo_panel.latest() == (made, RESULT)
    first = demo_panel.refresh(None)
    assert "61 → 10" in plain(first[1]) and all("value" not in v for v in demo_panel.refresh(first[-1]))


def test_while_the_demo_runs_its_run_is_shown_and_its_result_is_kept(data, monkeypatch):
    import threading

    made, go = make_run(data, state="finished"), threading.Event()

    def run_demo(*, progress, cancel, on_run):
        on_run(made)
        progress(0.5, "half")
        began.set()
        go.wait(30)
        return RESULT | {"run": made.id}

    began = threading.Event()
    monkeypatch.setattr("kto_core.demo.run_demo", run_demo)
    job = jobs.start(demo_panel.JOB + "training", demo_panel.work)
    assert began.wait(30)
    try:
        shown = demo_panel.refresh(None)
        assert demo_panel.latest() == (made, None) and shown[0]["interactive"] is False and not shown[1]["visible"]
    finally:
        go.set()
        job.thread.join(30)
    assert job.state == "done", job.error
    assert json.loads((made.path / demo_panel.RESULT).read_text())["run"] == made.id
    assert demo_panel.refresh(None)[0]["interactive"] is True


def test_what_is_raised_has_no_path_of_this_machine(data, tmp_path):
    with pytest.raises(KTOError) as e:
        train_form.resolve(form() | {"adapter": "../../etc"}, data)
    assert str(tmp_path) not in str(e.value)


def test_the_trials_of_a_rate_are_a_table_and_a_curve(data):
    from kto_core.runs import rates
    from kto_studio.train import rate_view

    made = make_run(data)
    before = rate_view.key(made)
    assert rate_view.values(made)[0]["visible"] is False
    trials = (rates.Trial(9e-5, 0.41, (0.41,), 0.9, 0.2, -0.7, 4.0), rates.Trial(2.9e-4, None))
    rates.write(made.path, rates.Found(None, most=5, steps=10, rows=64, trials=trials[:1]))
    assert "1 of at most 5 rates" in rate_view.values(made)[1] and rate_view.key(made) != before
    rates.write(made.path, rates.Found(9e-5, "trials", EVIL, steps=10, rows=64, trials=trials))
    card, text, plot = rate_view.values(made)
    assert card["visible"] and "Learning rate 9e-5" in text and "0.4100" in text and "NaN" in text
    assert EVIL not in text and 'aria-current="true"' in text
    assert 'id="plot-rate"' in plot and "<b>0.41</b>" in plot  # one point is shown too
    (made.path / rates.FILE).write_text("[]")
    assert rate_view.values(made)[0]["visible"] is False and rate_view.values(None)[1] == ""
