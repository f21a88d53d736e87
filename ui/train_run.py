"""The run side of the Train tab: which run, its state, curves, log, and what can be done with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from kto_core import run as runs
from kto_core.errors import RunError
from ui import live, views
from ui.context import Context

# through the queue: an error that is raised outside of it shows no toast, but a failed request in the console
QUICK = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
HEIGHT = 200  # of a plot, in pixels
RUNNING = ("preparing", "training", "stopping")


@dataclass
class Shown:
    """The components of this side that `refresh` has values for, in order."""

    picker: gr.Dropdown
    head: gr.HTML
    stop: gr.Button
    resume: gr.Button
    chat: gr.Button
    export: gr.Button
    delete: gr.Button
    confirm: gr.Row
    sure: gr.HTML
    tiles: gr.HTML
    grid: gr.Column
    plots: list[gr.LinePlot]
    log: gr.Column
    logs: gr.HTML
    download: gr.DownloadButton
    seen: gr.State

    @property
    def outputs(self) -> list:
        return [self.picker, self.head, self.stop, self.resume, self.chat, self.export, self.delete, self.confirm,
                self.sure, self.tiles, self.grid, *self.plots, self.log, self.logs, self.download,
                self.seen]  # fmt: skip


def build(ctx: Context) -> Shown:
    """Lay out and wire this side."""
    with gr.Column(elem_classes="card"):
        picker = gr.Dropdown(
            [], value=None, label="Run", info="All runs of this machine, newest first.", elem_id="train-run"
        )
        head = gr.HTML(views.no_runs(), elem_id="train-head", show_label=False)
        with gr.Row(elem_id="train-actions"):
            stop = gr.Button("Stop", variant="stop", visible=False, scale=0, min_width=110, elem_id="train-stop")
            resume = gr.Button("Resume", variant="primary", visible=False, scale=0, min_width=110,
                               elem_id="train-resume")  # fmt: skip
            chat = gr.Button("Chat with it", variant="primary", visible=False, scale=0, min_width=130,
                             elem_id="train-chat")  # fmt: skip
            export = gr.Button("Export it", visible=False, scale=0, min_width=110, elem_id="train-export")
            delete = gr.Button("Delete", visible=False, scale=0, min_width=90, elem_id="train-delete")
        with gr.Row(visible=False, equal_height=True, elem_id="train-confirm") as confirm:
            sure = gr.HTML("", show_label=False)
            yes = gr.Button("Delete for good", variant="stop", scale=0, min_width=140, elem_id="train-delete-yes")
            no = gr.Button("Keep", scale=0, min_width=90, elem_id="train-delete-no")
    tiles = gr.HTML("", elem_id="train-tiles", show_label=False)
    with gr.Column(visible=False, elem_id="train-plots") as grid:
        gr.HTML(views.legend(), show_label=False, elem_id="train-legend")
        plots = [_plot(name) for name in views.CURVES]
    with gr.Column(visible=False, elem_classes="card", elem_id="train-log") as log:
        with gr.Row(equal_height=True):
            gr.HTML("<h3>Log</h3>", elem_classes="panel-head")
            download = gr.DownloadButton("Download events", size="sm", visible=False, scale=0, min_width=150,
                                         elem_id="train-events")  # fmt: skip
        logs = gr.HTML(views.logs(views.RunState()), show_label=False, elem_id="train-logs")
    shown = Shown(picker, head, stop, resume, chat, export, delete, confirm, sure, tiles, grid, plots, log, logs,
                  download, gr.State(None))  # fmt: skip
    _wire(ctx, shown, yes, no)
    return shown


def _plot(name: str) -> gr.LinePlot:
    title, series = views.CURVES[name]
    return gr.LinePlot(
        frame([]),
        x="step",
        y="value",
        color="series",
        color_map={s: views.COLORS[s] for s in series.values()},
        x_title=" ",  # else the column's name
        y_title=" ",
        color_title="",
        colors_in_legend=[],  # Gradio's legend names no series: `views.legend` does
        tooltip="all",
        height=HEIGHT,
        label=title,
        show_label=True,
        buttons=["fullscreen"],
        y_axis_format=".1e" if name == "learning_rate" else None,
        elem_id=f"plot-{name}",
        elem_classes="plot",
    )


def frame(points: list[dict]):
    import pandas as pd  # gradio has it loaded already

    return pd.DataFrame(points, columns=["step", "value", "series"])


# ---- what is shown


def chosen(run_id: str):
    """The run to show: the chosen one, else the active one, else the newest; None if there is none."""
    listed = live.listed()
    return next((r for r in listed if r.id == run_id), None) or live.active() or next(iter(listed), None)


def signature(run) -> tuple:
    """Changes when `refresh` would show something else."""
    listed = tuple((r.id, r.state().state) for r in live.listed())
    if run is None:
        return listed, None
    s = run.state()
    return listed, (run.id, s.state, s.updated, s.step, len(s.metrics), len(s.logs), s.message, bool(run.adapter))


def refresh(run_id: str, seen) -> list:
    """Values for `Shown.outputs`; nothing new since ``seen``: all skipped."""
    run = chosen(run_id)
    now = signature(run)
    count = 15 + len(views.CURVES)
    if now == seen:
        return [gr.skip()] * count
    choices = [(_label(r), r.id) for r in live.listed()]
    picker = gr.update(choices=choices, value=run.id if run else None, visible=bool(choices))
    hidden = gr.update(visible=False)
    if run is None:
        plots = [gr.skip()] * len(views.CURVES)
        empty = views.logs(views.RunState())
        return [picker, views.no_runs(), *[hidden] * 6, "", "", hidden, *plots, hidden, empty, hidden, now]
    state = run.state()
    runs_now = state.state in RUNNING
    adapter, usable = bool(run.adapter), bool(run.adapter or state.checkpoints)
    again = state.state in ("stopped", "failed", "interrupted")
    events = run.path / "events.jsonl"
    same = bool(seen) and seen[1] and seen[1][0] == run.id
    drawn = same and seen[1][4] == now[1][4]  # no new point since
    plots = [gr.skip()] * len(views.CURVES) if drawn else [_points(state, name) for name in views.CURVES]
    stopping = state.state == "stopping"
    return [
        picker,
        views.head(run.id, state),
        gr.update(visible=runs_now, value="End now" if stopping else "Stop"),
        gr.update(visible=again, variant="secondary" if usable and not state.error else "primary"),
        gr.update(visible=usable and not runs_now),
        gr.update(visible=adapter and not runs_now),
        gr.update(visible=not runs_now),
        gr.skip() if same else hidden,
        gr.skip(),
        views.tiles(state),
        gr.update(visible=bool(state.metrics)),
        *plots,
        gr.update(visible=True),
        views.logs(state),
        gr.update(visible=events.is_file(), value=str(events)),
        now,
    ]


def _points(state, name: str):
    points = views.curve(state, name)
    return gr.update(value=frame(points), visible=bool(points))


def _label(run) -> str:
    return views.run_label(run.id, run.state())


def _size(folder: Path) -> str:
    return views.size(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()))


# ---- what is done


def _wire(ctx: Context, shown: Shown, yes: gr.Button, no: gr.Button) -> None:
    outputs = shown.outputs

    def tick(run_id: str, seen):
        return refresh(run_id, seen)

    def opened(run_id: str):
        return refresh(run_id, None)

    def pick(run_id: str | None):
        return (run_id or "", *refresh(run_id or "", None))

    def the_run(run_id: str | None):
        if not run_id:
            raise RunError("There is no run yet. Start one first.")
        return runs.find(Path(run_id).name)

    def stop(run_id: str | None):
        run = the_run(run_id)
        run.stop()
        return refresh(run.id, None)

    def resume(run_id: str | None):
        run = the_run(run_id)
        try:
            runs.resume(run)
        finally:
            live.forget()
        return (run.id, *refresh(run.id, None))

    def ask(run_id: str | None):
        run = the_run(run_id)
        text = f"Delete run {run.id} with its checkpoints, adapter and exports ({_size(run.path)})?"
        return gr.update(visible=True), views.note(text, "bad")

    def delete(run_id: str | None):
        run = the_run(run_id)
        try:
            run.delete()
        finally:
            live.forget()
        return ("", *refresh("", None))

    def zoom(event: gr.SelectData):
        low, high = event.index
        return [gr.update(x_lim=[low, high])] * len(shown.plots)

    def whole():
        return [gr.update(x_lim=None)] * len(shown.plots)

    ctx.on_tick(tick, outputs, [ctx.chosen_run, shown.seen])
    ctx.on_load(opened, outputs, [ctx.chosen_run])
    chosen_too = [ctx.chosen_run, *outputs]
    shown.picker.input(ctx.guarded(pick), [shown.picker], chosen_too, **QUICK)
    shown.stop.click(None, None, [shown.stop], js="() => 'Stopping…'", queue=False)  # answers before the server does
    shown.stop.click(ctx.guarded(stop), [shown.picker], outputs, **QUICK)
    shown.resume.click(ctx.guarded(resume), [shown.picker], chosen_too, trigger_mode="once", **QUICK)
    shown.delete.click(ctx.guarded(ask), [shown.picker], [shown.confirm, shown.sure], **QUICK)
    yes.click(ctx.guarded(delete), [shown.picker], chosen_too, trigger_mode="once", **QUICK)
    no.click(lambda: gr.update(visible=False), None, [shown.confirm], **QUICK)
    for plot in shown.plots:
        plot.select(ctx.guarded(zoom), None, shown.plots, **QUICK)
        plot.double_click(ctx.guarded(whole), None, shown.plots, **QUICK)
    for button, tab in ((shown.chat, "chat"), (shown.export, "export")):
        # emptied first, so that the other tabs hear of a change even where this run was the chosen one before
        button.click(lambda tab=tab: ("", gr.Tabs(selected=tab)), None, [ctx.chosen_run, ctx.tabs], **QUICK).then(
            lambda run_id: run_id or "", [shown.picker], [ctx.chosen_run], **QUICK
        )
