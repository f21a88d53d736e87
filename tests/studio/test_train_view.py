"""The Train tab's form and plan without a browser: problems, origins, what fits."""

import json

import pytest

from kto_core.config import resolving
from kto_core.errors import DataError, ModelError
from kto_studio.shared import data_sources, readings
from kto_studio.train import form as train_form
from kto_studio.train import plan as train_plan
from tests.support.train_tab import data, fresh  # noqa: F401 (fixtures)

EVIL = "<img src=x onerror=alert(1)>"


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
