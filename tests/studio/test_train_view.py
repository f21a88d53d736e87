"""The Train tab without a browser: form, problems, origins, plan, what a tick sends; the demo panel."""

import json

import pytest

from kto_core import jobs
from kto_core.config import resolving
from kto_core.errors import DataError, KTOError, ModelError
from kto_core.runs import folders, run
from kto_core.runs.events import EventLog
from kto_studio import demo_panel
from kto_studio.data import jobs as data_jobs
from kto_studio.shared import data_sources, live, readings
from kto_studio.train import form as train_form
from kto_studio.train import plan as train_plan
from kto_studio.train import run_side
from tests.support.training import make_data

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A data folder of its own, and nothing remembered from the test before."""
    monkeypatch.setenv("KTO_STUDIO_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    live.forget()
    yield
    live.forget()


@pytest.fixture
def data(tmp_path) -> str:
    """Id of a small data set that has been read."""
    make_data(tmp_path / "data" / "sums.jsonl")
    found = data_jobs.look("file:sums.jsonl", "demo", 512, start=True)
    while found.reading is not None and found.reading.running:
        found.reading.thread.join(30)
        found = data_jobs.look("file:sums.jsonl", "demo", 512, start=True)
    assert found.loaded is not None
    return "file:sums.jsonl"


def form(preset: str = "demo", model: str | None = None, **values) -> dict:
    found = train_form.empty(preset)
    return found | {"values": values, "model": model or found["model"]}


# ---- the form


def test_every_field_of_the_configuration_has_one_control_with_help():
    names = [c.name for c in train_form.controls()]
    elsewhere = {c.name for c in resolving.cli_fields() if c.group == "Hidden"} | train_form.ELSEWHERE
    assert (
        len(names) == len(set(names)) and set(names) | elsewhere == {c.name for c in resolving.cli_fields()} | elsewhere
    )
    for c in train_form.controls():
        w = train_form.widget(c, train_form.choice(c, getattr(resolving.resolve("demo", {}).config, c.name)))
        assert w.label and w.info == c.description


@pytest.mark.parametrize("preset", sorted(resolving.presets()))
def test_an_untouched_form_is_the_preset_and_only_changes_are_sent(preset):
    empty = train_form.empty(preset)
    read = train_form.read(preset, empty["model"], "", *train_form.write(empty))
    assert read == empty
    mine = train_form.resolve(read | {"values": {"beta": 0.3}})
    assert mine.config.beta == 0.3 and mine.origins["beta"] == train_form.ORIGIN
    assert mine.origins["r"] == f"preset {preset}" and mine.origins["seed"] == "default"


def test_a_form_survives_the_browser_and_junk_does_not():
    kept = json.loads(json.dumps(form("7b", beta=0.2, max_steps=5)))
    assert train_form.restore(kept) == kept
    for junk in (None, [], "x", {"preset": "zz", "values": {"nope": 1, "beta": [1]}, "adapter": "/etc"}):
        assert train_form.restore(junk) == train_form.empty()
    gone = train_form.restore({"preset": "demo", "adapter": "20260101-000000-demo-abcd"})  # deleted meanwhile
    assert train_form.problems(gone)[0].endswith(
        f"The adapter of run {gone['adapter']} no longer exists. Choose another run, or a new adapter."
    )
    assert train_form.adapter_choices(gone["adapter"])[-1] == (
        f"Run {gone['adapter']} (deleted)",
        gone["adapter"],
    )


def test_all_problems_come_at_once_and_a_path_is_no_model(tmp_path):
    found = train_form.problems(form(beta=-1.0, max_length=3, learning_rate=7.0))
    assert len(found) == 3 and {p.split(":")[0] for p in found} == {"beta", "max_length", "learning_rate"}
    (found,) = train_form.problems(form(max_length=8193))
    assert found.startswith("max_length: must be 16 to 8192, the context length of demo, not 8193.")
    for name in ("", str(tmp_path), "../x", "a/b/c"):
        with pytest.raises(ModelError):
            train_form.resolve(form(model=name or " "))


def test_origins_and_changes_are_said_and_escaped():
    shown = train_form.origins(train_form.resolve(form(beta=0.3, run_name=EVIL)))
    assert "preset demo" in shown and "user interface" in shown and EVIL not in shown
    assert "Beta <b>0.3</b> instead of 0.5" in train_form.changed(form(beta=0.3))
    assert EVIL not in train_form.changed(form(model=EVIL)) and "preset <b>demo</b>" in train_form.changed(form())


# ---- the plan


def test_the_plan_counts_steps_and_says_what_fits(data):
    shown = train_plan.view(form(), data)
    assert 'data-verdict="cpu"' in shown and "<span>Steps</span><b>3</b>" in shown  # 24 rows, 8 a step
    assert "<span>Steps</span><b>5</b>" in train_plan.view(form(max_steps=5), data)


@pytest.mark.parametrize(("gib", "verdict"), [("80", "fits"), ("4", "does not fit")])
def test_the_plan_of_a_gpu_says_what_would_help(data, monkeypatch, gib, verdict):
    from kto_core.hardware.gpus import Device

    monkeypatch.setattr("kto_core.planning.checks.check_size", lambda *a, **k: None)
    monkeypatch.setattr("kto_core.planning.checks.check_libraries", lambda *a, **k: None)
    card = Device(0, "A card", total_gib=float(gib), free_gib=float(gib), used_by_others_gib=0.0, capability=(8, 9))
    monkeypatch.setattr("kto_core.hardware.gpus.devices", lambda *a, **k: [card])
    shown = train_plan.view(form("7b"), data)
    assert f'data-verdict="{verdict}"' in shown
    assert ("<p>" in shown.partition("memory-bar")[2].partition("card-text")[0]) == (verdict != "fits")


def test_the_plan_says_that_the_weights_are_divided(data, monkeypatch):
    from kto_core.hardware.gpus import Device

    monkeypatch.setattr("kto_core.planning.checks.check_size", lambda *a, **k: None)
    card = Device(0, "A card", total_gib=5.0, free_gib=5.0, used_by_others_gib=0.0, capability=(8, 9))
    monkeypatch.setattr("kto_core.hardware.gpus.devices", lambda *a, **k: [card, card])
    said = "The base model's weights are sharded across 2 GPUs."
    assert said in train_plan.view(form("7b", num_gpus=2), data)
    assert said not in train_plan.view(form("7b", num_gpus=2, shard="false"), data)


def test_the_plan_says_that_inputs_wait_in_main_memory(data, monkeypatch):
    from kto_core.cli.train import describe
    from kto_core.engine.packing.passes import OFFLOADED
    from kto_core.planning.memory import MemoryPlan

    shape = ("fits", "", {"weights": 4.0}, 32, 32)
    for offload in (True, False):
        plan = MemoryPlan(20.0, 24.0, *shape, offload, 4096, False, "m", "A card")
        monkeypatch.setattr("kto_core.planning.memory.plan", lambda *a, plan=plan, **k: plan)
        monkeypatch.setattr("kto_core.planning.checks.check_size", lambda *a, **k: None)
        assert (OFFLOADED in train_plan.view(form("7b"), data)) is offload
        monkeypatch.setattr("kto_core.cli.data.describe", lambda *a: "")
        found = {"config": {"preset": "7b"}, "data": {}, "steps": 3, "memory": plan.to_dict()}
        assert (OFFLOADED in describe(found, {})) is offload


def test_thresholds_of_the_data_tab_lift_the_refusal_of_a_scale(tmp_path):
    rows = [{"prompt": f"Q{n}?", "completion": "A.", "label": n % 5 + 1} for n in range(10)]
    (tmp_path / "stars.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    stars = data_sources.add_upload(str(tmp_path / "stars.jsonl"))
    data_sources.load(stars)
    shown = train_plan.view(form(), stars)
    assert "Say in the Data tab where good begins" in shown and "--good-from" not in shown
    readings.keep(stars, good_from=4, bad_to=2)
    assert "still being read" in train_plan.view(form(), stars)
    data_sources.load(stars)
    shown = train_plan.view(form(), stars)
    assert "note-bad" not in shown and "<b>8</b>" in shown
    config = train_form.resolve(form(), stars).config
    assert (config.good_from, config.bad_to) == (4, 2)


def test_problems_stand_in_the_plans_place_and_are_escaped(data):
    shown = train_plan.view(form(beta=-1.0, max_length=3, run_name=EVIL), data)
    assert 'role="alert"' in shown and shown.count("<li>") >= 2 and EVIL not in shown
    assert "No dataset is selected. Choose one in the Data tab." in train_plan.view(form(), "")
    for gone in ("", "file:gone.jsonl"):
        with pytest.raises(DataError):
            train_plan.begin(form(), gone)


def test_a_problem_has_the_controls_name_marks_it_and_start_is_not_ready(data):
    shown = train_plan.view(form(test_size=7.0), data)
    assert "Validation split:" in shown and "test_size:" not in shown and 'data-fields="test_size"' in shown
    assert train_plan.ready(form(), data) and not train_plan.ready(form(test_size=7.0), data)
    assert not train_plan.ready(form(), "")


def test_weights_are_advised_for_the_rows_that_train(tmp_path):
    """Most good rows are too long: what is left is lopsided the other way."""
    from kto_core.data.report import Report
    from kto_studio.data import view as data_view

    report = Report(rows=790, kept=787, desirable=360, undesirable=427, fitting=(198, 405), too_long=184)
    field, weight = data_view.advised(report)
    assert field == "desirable_weight" and 1 <= weight * 198 / 405 <= 1.5
    assert "198 good, 405 bad" in data_view.balance(report) and report.to_dict()["weights"]["desirable"][0] > 2
    shown = data_view.summary(report)
    assert "<b>790</b>" in shown and "<b>603</b>" in shown and "<b>187</b>" in shown
    assert "187 left out: 3 dropped, 184 too long" in shown and sum(report.left_out.values()) + 603 == 790


def test_the_plan_says_that_the_loss_is_lopsided(tmp_path):
    rows = [{"prompt": f"Q{n}?", "completion": "A.", "label": n % 6 == 0} for n in range(60)]
    (tmp_path / "uneven.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    uneven = data_sources.add_upload(str(tmp_path / "uneven.jsonl"))
    data_sources.load(uneven)
    shown = train_plan.view(form(), uneven)
    assert "10 good and 50 bad rows count 0.2 to 1" in shown and "desirable_weight from 5 to 7.5" in shown
    assert "lopsided" not in train_plan.view(form(desirable_weight=6.0), uneven)


def test_another_preset_keeps_what_the_user_set():
    mine = form("demo", beta=0.37, desirable_weight=1.5) | {"adapter": "a"}
    new = train_form.carry(mine, "7b")
    assert new == train_form.empty("7b") | {"values": {"beta": 0.37, "desirable_weight": 1.5}}
    same = train_form.write(train_form.empty("3b"))[[c.name for c in train_form.controls()].index("beta")]
    assert train_form.carry(form("demo", beta=same), "3b")["values"] == {}, "what the preset has is no change"


def test_a_dry_run_answers_in_the_background_with_exact_numbers(data, demo_model):
    before = train_plan.signature(form(), data)
    job = train_plan.begin(form(), data)
    assert train_plan.begin(form(), data) is job, "pressed twice, asked once"
    job.thread.join(120)
    assert job.state == "done", job.error
    assert train_plan.signature(form(), data) != before
    shown = train_plan.view(form(), data)
    assert "Checked: every row fits." in shown and "<span>Longest row</span>" in shown
    assert "Checked" not in train_plan.view(form(beta=0.2), data)  # another form is another plan


def test_the_plan_tells_what_a_run_will_do_at_its_rate(data):
    assert "change almost nothing; auto would take" in train_plan.view(form(learning_rate="5e-7"), data)
    assert "auto tries learning rates from" in train_plan.view(form(learning_rate="auto"), data)


def test_without_a_gpu_a_larger_model_is_planned_for_another_machine(data, monkeypatch):
    monkeypatch.setattr("kto_core.hardware.gpus.devices", list)
    shown = train_plan.view(form("7b"), data)
    assert "Cannot train on this machine" in shown and "On a GPU of 24 GiB:" in shown and "of 24.0 GiB" in shown
    assert "On a GPU of" not in train_plan.view(form("7b", report_to="wandb"), data)


def test_a_rate_is_a_word_or_a_number():
    import gradio as gr

    (control,) = (c for c in train_form.controls() if c.name == "learning_rate")
    widget = train_form.widget(control, 5e-7)
    assert isinstance(widget, gr.Dropdown) and widget.allow_custom_value and widget.value == "5e-7"
    assert ("5e-7, the earlier tool's rate", "5e-7") in widget.choices
    kept = train_form.restore({"preset": "3b", "values": {"learning_rate": 1e-4}})  # of a number's field
    place = [c.name for c in train_form.controls()].index("learning_rate")
    assert train_form.write(kept)[place] == "1e-4" and train_form.write(train_form.empty("3b"))[place] == "auto"
    assert train_form.write(train_form.empty("demo"))[place] == "1e-4"
    assert train_form.resolve(kept).config.learning_rate == 1e-4
    assert "auto, rule, or a number above 0" in train_form.problems(form(learning_rate="fast"))[0]


# ---- the run's side


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
