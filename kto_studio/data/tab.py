"""The Data tab: choose a data set, look at it, learn what is wrong with it, see a row as the model does, convert it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import gradio as gr

from kto_core.data import pages
from kto_core.errors import DataError
from kto_studio.shared import data_sources, temporary, views
from kto_studio.shared.context import DIRECT, QUICK, Context, Event, quiet
from kto_studio.shared.marks import mark
from kto_studio.shared.prose import note

from . import fields, findings, jobs, layout, reading
from . import view as data_view

LAST: Event = {**DIRECT, "trigger_mode": "always_last"}  # typing: the newest text wins
SHORT = 0.12  # seconds an action waits for a job before it shows a progress bar instead


def build(ctx: Context) -> None:
    ui = SimpleNamespace()
    layout.page(ui, reading.panel)
    ui.page, ui.seen, ui.told = gr.Number(0, visible=False, precision=0), mark(), mark()
    ui.listed, ui.sought, ui.opened = mark(), mark(), mark()  # of the table, of what was searched for, of the row
    _choosing(ctx, ui)
    _table_events(ctx, ui)
    _row_events(ctx, ui)
    _other_events(ctx, ui)


# ---- what is shown


def _look(data_id: str, model: str, limit, *, wait: bool = True) -> jobs.Look:
    """What is known now; a short read is waited for, so that small files appear at once."""
    limit = fields.max_length(limit)
    found = jobs.look(data_id, model, limit)
    if wait and found.reading and found.reading.running:
        found.reading.wait(SHORT)
        found = jobs.look(data_id, model, limit)
    return found


def _screen(ui, found: jobs.Look, limit, model: str, form: str) -> dict:
    """Everything but the table and the row."""
    odd = fields.about_length(limit)
    report, limit = found.report, fields.max_length(limit)
    known, rows = report is not None, bool(report and report.kept)
    out = {ui.seen: _signature(found, form), **_progress(ui, found), **_conversion(ui, found, form)}
    seen = {ui.balance_card: rows, ui.lengths_card: rows, ui.row_room: known, ui.table_room: rows or bool(found.first)}
    seen |= {ui.row_card: rows, ui.onward: bool(report and not report.problem)}
    out |= {room: gr.update(visible=there) for room, there in seen.items()}
    out |= {ui.limit_note: gr.update(value=odd, visible=bool(odd))}
    if report is None:
        blank = dict.fromkeys((ui.facts, ui.balance, ui.lengths, ui.issues), "")
        return out | blank | {ui.use: gr.update(visible=False), ui.report: gr.update(visible=False)}
    file = jobs.report_file(found.data_id, model, limit) if report.issues else None
    weight = data_view.advised(report)
    return out | {
        ui.facts: data_view.summary(report) + findings.warnings(report),
        ui.balance: data_view.balance(report),
        ui.use: gr.update(visible=bool(weight), value=f"Use {weight[0]} {weight[1]:g}" if weight else ""),
        ui.lengths: _lengths(found, limit, model),
        ui.issues: data_view.problems(report) + findings.beside(report) + findings.categories(report),
        ui.report: gr.update(
            visible=file is not None,
            value=str(file) if file else None,
            label=f"Download all {len(report.issues):,} lines ({views.size(file.stat().st_size)})" if file else "",
        ),
    }


def _lengths(found: jobs.Look, limit: int | None, model: str) -> str:
    report = found.report
    if report is None:
        return ""
    drawn = jobs.chart(report, limit if report.lengths_unit == "tokens" else None)
    return data_view.lengths(report, limit, model, found.counting, drawn) + findings.answers(report)


def _signature(found: jobs.Look, form: str) -> tuple:
    job = jobs.converted(found.data_id, form)
    return (*found.signature, form, job.id if job else "", job.state if job else "")


def _progress(ui, found: jobs.Look) -> dict:
    """The line under the facts, and the button beside it."""
    text, button = "", gr.update(visible=False)
    job = next((j for j in (found.reading, found.counting) if j and j.running), None)
    if found.problem:
        text = data_view.problem(found.problem)
    elif not found.data_id:
        text = data_view.nothing()
    elif job:
        text = data_view.working(job, "Reading" if job is found.reading else "Counting tokens")
        button = gr.update(visible=True, value="Cancel", variant="stop")
    elif found.loaded is None and found.reading:
        failed = found.reading.state == "failed"
        rest = " The table shows only the first rows." if found.first else ""
        text = data_view.problem(found.reading.error) if failed else note(f"Reading was cancelled.{rest}")
        button = gr.update(visible=True, value="Try again", variant="secondary")
    elif found.report is not None and found.report.lengths_unit != "tokens" and found.report.kept:
        text = note("Lengths are in characters until tokens are counted.")
        button = gr.update(visible=True, value="Count tokens", variant="secondary")
    return {ui.status: gr.update(value=text, visible=bool(text)), ui.told: text, ui.action: button}


def _conversion(ui, found: jobs.Look, form: str) -> dict:
    job = jobs.converted(found.data_id, form)
    running = bool(job and job.running)
    made: Path | None = job.result if job and job.result and job.result.is_file() else None
    text = data_view.working(job, "Converting") if job and running else ""
    if job and job.state == "failed":
        text = data_view.problem(job.error)
    value = str(made) if made else None
    label = f"Download {made.name} ({views.size(made.stat().st_size)})" if made else ""
    return {
        ui.convert: gr.update(interactive=bool(found.loaded and found.loaded.rows) and not running),
        ui.converted: gr.update(visible=made is not None, value=value, label=label),
        ui.converting: text,
    }


def _page(ui, found: jobs.Look, page: int, search: str, label: str, row: int | None = None) -> dict:
    """The table and its pager. ``page`` from 0, the nearest one where there is none; ``row``, from 1, is marked."""
    searched = bool((search or "").strip()) or label != "all"
    chosen = row - 1 if row else None
    made_of = {ui.listed: _asked(found, search, label), ui.sought: (search, label)}
    if (loaded := found.loaded) is None:
        rows = found.first or []
        text = (
            (f"Showing the first {len(rows)} rows. Search and pages are available once all rows are read.")
            if rows
            else ""
        )
        return made_of | _pager(ui, data_view.table(rows, len(rows), chosen) if rows else "", 0, 1, text)

    def ask(page: int) -> tuple[list[dict], int]:
        return pages.page(loaded.rows, page, data_view.PAGE, search or "", data_view.label_of(label))

    rows, total = ask(max(page, 0))
    last = max(1, -(-total // data_view.PAGE))
    said, asked_for = fields.elsewhere("page", page + 1, last), page
    page = fields.clamped(page, 0, last - 1)
    if page < asked_for:
        rows, total = ask(page)
    shown = data_view.table(rows, total, chosen, searched)
    return made_of | _pager(ui, shown, page, last, data_view.place(page, data_view.PAGE, total) + said)


def _asked(found: jobs.Look, *what) -> tuple:
    """What the rows are, and what is asked of them. Answers may overtake each other: `tick` compares and mends."""
    return (*found.signature[:1], found.loaded is not None, bool(found.first), *what)


def _pager(ui, table: str, page: int, last: int, text: str) -> dict:
    return {
        ui.table: table,
        ui.page: page,
        ui.number: page + 1,
        ui.back: gr.update(interactive=page > 0),
        ui.forth: gr.update(interactive=page < last - 1),
        ui.range: f'<div class="place">of {last:,}</div>{text}' if text else "",
    }


def _row(ui, found: jobs.Look, number, model: str, view: str) -> dict:
    """One row, ``number`` from 1."""
    return {ui.shown: fields.row(found, number, model, view), ui.opened: _asked(found, number, model, view)}


# ---- what is done


def _choosing(ctx: Context, ui) -> None:
    asked = [ctx.chosen_data, ui.model, ui.limit, ui.form, ui.view]
    everything = [v for v in vars(ui).values() if v not in (ui.upload, ui.repo, ui.split, ui.fetch, ui.model, ui.limit)]
    everything = [v for v in everything if v not in (ui.form, ui.view)]

    def show(data_id: str, model: str, limit, form: str, view: str):
        """A data set is chosen, or the page opens: from its first row."""
        found = _look(data_id, model, limit)
        return {
            ui.pick: gr.update(choices=_choices(data_id), value=data_id if data_id and not found.problem else None),
            ui.search: "",
            ui.label: "all",
            ui.row: 1,
            **_screen(ui, found, limit, model, form),
            **reading.shown(ui, found),
            **_page(ui, found, 0, "", "all", 1),
            **_row(ui, found, 1, model, view),
        }

    def tick(data_id, model, limit, form, view, page, search, label, row, seen, told, listed, sought, opened, read_as):
        found = _look(data_id, model, limit, wait=False)
        out = reading.shown(ui, found) if read_as != reading.signature(found) else {}
        if listed != _asked(found, search, label):
            out |= _page(ui, found, page if sought == (search, label) else 0, search, label, row)
        if _signature(found, form) == seen:
            if opened != _asked(found, row, model, view):
                out |= _row(ui, found, row, model, view)
            progress = _progress(ui, found)
            if progress[ui.told] == told and not _converting(found, form):
                return out or gr.skip()
            lengths = {ui.lengths: _lengths(found, fields.max_length(limit), model)} if found.report else {}
            return {**out, **progress, **_conversion(ui, found, form), **lengths}
        return {**_screen(ui, found, limit, model, form), **_row(ui, found, row, model, view), **out}

    def measured(data_id, model, limit, form, view, row):
        found = _look(data_id, model, limit)
        return {**_screen(ui, found, limit, model, form), **_row(ui, found, row, model, view)}

    made_of = [ui.listed, ui.sought, ui.opened, ui.read_as]
    ctx.on_load(show, everything, asked)
    ctx.chosen_data.change(ctx.guarded(show), asked, everything, **QUICK)
    ctx.on_tick(tick, everything, [*asked, ui.page, ui.search, ui.label, ui.row, ui.seen, ui.told, *made_of])
    ui.pick.input(None, [ui.pick], [ctx.chosen_data], js="x => x", show_progress="hidden")
    reading.events(ctx, ui, lambda event: event.success(ctx.guarded(show), asked, everything, **QUICK))
    for control in (ui.model.input, ui.limit.input):
        control(ctx.guarded(measured), [*asked, ui.row], everything, **LAST)

    def uploaded(file: str | None):
        try:
            return None, data_sources.add_upload(file) if file else gr.skip()
        finally:
            if file:
                temporary.drop(file)

    def fetched(repo: str, split: str):
        return data_sources.hub_id(repo or "", split or "")

    ui.upload.upload(ctx.guarded(uploaded), [ui.upload], [ui.upload, ctx.chosen_data], **QUICK)
    if ctx.chosen_model is not None:  # Train's form has another model or length

        def follow(chosen: dict):
            return chosen["model"], chosen["max_length"]

        ctx.chosen_model.change(ctx.guarded(follow), [ctx.chosen_model], [ui.model, ui.limit], **QUICK)
    for event in (ui.fetch.click, ui.repo.submit, ui.split.submit):
        event(ctx.guarded(fetched), [ui.repo, ui.split], [ctx.chosen_data], **QUICK)


def _choices(data_id: str) -> list[tuple[str, str]]:
    found = data_sources.choices()
    if data_id and data_id.startswith("hub:"):
        found.append((data_sources.name(data_id), data_id))
    return found


def _converting(found: jobs.Look, form: str) -> bool:
    job = jobs.converted(found.data_id, form)
    return bool(job and job.running)


def _table_events(ctx: Context, ui) -> None:
    asked = [ctx.chosen_data, ui.model, ui.limit, ui.page, ui.search, ui.label, ui.row]
    shown = [ui.table, ui.page, ui.number, ui.back, ui.forth, ui.range, ui.listed, ui.sought]

    def turn(by: int | None):
        def turned(data_id, model, limit, page, search, label, row):
            page = 0 if by is None else max(0, page + by)
            return _page(ui, _look(data_id, model, limit), page, search, label, row)

        return quiet(turned)

    def jump(data_id, model, limit, page, search, label, row, number):
        if number is None:  # being typed
            return gr.skip()
        out = _page(ui, _look(data_id, model, limit), int(number) - 1, search, label, row)
        if out[ui.page] == int(number) - 1:
            del out[ui.number]  # leave what is being typed alone
        return out

    gr.on([ui.search.change, ui.label.input], turn(None), asked, shown, **LAST)  # one after the other
    ui.back.click(turn(-1), asked, shown, **DIRECT)
    ui.forth.click(turn(1), asked, shown, **DIRECT)
    ui.number.input(quiet(jump), [*asked, ui.number], shown, **LAST)


def _row_events(ctx: Context, ui) -> None:
    asked = [ctx.chosen_data, ui.model, ui.limit, ui.view]

    def chosen(event: gr.SelectData, data_id, model, limit, view):
        number = int(event.index) + 1
        return {ui.row: number, **_row(ui, _look(data_id, model, limit), number, model, view)}

    def typed(data_id, model, limit, view, number):
        return _row(ui, _look(data_id, model, limit), number, model, view)

    ui.table.select(quiet(chosen), asked, [ui.row, ui.shown, ui.opened], **LAST)
    ui.row.change(None, [ui.row], js=layout.MARK_ROW, show_progress="hidden")
    gr.on([ui.row.input, ui.view.input], quiet(typed), [*asked, ui.row], [ui.shown, ui.opened], **LAST)


def _other_events(ctx: Context, ui) -> None:
    asked = [ctx.chosen_data, ui.model, ui.limit, ui.form]

    def act(data_id, model, limit, form):
        """Cancel what runs, or try again what did not come."""
        found = jobs.look(data_id, model, fields.max_length(limit), start=False)
        running = next((j for j in (found.reading, found.counting) if j and j.running), None)
        if running:
            running.cancel()
        elif found.loaded is None:
            jobs.read(data_id)
        else:
            jobs.count(data_id, model, fields.max_length(limit))
        return _progress(ui, jobs.look(data_id, model, fields.max_length(limit), start=False))

    def convert(data_id, model, limit, form):
        jobs.convert(data_id, form).wait(SHORT)
        return _conversion(ui, _look(data_id, model, limit), form)

    def chosen_form(data_id, model, limit, form):
        return _conversion(ui, _look(data_id, model, limit), form)

    def use(data_id, model, limit, form):
        report = _look(data_id, model, limit).report
        weight = data_view.advised(report) if report else None
        if weight is None:
            raise DataError("Nothing to change: both weights stay at 1.")
        gr.Info(f"{weight[0]} is set to {weight[1]:g} in the Train tab.", title="Weight applied", duration=5)
        return {"desirable_weight": 1.0, "undesirable_weight": 1.0, weight[0]: weight[1]}

    converted = [ui.convert, ui.converted, ui.converting]
    ui.action.click(ctx.guarded(act), asked, [ui.status, ui.told, ui.action], **QUICK)
    ui.convert.click(ctx.guarded(convert), asked, converted, **QUICK)
    ui.form.input(ctx.guarded(chosen_form), asked, converted, **QUICK)
    ui.use.click(ctx.guarded(use), asked, [ctx.advice], **QUICK)
    ui.train.click(lambda: gr.Tabs(selected="train"), None, [ctx.tabs], **QUICK)
