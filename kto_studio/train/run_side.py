"""The run side of the Train tab: which run, its state, curves, log, and what can be done with it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr

from kto_core.errors import RunError
from kto_core.guards import bounded
from kto_core.runs import folders
from kto_core.runs import run as runs
from kto_core.training import start as starting
from kto_studio.shared import curves, live, views
from kto_studio.shared.context import DIRECT, QUICK, Context, quiet
from kto_studio.shared.marks import mark
from kto_studio.shared.prose import note

from . import curves_view, health_view, rate_view, verdict_view

RUNNING = ("preparing", "training", "stopping")


@dataclass
class Part:
    """Components that change together: what they depend on, and their values. `seen` has what was shown last."""

    components: list
    key: Callable  # (run or None, *asked) -> tuple; a new one means new values
    values: Callable  # (run or None, *asked) -> list, one value a component
    seen: gr.Textbox
    asked: list = field(default_factory=list)  # inputs of the page that key and values take beside the run
    made: tuple = (None, None)  # the newest key and its values: every open page asks for the same
    lock: threading.Lock = field(default_factory=threading.Lock)

    def shown(self, run, key: tuple, *asked) -> list:
        """The values for a key that was asked of `run` just now."""
        with self.lock:
            if self.made[0] != key:
                self.made = (key, self.values(run, *asked))
            return self.made[1]


@dataclass
class Shown:
    """This side of the tab. Its parts are refreshed apart: an update costs the browser a copy of each component."""

    parts: list[Part]

    @property
    def outputs(self) -> list:
        """For `everything`."""
        return [c for part in self.parts for c in (*part.components, part.seen)]

    def everything(self, run_id: str) -> list:
        """Values of all outputs, after something was done."""
        run = chosen(run_id)
        keys = [part.key(run) for part in self.parts]  # before the values, which may be newer, and are then made anew
        return [v for part, key in zip(self.parts, keys, strict=True) for v in (*part.values(run), key)]


def build(ctx: Context) -> Shown:
    """Lay out and wire this side."""
    with gr.Column(elem_classes="card"):
        picker = gr.Dropdown(
            [],
            value=None,
            label="Run",
            info="All runs on this machine, newest first.",
            interactive=True,
            elem_id="train-run",
        )
        head = gr.HTML(views.no_runs(), elem_id="train-head", show_label=False)
        with gr.Row(elem_id="train-actions"):
            stop = gr.Button("Stop", variant="stop", visible=False, scale=0, min_width=110, elem_id="train-stop")
            resume = gr.Button("Resume", variant="primary", visible=False, scale=0, min_width=110,
                               elem_id="train-resume")  # fmt: skip
            chat = gr.Button("Chat with it", variant="primary", visible=False, scale=0, min_width=130,
                             elem_id="train-chat")  # fmt: skip
            export = gr.Button("Export", visible=False, scale=0, min_width=110, elem_id="train-export")
            other = gr.Button("Show the run that trains", visible=False, scale=0, min_width=200, elem_id="train-other")
            delete = gr.Button("Delete", visible=False, scale=0, min_width=90, elem_id="train-delete")
        with gr.Row(visible=False, equal_height=True, elem_id="train-confirm") as confirm:
            sure = gr.HTML("", show_label=False)
            yes = gr.Button("Delete", variant="stop", scale=0, min_width=140, elem_id="train-delete-yes")
            no = gr.Button("Cancel", scale=0, min_width=90, elem_id="train-delete-no")
    tiles = gr.HTML("", elem_id="train-tiles", show_label=False)
    verdict = verdict_view.build()
    rate = rate_view.build()
    plots, zoom = curves.component("train-plots"), gr.State(None)  # {"run", "range"}: of another run it says nothing
    health = health_view.build()
    with gr.Column(visible=False, elem_classes="card", elem_id="train-log") as log:
        with gr.Row(equal_height=True):
            gr.HTML("<h2>Log</h2>", elem_classes="panel-head")
            download = gr.DownloadButton("Download events", size="sm", visible=False, scale=0, min_width=150,
                                         elem_id="train-events")  # fmt: skip
        logs = gr.HTML(views.logs(views.RunState()), show_label=False, elem_id="train-logs")
    # The runs that the buttons and the open question are about. Kept in the page: a click is about the run that its
    # user saw, whatever the picker, the chosen run or another page hold by then. The buttons' one changes with the
    # head, which says whose buttons these are: between the answers for two parts a run may be gone.
    of_buttons, of_question = gr.Textbox(visible=False), gr.Textbox(visible=False)
    # a confirmation that is open stays open until another run is shown: it has a part of its own
    shown = Shown([
        _part([picker], _listing, _picker, [picker]),
        _part([stop, resume, chat, export, delete, download, log, other], _what_can_be_done, _controls),
        _part([confirm, of_question], _identity, lambda run: [gr.update(visible=False), ""]),
        _part([of_buttons, head, tiles], _newest, _numbers),
        _part(verdict, verdict_view.key, verdict_view.values),
        _part(rate, rate_view.key, rate_view.values),
        _part([plots], curves_view.key, curves_view.values, [zoom]),
        _part(health, health_view.key, health_view.values),
        _part([logs], _lines_known, _lines),
    ])  # fmt: skip
    buttons = {"stop": stop, "resume": resume, "chat": chat, "export": export, "other": other}
    _wire(ctx, shown, picker, buttons, of_buttons)
    _wire_zoom(ctx, plots, zoom, of_buttons)
    _wire_deletion(ctx, shown, delete, yes, no, [confirm, sure, of_question], of_buttons)
    return shown


def _part(components: list, key: Callable, values: Callable, asked: list | None = None) -> Part:
    return Part(components, key, values, mark(), asked or [])


# ---- what is shown


def chosen(run_id: str):
    """The run to show: the chosen one, else the active one, else the newest; None if there is none."""
    known = live.runs()
    return known.find(run_id) or live.active() or known.newest()


def _identity(run) -> tuple:
    return (run.id if run else None,)


def _listing(run, picked: str | None = None) -> tuple:
    """With what the picker shows: it is corrected where that is another run than the one shown."""
    return (*_identity(run), live.runs().changes, bool(run and picked and picked != run.id))


def _picker(run, picked: str | None = None) -> list:
    known = live.runs()
    choices = [(views.run_label(known.title(r), known.brief(r)), r.id) for r in known.runs()]
    return [gr.update(choices=choices, value=run.id if run else None, visible=bool(choices))]


def _what_can_be_done(run) -> tuple:
    if run is None:
        return (None,)
    s = run.state()
    events = bounded.is_file(run.path / "events.jsonl") and run.id == run.path.name
    state = s.state if events or run.alive() else "interrupted"  # made, and never started
    return run.id, state, bool(run.adapter), bool(s.checkpoints), events, s.problem, _another(run)


def _another(run) -> str:
    """The id of the run that trains, if it is not the shown one."""
    active = live.active()
    return active.id if active and active.id != run.id else ""


def _controls(run) -> list:
    if run is None:
        return [gr.update(visible=False)] * 8
    _, state, adapter, checkpoints, there, problem, another = _what_can_be_done(run)
    running, usable = state in RUNNING, adapter or checkpoints
    return [
        gr.update(visible=running, value="Stop now" if state == "stopping" else "Stop"),
        gr.update(visible=state in ("stopped", "failed", "interrupted") and not problem),
        gr.update(visible=usable and not running),
        gr.update(visible=adapter and not running),
        gr.update(visible=not running),
        gr.update(visible=there, value=str(run.path / "events.jsonl") if there else None),
        gr.update(visible=True),
        gr.update(visible=bool(another)),
    ]


def _newest(run) -> tuple:
    s = run.state() if run else None
    return (run.id, s.state, s.updated, s.message, s.error, _problem(run, s), _name(run), _about(run)) if s else (None,)


def _problem(run, state) -> str:
    """Why the run cannot be read: its settings, which the list knows, or its events."""
    known = live.runs().brief(run)
    return state.problem or (known.problem if known else "")


def _about(run) -> str:
    return views.about(live.runs().brief(run))


def _name(run) -> str:
    return live.runs().name(run)


def _numbers(run) -> list:
    if run is None:
        return ["", views.no_runs(), ""]
    s = run.state()
    return [run.id, views.head(run.id, s, _problem(run, s), _name(run), _about(run)), views.tiles(s)]


def _lines_known(run) -> tuple:
    s = run.state() if run else views.RunState()
    return (*_identity(run), s.told.total, len(s.told), s.skipped)


def _lines(run) -> list:
    return [views.logs(run.state() if run else views.RunState())]


def _size(folder: Path) -> str:
    return views.size(sum(p.lstat().st_size for p in folder.rglob("*") if bounded.is_file(p)))


def tick(part: Part) -> Callable:
    """(chosen run's id, what was shown last, *asked) -> the part's values and what is shown now, or all skipped."""

    def new(run_id: str, seen, *asked):
        run = chosen(run_id)
        now = part.key(run, *asked)
        return [gr.skip()] * (len(part.components) + 1) if now == seen else [*part.shown(run, now, *asked), now]

    return new


def stay(run_id: str | None, seen=None) -> list:
    """The run to choose where none is: one that is watched stays when it ends and the next one begins."""
    run = None if run_id else live.active()
    return [run.id, run.id] if run else [gr.skip()] * 2


# ---- what is done


def _the_run(run_id: str | None):
    """The run of a button.

    Raises:
        RunError: there is none, or not any more.
    """
    if not run_id:
        raise RunError("There are no runs yet. Start one first.")
    return folders.find(Path(run_id).name)


def _done(run_id: str | None, act: Callable):
    """The run of a button, after ``act(run)``; the lists are read anew also when that fails."""
    run = _the_run(run_id)
    try:
        act(run)
    finally:
        live.forget()
    return run


def _wire(ctx: Context, shown: Shown, picker, buttons: dict, of_buttons) -> None:
    outputs = shown.outputs
    chosen_too = [ctx.chosen_run, *outputs]

    def pick(event: gr.SelectData):
        run = _the_run(event.value)
        live.forget()  # it may be newer, and the others older, than what was listed last
        return (run.id, *shown.everything(run.id))

    def stop(run_id: str | None):
        return shown.everything(_done(run_id, runs.Run.stop).id)

    def resume(run_id: str | None):
        run = _done(run_id, starting.resume)
        return (run.id, *shown.everything(run.id))

    def show_active():
        run = live.active()
        return (run.id, *shown.everything(run.id)) if run else [gr.skip()] * len(chosen_too)

    buttons["other"].click(ctx.guarded(show_active), None, chosen_too, **QUICK)
    for part in shown.parts:
        ctx.on_tick(tick(part), [*part.components, part.seen], [ctx.chosen_run, part.seen, *part.asked])
    seen = mark()
    ctx.on_tick(stay, [ctx.chosen_run, seen], [ctx.chosen_run, seen])
    ctx.on_load(shown.everything, outputs, [ctx.chosen_run])
    # not as an input: Gradio refuses a request with a value that was in the list before the last tick only
    picker.select(ctx.guarded(pick), None, chosen_too, **QUICK)
    buttons["stop"].click(None, None, [buttons["stop"]], js="() => 'Stopping…'", queue=False)  # before the server does
    buttons["stop"].click(ctx.guarded(stop), [of_buttons], outputs, **QUICK)
    buttons["resume"].click(ctx.guarded(resume), [of_buttons], chosen_too, trigger_mode="once", **QUICK)
    bound = gr.State("")
    for tab in ("chat", "export"):
        # emptied first, so that the other tabs hear of a change even where this run was the chosen one before
        buttons[tab].click(
            lambda run_id, tab=tab: ("", gr.Tabs(selected=tab), run_id),
            [of_buttons],
            [ctx.chosen_run, ctx.tabs, bound],
            **QUICK,
        ).then(lambda run_id: run_id or "", [bound], [ctx.chosen_run], **QUICK)


def _wire_zoom(ctx: Context, plots, zoom, of_buttons) -> None:
    def zoomed(event: gr.SelectData, run_id: str | None):
        run, new = chosen(run_id or ""), {"run": run_id, "range": curves.chosen(event)}
        return *curves_view.values(run, new), new

    plots.select(quiet(zoomed), [of_buttons], [plots, zoom], **DIRECT)


def _wire_deletion(ctx: Context, shown: Shown, delete, yes, no, question: list, of_buttons) -> None:
    def ask(run_id: str | None):
        run = _the_run(run_id)
        text = f"Permanently delete run {run.id} with its checkpoints, adapter and exports ({_size(run.path)})?"
        return gr.update(visible=True), note(text, "bad"), run.id

    def really(run_id: str | None):
        _done(run_id, folders.delete)
        return ("", *shown.everything(""))

    delete.click(ctx.guarded(ask), [of_buttons], question, **QUICK)
    yes.click(ctx.guarded(really), [question[-1]], [ctx.chosen_run, *shown.outputs], trigger_mode="once", **QUICK)
    no.click(lambda: gr.update(visible=False), None, [question[0]], **QUICK)
