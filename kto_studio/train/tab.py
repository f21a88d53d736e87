"""The Train tab: settings on the left, the run on the right. What is shown of a run is read from its folder only."""

from __future__ import annotations

import functools
import html
from types import SimpleNamespace

import gradio as gr

from kto_core.config import resolving
from kto_core.errors import BusyError, DataError, RunError
from kto_core.planning import checks
from kto_core.runs import folders
from kto_core.training import start as starting
from kto_studio.shared import data_sources, live, model_choices
from kto_studio.shared.context import QUICK, Context, Event
from kto_studio.shared.prose import in_app, prose

from . import cache_view, plan, run_side
from . import form as train_form

START = "Start training"
LAST: Event = {**QUICK, "trigger_mode": "always_last"}  # typing: the newest value wins


def build(ctx: Context) -> None:
    ui = SimpleNamespace()
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=400, elem_id="train-form"):
            ui.ready = gr.HTML("", visible="hidden", elem_id="train-ready")  # empty: the form is locked (style.css)
            _what(ui)
            _plan(ui)
            _settings(ui)
            cache_view.build(ctx)
        with gr.Column(scale=3, min_width=560, elem_id="train-run-side"):
            shown = run_side.build(ctx)
    ui.form = gr.State(train_form.empty())
    ui.seen = gr.State(None)  # what the plan was made of
    ui.kept = ctx.form
    _form_events(ctx, ui)
    _start_events(ctx, ui, shown)


# ---- layout


def _what(ui) -> None:
    form = train_form.empty()
    with gr.Column(elem_classes="card"):
        gr.HTML("<h2>New run</h2>", elem_classes="panel-head")
        ui.preset = gr.Radio(
            train_form.preset_choices(),
            value=form["preset"],
            label="Preset",
            info="Sets everything for one model size; what you set yourself stays. demo runs on any computer; the "
            "others need an NVIDIA GPU.",
            elem_id="train-preset",
        )
        ui.note = gr.HTML(train_form.preset_note(form["preset"]), show_label=False, elem_id="train-note")
        with gr.Row(equal_height=True):
            ui.data = gr.HTML("", elem_id="train-data", show_label=False)
            ui.change = gr.Button("Change dataset", size="sm", scale=0, min_width=120, elem_id="train-change-data")
        with gr.Row(equal_height=True):
            ui.model = gr.Dropdown(
                train_form.model_choices(form["preset"]),
                value=form["model"],
                label="Model",
                info="The preset's model, an alternative, or a Hub id (owner/name).",
                allow_custom_value=True,
                elem_id="train-model",
            )
            ui.adapter = gr.Dropdown(
                [("A new adapter", "")],
                value="",
                label="Start from",
                info="A new adapter, or the adapter of an earlier run, which is then the reference model.",
                elem_id="train-adapter",
            )
        ui.name = _control(next(c for c in train_form.controls() if c.name == "run_name"))


def _control(c):
    """The widget of a setting, as the preset that a new page shows has it."""
    base = resolving.resolve(train_form.empty()["preset"], {}).config
    return train_form.widget(c, train_form.choice(c, getattr(base, c.name)))


def _plan(ui) -> None:
    with gr.Column(elem_classes="card"):
        ui.plan = gr.HTML("", elem_id="train-plan", show_label=False)
        ui.changed = gr.HTML("", elem_id="train-changed", show_label=False)
        with gr.Row():
            ui.start = gr.Button(START, variant="primary", scale=3, min_width=120, elem_id="train-start")
            ui.queue = gr.Button("Add to queue", visible=False, scale=1, min_width=124, elem_id="train-queue")
            ui.check = gr.Button("Check settings", size="md", scale=1, min_width=136, elem_id="train-check")
            ui.reset = gr.Button("Reset", size="md", scale=1, min_width=64, interactive=False, elem_id="train-reset")


def _settings(ui) -> None:
    controls = train_form.controls()
    main, more = controls[: len(train_form.MAIN)], controls[len(train_form.MAIN) :]
    made = {"run_name": ui.name}
    with gr.Column(elem_classes="card"):
        gr.HTML("<h2>Settings</h2>", elem_classes="panel-head")
        _pairs(made, main)
    with gr.Accordion("All settings", open=False, elem_id="train-all"):
        rest = [c for c in more if c.name not in made]
        for group in dict.fromkeys(c.group for c in rest):
            gr.HTML(f"<h3>{group}</h3>", elem_classes="panel-head group-head")
            _pairs(made, [c for c in rest if c.group == group])
    with gr.Accordion("All values and where they come from", open=False, elem_id="train-origins"):
        ui.origins = gr.HTML("", show_label=False)
    ui.values = [made[c.name] for c in controls]


def _pairs(made: dict, controls: list) -> None:
    for at in range(0, len(controls), 2):
        with gr.Row(equal_height=True):
            made |= {c.name: _control(c) for c in controls[at : at + 2]}


# ---- the form


def _data_line(form: dict, data_id: str) -> str:
    name = data_sources.name(data_id) if data_id else ""
    if not name:
        return f'<div class="note note-bad">{data_sources.NONE}</div>'
    found = plan.look(form, data_id)
    if found.report is not None:
        good, bad = found.report.fitting
        out = sum(found.report.left_out.values())
        rest = f"{good + bad:,} rows: {good:,} 👍 Good, {bad:,} 👎 Bad" + (f"; {out:,} left out" if out else "")
    else:
        rest = found.problem or (found.reading.error if found.reading else "") or "still being read"
    return f'<div class="note"><b>{html.escape(name)}</b><br>{prose(rest)}</div>'


def _judged(form: dict, data_id: str) -> list:
    """Values for `_outputs`: all that follows from a form."""
    if train_form.problems(form, data_id):
        origins = '<p class="card-text">Available once all settings are valid.</p>'
        model = gr.skip()
    else:
        found = train_form.resolve(form, data_id)
        origins = train_form.origins(found)
        model = {"model": found.config.model, "max_length": found.config.max_length}
    touched = bool(form["values"] or form["adapter"]) or form["model"] != train_form.empty(form["preset"])["model"]
    return [
        form,
        plan.signature(form, data_id),
        form,
        plan.view(form, data_id),
        origins,
        train_form.changed(form),
        gr.update(interactive=touched),
        _data_line(form, data_id),
        model,
        gr.update(variant="primary" if plan.ready(form, data_id) else "secondary"),  # a press says why it cannot start
    ]


def _outputs(ctx: Context, ui) -> list:
    return [ui.form, ui.seen, ui.kept, ui.plan, ui.origins, ui.changed, ui.reset, ui.data, ctx.chosen_model, ui.start]


def _filled(form: dict) -> list:
    """Values of preset, note, model, adapter and all settings."""
    return [
        form["preset"],
        train_form.preset_note(form["preset"]),
        gr.update(choices=train_form.model_choices(form["preset"]), value=form["model"]),
        gr.update(choices=train_form.adapter_choices(form["adapter"]), value=form["adapter"]),
        *train_form.write(form),
    ]


def _form_events(ctx: Context, ui) -> None:
    widgets = [ui.preset, ui.note, ui.model, ui.adapter, *ui.values]
    typed = [ui.preset, ui.model, ui.adapter, *ui.values]
    outputs = _outputs(ctx, ui)

    def everything(form: dict, data_id: str) -> list:
        return [*_filled(form), *_judged(form, data_id)]

    def opened(kept: dict, data_id: str):
        return everything(train_form.restore(kept), data_id)

    def chose_preset(preset: str, before: dict, data_id: str, *values):
        """What the user set stays: what the page shows is read as it was, with the preset before."""
        mine = train_form.read(before["preset"], *values)
        return everything(train_form.carry(mine, preset), data_id)

    def reset(preset: str, data_id: str):
        return everything(train_form.empty(preset), data_id)

    def edited(data_id: str, *values):
        return _judged(train_form.read(*values), data_id)

    def settled(form: dict, data_id: str, *values):
        """Two answers may overtake each other: the form ends up as what the page shows, which a run is started from."""
        now = train_form.read(*values)
        return [gr.skip()] * len(outputs) if now == form else _judged(now, data_id)

    def advised(advice: dict | None, form: dict, data_id: str):
        """Weights that the Data tab advises: taken over as if typed."""
        if not advice:
            return (gr.skip(),) * (len(widgets) + len(outputs))
        both = {"desirable_weight": 1.0, "undesirable_weight": 1.0} | advice
        base = resolving.resolve(form["preset"], {}).config
        values = form["values"] | both
        values = {k: v for k, v in values.items() if k not in both or v != getattr(base, k)}
        return everything(form | {"values": values}, data_id)

    def continued(asked: dict | None, data_id: str):
        """From the adapter of a run: its preset and model, and nothing else of the form before."""
        if not asked:
            return (gr.skip(),) * (len(widgets) + len(outputs))
        return everything(train_form.continuing(asked["run"]), data_id)

    def tick(form: dict, data_id: str, seen):
        """The plan follows what is learned of the data meanwhile."""
        if plan.signature(form, data_id) == seen:
            return (gr.skip(),) * len(outputs)
        out = _judged(form, data_id)
        out[0] = out[2] = gr.skip()  # the form is as it was
        return out

    listed = gr.State(None)

    def adapters(form: dict, before):
        """A run that ended, or was deleted, while the page is open."""
        now = model_choices.signature()
        if now == before:
            return gr.skip(), gr.skip()
        return gr.update(choices=train_form.adapter_choices(form["adapter"])), now

    ctx.on_tick(adapters, [ui.adapter, listed], [ui.form, listed])
    filled = ctx.on_load(opened, [*widgets, *outputs], [ui.kept, ctx.chosen_data])
    for answered in (filled.then, filled.failure):  # Gradio 6.31 does not call `then` after an error
        answered(None, None, [ui.ready], js="() => '<i></i>'", queue=False)
    ctx.on_tick(tick, outputs, [ui.form, ctx.chosen_data, ui.seen])
    changes = [
        ui.preset.input(
            ctx.guarded(chose_preset),
            [ui.preset, ui.form, ctx.chosen_data, *typed[1:]],
            [*widgets, *outputs],
            **LAST,
        ),
        ui.reset.click(ctx.guarded(reset), [ui.preset, ctx.chosen_data], [*widgets, *outputs], **QUICK),
        gr.on(
            [w.input for w in (ui.model, ui.adapter, *ui.values)],
            ctx.guarded(edited),
            [ctx.chosen_data, *typed],
            outputs,
            **LAST,
        ),
        ctx.advice.change(ctx.guarded(advised), [ctx.advice, ui.form, ctx.chosen_data], [*widgets, *outputs], **QUICK),
    ]
    if ctx.go_on is not None:
        asked = [ctx.go_on, ctx.chosen_data]
        changes.append(ctx.go_on.change(ctx.guarded(continued), asked, [*widgets, *outputs], **QUICK))
    for change in changes:
        change.then(ctx.guarded(settled), [ui.form, ctx.chosen_data, *typed], outputs, **QUICK)
    ui.change.click(lambda: gr.Tabs(selected="data"), None, [ctx.tabs], **QUICK)


# ---- start


def _start_events(ctx: Context, ui, shown: run_side.Shown) -> None:
    typed = [ui.preset, ui.model, ui.adapter, *ui.values]

    def start(data_id: str, *values, queue: bool = False):
        """Create the run and start it, or have it wait for the one that trains; the page shows it from its folder."""
        form = train_form.read(*values)
        if not data_id:
            raise DataError(data_sources.NONE)
        found = train_form.resolve(form, data_id)
        checks.check_size(found.config)
        checks.check_libraries(found.config)
        loaded = data_sources.peek(data_id)
        if loaded is not None and loaded.report.problem:
            raise DataError(in_app(loaded.report.problem))
        if (other := folders.active(settle=True)) is not None and not queue:
            raise RunError(f"Run {other.id} is training. Stop it, wait until it finishes, or press “Add to queue”.")
        run = folders.create(found)
        try:
            starting.start(run, queue=queue)
        except BusyError:
            folders.delete(run)  # nothing was begun
            raise
        finally:
            live.forget()
        return run.id, *shown.everything(run.id)

    def check(data_id: str, *values):
        form = train_form.read(*values)
        plan.begin(form, data_id)
        return plan.view(form, data_id)

    ui.start.click(None, None, [ui.start], js="() => 'Starting…'", queue=False)  # answers before the server does
    started = ui.start.click(
        ctx.guarded(start), [ctx.chosen_data, *typed], [ctx.chosen_run, *shown.outputs], trigger_mode="once", **QUICK
    )
    for ended in (started.then, started.failure):  # Gradio 6.31 does not call `then` after an error
        ended(lambda: START, None, [ui.start], **QUICK)
    ui.queue.click(
        ctx.guarded(functools.partial(start, queue=True)),
        [ctx.chosen_data, *typed],
        [ctx.chosen_run, *shown.outputs],
        trigger_mode="once",
        **QUICK,
    )
    busy = gr.State(False)

    def tick(before: bool):
        """A second run can wait while one trains."""
        now = live.active() is not None
        return (gr.skip(), gr.skip()) if now == before else (gr.update(visible=now), now)

    ctx.on_tick(tick, [ui.queue, busy], [busy])
    ui.check.click(ctx.guarded(check), [ctx.chosen_data, *typed], [ui.plan], **QUICK)
