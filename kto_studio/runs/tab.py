"""The Runs tab: a table of all runs, and the chosen ones beside each other. Read from the runs' folders."""

from __future__ import annotations

import html
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gradio as gr

from kto_core import labels
from kto_core.compare import settings
from kto_core.compare import table as tables
from kto_core.errors import RunError
from kto_core.runs import folders
from kto_core.runs.events import TERMINAL
from kto_studio.shared import curves, data_sources, live
from kto_studio.shared.context import DIRECT, QUICK, Context, Event, quiet
from kto_studio.shared.marks import mark
from kto_studio.shared.saving import save_as
from kto_studio.train import from_config

from . import beside
from .view import View, drawn

ASSETS = Path(__file__).parents[1] / "assets"
SLOW = 5.0  # seconds between two drawings of what a run that trains changes
PRESS = """element.addEventListener('click', event => {
  const button = event.target.closest('button[data-do]');
  if (button) trigger('select', {index: [button.dataset.do, button.dataset.run], value: null});
});"""
SAVE = save_as("runs.csv", "text/csv")
LAST: Event = {**DIRECT, "trigger_mode": "always_last"}  # typing: the newest value wins


def build(ctx: Context) -> None:
    """Lay out and wire the tab."""
    ui = SimpleNamespace()
    _layout(ui)
    # What is asked for. Kept in the page and changed together with what shows it: answers may overtake each other.
    ui.view = gr.Textbox(View().text(), visible=False)
    ui.zoom = gr.State(None)  # {"of", "range"}: of another drawing it says nothing
    parts = [
        Part([ui.table], _table_key, _table, [ui.view, ui.search], shared=False),
        Part([ui.room, ui.cards], _cards_key, _cards, [ui.view]),
        Part([ui.plot], _plot_key, _plot, [ui.view, ui.metric, ui.x, ui.zoom]),
        Part([ui.details], _details_key, _details, [ui.view]),
    ]
    for part in parts:
        part.seen = mark()
        ctx.on_tick(part.tick, [*part.components, part.seen], [part.seen, *part.inputs])
    _wire(ctx, ui, parts)
    _wire_editing(ctx, ui, parts)


def _layout(ui) -> None:
    with gr.Column(elem_classes="card", elem_id="runs-all"):
        with gr.Row(equal_height=True, elem_id="runs-head"):
            gr.HTML("<h2>Runs</h2><p>Tick two or more to compare them.</p>", elem_classes="panel-head")
            ui.search = gr.Textbox(
                show_label=False, label="Search runs", placeholder="Search name, data, settings, tags, notes",
                max_lines=1, elem_id="runs-search",
            )  # fmt: skip
            ui.download = gr.Button("Download CSV", size="md", scale=0, min_width=150, elem_id="runs-csv")
        script = (ASSETS / "runs.js").read_text(encoding="utf-8")
        ui.table = gr.HTML("", show_label=False, elem_id="runs-table", js_on_load=script)
    with gr.Column(visible=False, elem_id="runs-beside") as ui.room:
        ui.cards = gr.HTML("", show_label=False, elem_id="runs-cards", js_on_load=PRESS)
        with gr.Column(visible=False, elem_classes="card", elem_id="runs-edit") as ui.edit:
            ui.edited = gr.HTML("", elem_classes="panel-head")
            with gr.Row():
                ui.name = gr.Textbox(label="Name", info="Empty: the name in the run's settings.", max_lines=1,
                                     elem_id="runs-name")  # fmt: skip
                ui.tags = gr.Textbox(label="Tags", info="Words, with spaces or commas between them.", max_lines=1,
                                     elem_id="runs-tags")  # fmt: skip
            ui.note = gr.Textbox(label="Note", info="What you want to remember of this run.", lines=2, max_lines=6,
                                 elem_id="runs-note")  # fmt: skip
            with gr.Row():
                ui.save = gr.Button("Save", variant="primary", scale=0, min_width=110, elem_id="runs-save")
                ui.cancel = gr.Button("Cancel", scale=0, min_width=110, elem_id="runs-cancel")
        with gr.Column(elem_classes="card", elem_id="runs-curves"):
            with gr.Row(equal_height=True):
                ui.metric = gr.Dropdown(
                    [(f"{title} ({name})", name) for name, title in beside.METRICS.items()], value="loss",
                    label="Metric", info="What is drawn of each run.", elem_id="runs-metric",
                )  # fmt: skip
                ui.x = gr.Radio([("Step", beside.STEP), ("Time", beside.TIME)], value=beside.STEP, label="By",
                                info="Time: of work, without pauses.", elem_id="runs-x")  # fmt: skip
            ui.plot = curves.component("runs-plot")
        ui.details = gr.HTML("", show_label=False, elem_id="runs-details")
    ui.of_edit = gr.Textbox(visible=False)  # the run that is edited
    ui.csv = gr.Textbox(visible=False)


class Part:
    """Components that change together, what they are made of, and the mark of what they show.

    shared: whether pages for which the key is the same show the same.
    """

    def __init__(self, components: list, key: Callable, values: Callable, inputs: list, shared: bool = True):
        self.components, self.key, self.values, self.inputs = components, key, values, inputs
        self.shared = shared
        self.seen: gr.Textbox | None = None
        self.made: tuple = (None, None)  # the newest key and its values: every open page may ask for the same

    def shown(self, *asked) -> list:
        """The values, and the mark."""
        now, made = self.key(*asked), self.made
        if not self.shared or made[0] != now:
            self.made = made = (now, self.values(*asked))
        return [*made[1], now]

    def tick(self, seen, *asked) -> list:
        """All skipped where nothing is new."""
        return [gr.skip()] * (len(self.components) + 1) if self.key(*asked) == seen else self.shown(*asked)


# ---- what is shown


def _slowly() -> int:
    """Changes now and then while a run trains."""
    return int(time.monotonic() / SLOW) if live.active() is not None else 0


def _table_key(view: str, words: str) -> tuple:
    v, table = View.read(view), live.table()
    asked = (v.sort, v.down, v.page, v.state, v.tag, str(words or ""))
    unread = int(time.monotonic()) if table.pending else 0
    return (*asked, str(table.known.root), table.known.changes, table.known.file_changes, _slowly(), unread)


def _table(view: str, words: str) -> list:
    return [drawn(View.read(view), live.table().facts(), str(words or ""))]


def _chosen(view: str) -> tuple[list, list]:
    """(facts, runs) of the chosen ones that are still there."""
    chosen = View.read(view).chosen
    facts = live.table().of(chosen) if chosen else []
    known = live.runs()
    found = [(f, known.find(f.id)) for f in facts]
    return [f for f, run in found if run], [run for _, run in found if run]


def _lasting(f) -> tuple:
    """What of a run's facts changes its card; of one that trains, not each step."""
    step = f.step if f.state in TERMINAL else _slowly()
    return f.id, f.name, f.state, step, f.tags, f.note, f.verdict, f.margin, f.problem, f.data


def _cards_key(view: str) -> tuple:
    return tuple(map(_lasting, _chosen(view)[0]))


def _cards(view: str) -> list:
    facts, runs = _chosen(view)
    return [gr.update(visible=bool(facts)), beside.cards(facts, settings.verdicts(runs))]


def _details_key(view: str) -> tuple:
    return _cards_key(view)


def _details(view: str) -> list:
    return [beside.details(*_chosen(view))]


def _drawing(view: str, metric: str, x: str) -> list:
    """What a zoom belongs to."""
    return [[f.id for f in _chosen(view)[0]], metric, x]


def _plot_key(view: str, metric: str, x: str, zoom=None) -> tuple:
    facts, runs = _chosen(view)
    points = tuple(
        (f.id, f.title, m.total, len(m), m[-1]["step"] if m else 0)
        for f, m in ((f, r.state().metrics) for f, r in zip(facts, runs, strict=True))
    )
    return metric, x, points, _range(view, metric, x, zoom)


def _plot(view: str, metric: str, x: str, zoom=None) -> list:
    facts, runs = _chosen(view)
    return [beside.plot(facts, [r.state() for r in runs], metric, x, _range(view, metric, x, zoom))]


def _range(view: str, metric: str, x: str, zoom) -> curves.Range | None:
    """The zoom, if it is this drawing's."""
    if not isinstance(zoom, dict) or zoom.get("of") != _drawing(view, metric, x) or not zoom.get("range"):
        return None
    low, high = zoom["range"]
    return low, high


# ---- what is done


def _find(run_id: object):
    """Raises RunError: it is gone, or what was sent is no id."""
    if not isinstance(run_id, str) or not run_id:
        raise RunError("Choose a run first.")
    return folders.find(Path(run_id).name)


def _wire(ctx: Context, ui, parts: list[Part]) -> None:
    table, rest = parts[0], parts[1:]
    outputs = [c for part in rest for c in (*part.components, part.seen)]

    def viewed(event: gr.SelectData, before: str, words: str, metric: str, x: str):
        """Another view of the table, which is drawn again in any case: the page waits for its number."""
        old, new = View.read(before), View.read(event.index)
        more = [gr.skip()] * len(outputs) if old.chosen == new.chosen else _all(rest, new.text(), metric, x)
        return [new.text(), *table.shown(new.text(), words), *more]

    def searched(view: str, words: str):
        first = View.read(view)
        text = View(**{**vars(first), "page": 1}).text()
        return [text, *table.shown(text, words)]

    def replot(view: str, metric: str, x: str):
        return parts[2].shown(view, metric, x, None)

    def zoomed(event: gr.SelectData, view: str, metric: str, x: str):
        zoom = {"of": _drawing(view, metric, x), "range": curves.chosen(event)}
        return [*parts[2].shown(view, metric, x, zoom), zoom]

    drawn_table = [*table.components, table.seen]
    drawn_plot = [ui.plot, parts[2].seen]
    asked = [ui.view, ui.metric, ui.x]
    wanted: Event = {**DIRECT, "trigger_mode": "multiple"}  # the page sends one at a time
    ui.table.select(quiet(viewed), [ui.view, ui.search, ui.metric, ui.x], [ui.view, *drawn_table, *outputs], **wanted)
    ui.search.input(quiet(searched), [ui.view, ui.search], [ui.view, *drawn_table], **LAST)
    for control in (ui.metric, ui.x):
        control.input(quiet(replot), asked, drawn_plot, **LAST)
    ui.plot.select(quiet(zoomed), asked, [*drawn_plot, ui.zoom], **DIRECT)

    def download(view: str, words: str):
        return tables.as_csv(View.read(view).rows(live.table().facts(patient=True), str(words or "")))

    ui.download.click(ctx.guarded(download), [ui.view, ui.search], [ui.csv], **QUICK).then(
        None, [ui.csv], None, js=SAVE, queue=False
    )
    _wire_cards(ctx, ui, parts)


def _all(parts: list[Part], view: str, metric: str, x: str) -> list:
    """The values of these parts of the comparison."""
    asked = (view, metric, x, None)  # in the order of each part's inputs
    return [v for part in parts for v in part.shown(*asked[: len(part.inputs)])]


def _wire_cards(ctx: Context, ui, parts: list[Part]) -> None:
    """The buttons of a card: one handler, since they are in one component."""
    others = [c for part in parts for c in (*part.components, part.seen)]
    fields = [ui.edit, ui.edited, ui.name, ui.tags, ui.note, ui.of_edit]
    onward = [ctx.chosen_run, ctx.tabs, *([ctx.start_from, ctx.chosen_data] if ctx.start_from is not None else [])]
    outputs = [*onward, *fields, ui.view, *others]

    def pressed(event: gr.SelectData, view: str, words: str, metric: str, x: str):
        what, run_id = event.index if isinstance(event.index, list) and len(event.index) == 2 else ("", "")
        out = {c: gr.skip() for c in outputs}
        if what == "drop":
            old = View.read(view)
            text = View(**{**vars(old), "chosen": tuple(c for c in old.chosen if c != run_id), "n": old.n + 1}).text()
            values = [*parts[0].shown(text, words), *_all(parts[1:], text, metric, x)]
            out |= {ui.view: text, **dict(zip(others, values, strict=True))}
        elif what == "open":
            out |= {ctx.chosen_run: _find(run_id).id, ctx.tabs: gr.Tabs(selected="train")}
        elif what == "start":
            out |= _start(ctx, _find(run_id))
        elif what == "edit":
            out |= dict(zip(fields, _edit(_find(run_id)), strict=True))
        return out

    ui.cards.select(ctx.guarded(pressed), [ui.view, ui.search, ui.metric, ui.x], outputs, **QUICK)


def _start(ctx: Context, run) -> dict:
    config = run.config().config
    found = from_config.data_id(config)
    for text in from_config.remarks(config, found):
        gr.Warning(html.escape(text))
    wanted = {"form": from_config.form(config), "data": found, "n": time.time()}
    to_data = {ctx.chosen_data: found} if found and data_sources.name(found) else {}
    return {ctx.start_from: wanted, ctx.tabs: gr.Tabs(selected="train"), **to_data}


def _edit(run) -> list:
    known = labels.read(run.path)
    name = live.runs().name(run)
    title = f"<h2>Edit {html.escape(name or run.id)}</h2>"
    return [gr.update(visible=True), title, name, " ".join(known.tags), known.note, run.id]


def _wire_editing(ctx: Context, ui, parts: list[Part]) -> None:
    shown = [c for part in parts for c in (*part.components, part.seen)]

    def save(run_id: str, name: str, tags: str, note: str, view: str, words: str, metric: str, x: str):
        run = _find(run_id)
        own = live.runs().brief(run)
        name = "" if own and name.strip() == own.name else name  # the one in its settings
        labels.change(run.path, name=name, tags=labels.split(tags), note=note)
        live.forget()
        return [gr.update(visible=False), *parts[0].shown(view, words), *_all(parts[1:], view, metric, x)]

    asked = [ui.of_edit, ui.name, ui.tags, ui.note, ui.view, ui.search, ui.metric, ui.x]
    ui.save.click(ctx.guarded(save), asked, [ui.edit, *shown], trigger_mode="once", **QUICK)
    ui.name.submit(ctx.guarded(save), asked, [ui.edit, *shown], trigger_mode="once", **QUICK)
    ui.tags.submit(ctx.guarded(save), asked, [ui.edit, *shown], trigger_mode="once", **QUICK)
    ui.cancel.click(lambda: gr.update(visible=False), None, [ui.edit], **QUICK)
