"""The Data tab: choose a data set, look at it, learn what is wrong with it, see a row as the model does, convert it."""

from __future__ import annotations

from types import SimpleNamespace

import gradio as gr

from kto_core import dataset, template
from kto_core.errors import DataError, KTOError
from ui import data_jobs, data_layout, data_view, sources, views
from ui.context import Context, quiet

# through the queue: an error that is raised outside of it shows no toast, but a failed request in the console
QUICK = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
# looking at rows raises nothing, and without the queue it takes half the time
DIRECT = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
LAST = {**DIRECT, "trigger_mode": "always_last"}  # typing: the newest text wins
SHORT = 0.12  # seconds an action waits for a job before it shows a progress bar instead


def build(ctx: Context) -> None:
    ui = SimpleNamespace()
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=310):
            data_layout.source_controls(ui)
            data_layout.balance_panel(ui)
            data_layout.lengths_panel(ui)
        with gr.Column(scale=3, min_width=560):
            ui.facts = gr.HTML("", elem_id="data-facts", show_label=False)
            with gr.Row(equal_height=True, elem_id="data-doing"):
                ui.status = gr.HTML("", visible=False, elem_id="data-status", show_label=False, scale=6)
                ui.action = gr.Button("Cancel", visible=False, size="sm", scale=0, min_width=140, elem_id="data-action")
            with gr.Column(visible=False, min_width=0) as ui.table_room:
                data_layout.table_controls(ui)
            with gr.Column(visible=False, min_width=0) as ui.row_room:
                data_layout.row_controls(ui)
                with gr.Row(equal_height=False):
                    data_layout.report_panel(ui)
                    data_layout.convert_panel(ui)
    ui.page, ui.seen, ui.told = gr.State(0), gr.State(None), gr.State("")
    ui.listed, ui.opened = gr.State(None), gr.State(None)  # what the table and the row were made of
    _choosing(ctx, ui)
    _table_events(ctx, ui)
    _row_events(ctx, ui)
    _other_events(ctx, ui)


# ---- what is shown


def _look(data_id: str, model: str, limit, *, wait: bool = True) -> data_jobs.Look:
    """What is known now; a short read is waited for, so that small files appear at once."""
    limit = int(limit) if limit and limit >= 16 else None
    found = data_jobs.look(data_id, model, limit)
    if wait and found.reading and found.reading.running:
        found.reading.thread.join(SHORT)
        found = data_jobs.look(data_id, model, limit)
    return found


def _screen(ui, found: data_jobs.Look, limit, model: str, form: str) -> dict:
    """Everything but the table and the row."""
    report, limit = found.report, _limit(limit)
    known, rows = report is not None, bool(report and report.kept)
    out = {ui.seen: _signature(found, form), **_progress(ui, found), **_conversion(ui, found, form)}
    out |= {room: gr.update(visible=known) for room in (ui.balance_card, ui.lengths_card, ui.row_room)}
    out |= {ui.table_room: gr.update(visible=rows or bool(found.first))}
    if report is None:
        blank = dict.fromkeys((ui.facts, ui.balance, ui.lengths, ui.issues), "")
        return out | blank | {ui.use: gr.update(visible=False), ui.report: gr.update(visible=False)}
    file = data_jobs.report_file(found.data_id, model, limit) if report.issues else None
    weight = data_view.advised(report)
    return out | {
        ui.facts: data_view.summary(report),
        ui.balance: data_view.balance(report),
        ui.use: gr.update(visible=bool(weight), value=f"Use {weight[0]} {weight[1]:g}" if weight else ""),
        ui.lengths: _lengths(found, limit, model),
        ui.issues: data_view.problems(report),
        ui.report: gr.update(
            visible=file is not None,
            value=str(file) if file else None,
            label=f"Download all {len(report.issues):,} lines ({views.size(file.stat().st_size)})" if file else "",
        ),
    }


def _lengths(found: data_jobs.Look, limit: int | None, model: str) -> str:
    report = found.report
    drawn = data_jobs.chart(report, limit if report.lengths_unit == "tokens" else None)
    return data_view.lengths(report, limit, model, found.counting, drawn)


def _limit(value) -> int | None:
    return int(value) if value and value >= 16 else None


def _signature(found: data_jobs.Look, form: str) -> tuple:
    job = data_jobs.converted(found.data_id, form)
    return (*found.signature, form, job.id if job else "", job.state if job else "")


def _progress(ui, found: data_jobs.Look) -> dict:
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
        text = data_view.problem(found.reading.error) if failed else data_view.note(_stopped(found))
        button = gr.update(visible=True, value="Try again", variant="secondary")
    elif found.report is not None and found.report.lengths_unit != "tokens" and found.report.kept:
        text = data_view.note("Lengths are in characters until the tokens are counted.")
        button = gr.update(visible=True, value="Count tokens", variant="secondary")
    return {ui.status: gr.update(value=text, visible=bool(text)), ui.told: text, ui.action: button}


def _stopped(found: data_jobs.Look) -> str:
    return "Reading was stopped." + (" The table has the first rows only." if found.first else "")


def _conversion(ui, found: data_jobs.Look, form: str) -> dict:
    job = data_jobs.converted(found.data_id, form)
    running, done = bool(job and job.running), bool(job and job.state == "done" and job.result.is_file())
    text = data_view.working(job, "Converting") if running else ""
    if job and job.state == "failed":
        text = data_view.problem(job.error)
    value = str(job.result) if done else None
    label = f"Download {job.result.name} ({views.size(job.result.stat().st_size)})" if done else ""
    return {
        ui.convert: gr.update(interactive=found.loaded is not None and not running),
        ui.converted: gr.update(visible=done, value=value, label=label),
        ui.converting: text,
    }


def _page(ui, found: data_jobs.Look, page: int, search: str, label: str, row: int | None = None) -> dict:
    """The table and its pager. ``page`` from 0; beyond the last one it is the last one. ``row`` from 1 is marked."""
    searched = bool((search or "").strip()) or label != "all"
    chosen = row - 1 if row else None
    made_of = {ui.listed: _asked(found, search, label)}
    if found.loaded is None:
        rows = found.first or []
        text = f"The first {len(rows)} rows. Search and pages come when all are read." if rows else ""
        return made_of | _pager(ui, data_view.table(rows, len(rows), chosen) if rows else "", 0, 1, text)

    def ask(page: int) -> tuple[list[dict], int]:
        return dataset.page(found.loaded.rows, page, data_view.PAGE, search or "", data_view.label_of(label))

    rows, total = ask(page)
    last = max(1, -(-total // data_view.PAGE))
    if page >= last:
        page = last - 1
        rows, total = ask(page)
    shown = data_view.table(rows, total, chosen, searched)
    return made_of | _pager(ui, shown, page, last, data_view.place(page, data_view.PAGE, total))


def _asked(found: data_jobs.Look, *what) -> tuple:
    """What the rows are, and what is asked of them. Answers may overtake each other: `tick` compares and mends."""
    return (*found.signature[:1], found.loaded is not None, bool(found.first), *what)


def _pager(ui, table: str, page: int, last: int, text: str) -> dict:
    return {
        ui.table: table,
        ui.page: page,
        ui.number: gr.update(value=page + 1, maximum=last),
        ui.back: gr.update(interactive=page > 0),
        ui.forth: gr.update(interactive=page < last - 1),
        ui.range: f'<div class="place">of {last:,}</div>{text}' if text else "",
    }


def _row(ui, found: data_jobs.Look, number, model: str, view: str) -> dict:
    """One row, ``number`` from 1."""
    return {ui.shown: _seen(found, number, model, view), ui.opened: _asked(found, number, model, view)}


def _seen(found: data_jobs.Look, number, model: str, view: str) -> str:
    if found.loaded is None or not found.loaded.rows:
        return data_view.note("A row can be seen here once a data set is read.")
    row = found.loaded.rows[min(max(int(number or 1), 1), len(found.loaded.rows)) - 1]
    if view == data_layout.MESSAGES:
        return data_view.conversation(row)
    if found.tokenizer is None:
        return data_view.not_seen(model, found.counting) + data_view.conversation(row)
    try:
        return data_view.as_seen(row, template.render(row, found.tokenizer))
    except KTOError as e:
        return data_view.problem(str(e)) + data_view.conversation(row)


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
            ui.row: gr.update(value=1, maximum=len(found.loaded.rows) if found.loaded and found.loaded.rows else 1),
            **_screen(ui, found, limit, model, form),
            **_page(ui, found, 0, "", "all", 1),
            **_row(ui, found, 1, model, view),
        }

    def tick(data_id, model, limit, form, view, page, search, label, row, seen, told, listed, opened):
        found = _look(data_id, model, limit, wait=False)
        out = {}
        if listed != (asked := _asked(found, search, label)):
            out |= _page(ui, found, page if listed and listed[-2:] == asked[-2:] else 0, search, label, row)
        if _signature(found, form) == seen:
            if opened != _asked(found, row, model, view):
                out |= _row(ui, found, row, model, view)
            progress = _progress(ui, found)
            if progress[ui.told] == told and not _converting(found, form):
                return out or gr.skip()
            lengths = {ui.lengths: _lengths(found, _limit(limit), model)} if found.report else {}
            return {**out, **progress, **_conversion(ui, found, form), **lengths}
        rows = {ui.row: gr.update(maximum=len(found.loaded.rows))} if found.loaded and found.loaded.rows else {}
        return {**_screen(ui, found, limit, model, form), **_row(ui, found, row, model, view), **rows, **out}

    def measured(data_id, model, limit, form, view, row):
        found = _look(data_id, model, limit)
        return {**_screen(ui, found, limit, model, form), **_row(ui, found, row, model, view)}

    made_of = [ui.listed, ui.opened]
    ctx.on_load(show, everything, asked)
    ctx.chosen_data.change(ctx.guarded(show), asked, everything, **QUICK)
    ctx.on_tick(tick, everything, [*asked, ui.page, ui.search, ui.label, ui.row, ui.seen, ui.told, *made_of])
    ui.pick.input(None, [ui.pick], [ctx.chosen_data], js="x => x", show_progress="hidden")
    for control in (ui.model.input, ui.limit.input):
        control(ctx.guarded(measured), [*asked, ui.row], everything, **LAST)

    def uploaded(file: str | None):
        return None, sources.add_upload(file) if file else gr.skip()

    def fetched(repo: str, split: str):
        return sources.hub_id(repo or "", split or "")

    ui.upload.upload(ctx.guarded(uploaded), [ui.upload], [ui.upload, ctx.chosen_data], **QUICK)
    if ctx.chosen_model is not None:  # Train's form has another model or length

        def follow(chosen: dict):
            return chosen["model"], chosen["max_length"]

        ctx.chosen_model.change(ctx.guarded(follow), [ctx.chosen_model], [ui.model, ui.limit], **QUICK)
    for event in (ui.fetch.click, ui.repo.submit, ui.split.submit):
        event(ctx.guarded(fetched), [ui.repo, ui.split], [ctx.chosen_data], **QUICK)


def _choices(data_id: str) -> list[tuple[str, str]]:
    found = sources.choices()
    if data_id and data_id.startswith("hub:"):
        found.append((sources.name(data_id), data_id))
    return found


def _converting(found: data_jobs.Look, form: str) -> bool:
    job = data_jobs.converted(found.data_id, form)
    return bool(job and job.running)


def _table_events(ctx: Context, ui) -> None:
    asked = [ctx.chosen_data, ui.model, ui.limit, ui.page, ui.search, ui.label, ui.row]
    shown = [ui.table, ui.page, ui.number, ui.back, ui.forth, ui.range, ui.listed]

    def turn(by: int | None):
        def turned(data_id, model, limit, page, search, label, row):
            page = 0 if by is None else max(0, page + by)
            return _page(ui, _look(data_id, model, limit), page, search, label, row)

        return quiet(turned)

    def jump(data_id, model, limit, page, search, label, row, number):
        if not number or number < 1:  # being typed
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
    ui.row.change(None, [ui.row], js=data_layout.MARK_ROW, show_progress="hidden")
    gr.on([ui.row.input, ui.view.input], quiet(typed), [*asked, ui.row], [ui.shown, ui.opened], **LAST)


def _other_events(ctx: Context, ui) -> None:
    asked = [ctx.chosen_data, ui.model, ui.limit, ui.form]

    def act(data_id, model, limit, form):
        """Cancel what runs, or try again what did not come."""
        found = data_jobs.look(data_id, model, _limit(limit), start=False)
        running = next((j for j in (found.reading, found.counting) if j and j.running), None)
        if running:
            running.cancel()
        elif found.loaded is None:
            data_jobs.read(data_id)
        else:
            data_jobs.count(data_id, model, _limit(limit))
        return _progress(ui, data_jobs.look(data_id, model, _limit(limit), start=False))

    def convert(data_id, model, limit, form):
        data_jobs.convert(data_id, form).thread.join(SHORT)
        return _conversion(ui, _look(data_id, model, limit), form)

    def chosen_form(data_id, model, limit, form):
        return _conversion(ui, _look(data_id, model, limit), form)

    def use(data_id, model, limit, form):
        report = _look(data_id, model, limit).report
        weight = data_view.advised(report) if report else None
        if weight is None:
            raise DataError("There is nothing to change: both weights stay at 1.")
        gr.Info(f"{weight[0]} is now {weight[1]:g} in the Train tab.", title="Taken", duration=5)
        return {"desirable_weight": 1.0, "undesirable_weight": 1.0, weight[0]: weight[1]}

    converted = [ui.convert, ui.converted, ui.converting]
    ui.action.click(ctx.guarded(act), asked, [ui.status, ui.told, ui.action], **QUICK)
    ui.convert.click(ctx.guarded(convert), asked, converted, **QUICK)
    ui.form.input(ctx.guarded(chosen_form), asked, converted, **QUICK)
    ui.use.click(ctx.guarded(use), asked, [ctx.advice], **QUICK)
