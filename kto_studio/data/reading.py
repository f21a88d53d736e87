"""How the rows are read: which column is which, and where a scale of ratings is cut. Both stay with the data set.

Columns are read again as soon as one is chosen. Thresholds show the balance they would give before they are applied.
"""

from __future__ import annotations

from collections.abc import Callable

import gradio as gr

from kto_core.config import column_map, resolving
from kto_core.config.thresholds import disorder
from kto_core.data.records import scales
from kto_core.data.report import Report
from kto_studio.shared import readings
from kto_studio.shared.context import DIRECT, QUICK, Context, Event, lenient
from kto_studio.shared.marks import mark
from kto_studio.shared.prose import note

from . import jobs, view

TARGETS = tuple(column_map.TARGETS)
_LAST: Event = {**DIRECT, "trigger_mode": "always_last"}  # typing: the newest value wins
_MAPPED: Event = {**QUICK, "trigger_mode": "always_last"}
MAIN = 3  # targets of the first line: a row of one answer
_HELP = {c.name: f"{c.description.split('.')[0]}." for c in resolving.cli_fields() if c.name in readings.NAMES}


def panel(ui) -> None:
    """Adds the controls; nothing of it is seen until there is something to say."""
    with gr.Accordion("Columns", open=False, visible=False, elem_id="data-columns") as ui.columns_room:
        for start in range(0, len(TARGETS), MAIN):
            with gr.Row(equal_height=True):
                for target in TARGETS[start : start + MAIN]:
                    control = gr.Dropdown(
                        [("", "")], value="", label=target.capitalize(), info=_about(target), min_width=150,
                        elem_id=f"data-map-{target}",
                    )  # fmt: skip
                    setattr(ui, f"map_{target}", control)
    with gr.Column(elem_classes="card", visible=False, elem_id="data-scale") as ui.scale_room:
        ui.scale = gr.HTML("", show_label=False, elem_id="data-scale-values")
        with gr.Row(equal_height=True):
            for name in ("good_from", "bad_to"):
                number = gr.Number(
                    None, label=name.replace("_", " ").capitalize(), info=_HELP[name], step="any",  # type: ignore[arg-type]  # a number input's step
                    min_width=150, elem_id=f"data-{name}",
                )  # fmt: skip
                setattr(ui, name, number)
        ui.cut = gr.HTML("", show_label=False, elem_id="data-cut")
        with gr.Row():
            ui.apply = gr.Button("Apply", variant="primary", size="md", elem_id="data-apply")
            ui.uncut = gr.Button("Remove thresholds", size="md", visible=False, elem_id="data-uncut")
    ui.read_as = mark()


def _about(target: str) -> str:
    text = column_map.TARGETS[target]
    return f"{text[0].upper()}{text[1:]}."


def controls(ui) -> list:
    """The dropdowns, in the order of `TARGETS`."""
    return [getattr(ui, f"map_{target}") for target in TARGETS]


# ---- what is shown


def signature(found: jobs.Look) -> tuple:
    """Changes when the controls would show something else; not while somebody types."""
    return (*found.signature[:1], found.loaded is not None, bool(found.reading and found.reading.state == "failed"))


def shown(ui, found: jobs.Look) -> dict:
    """Values of all controls for a data set."""
    kept = readings.of(found.data_id)
    report = found.loaded.report if found.loaded else None
    given = column_map.parse(kept.get("map", ""))
    names = report.columns if report else jobs.columns(found.data_id)
    names = list(dict.fromkeys([*names, *given.values()]))
    unknown = report is not None and not report.mapping
    out = {
        ui.read_as: signature(found),
        ui.columns_room: gr.update(visible=bool(names), open=unknown or bool(given), label=_said(report)),
    }
    for target, control in zip(TARGETS, controls(ui), strict=True):
        out[control] = gr.update(choices=_choices(target, names, report), value=given.get(target, ""))
    return out | _scale(ui, report, kept)


def _said(report: Report | None) -> str:
    """Which column is which, in a line."""
    mapping = (report.mapping or {t: [c] for t, c in report.mapped.items()}) if report else {}
    if not mapping:
        return "Columns: choose which is which"
    parts = [t if [t] == c else f"{t} = {' + '.join(c)}" for t, c in mapping.items()]
    return "Columns: " + ", ".join(parts)


def _choices(target: str, names: list[str], report: Report | None) -> list[tuple[str, str]]:
    found = report.mapping.get(target, []) if report and target not in report.mapped else []
    blank = f"{', '.join(found)} (recognized)" if found else "—"
    return [(blank, ""), *((name, name) for name in names)]


def _scale(ui, report: Report | None, kept: dict) -> dict:
    cuts = "good_from" in kept or "bad_to" in kept
    there = bool(report and report.scales) or cuts
    good, bad = kept.get("good_from"), kept.get("bad_to")
    values = scale(report)
    if report and report.scales and not cuts:
        good, bad = scales.suggested(_together(report))
    text, right = balance(report, good, bad)
    return {
        ui.scale_room: gr.update(visible=there),
        ui.scale: values,
        ui.good_from: good,
        ui.bad_to: bad,
        ui.cut: text,
        ui.apply: gr.update(interactive=right and not cuts),
        ui.uncut: gr.update(visible=cuts),
    }


def _together(report: Report) -> dict[float, int]:
    counts: dict[float, int] = {}
    for numbers in report.scales.values():
        for number, n in numbers.items():
            counts[number] = counts.get(number, 0) + n
    return counts


def scale(report: Report | None) -> str:
    """A scale's values, how often each is there, and how they are read now."""
    if report is None or not report.scales:
        return '<h2 class="card-title">Ratings</h2>'
    columns = ", ".join(report.scales)
    counts = _together(report)
    bars = ""
    if len(counts) <= 12:
        most = max(counts.values())
        bars = "".join(
            f'<div><i style="height:{max(3.0, 48 * n / most):.0f}px"></i><b>{value:g}</b><span>{n:,}</span></div>'
            for value, n in sorted(counts.items())
        )
        bars = f'<div class="grades" role="img" aria-label="Rows of each rating">{bars}</div>'
    return (
        f'<h2 class="card-title">Ratings <span>in {view.esc(columns)}</span></h2>{bars}'
        f'<p class="card-text">{view.esc(_state(report))}</p>'
    )


def _state(report: Report) -> str:
    """How the numbers are read, without the flags of the command line."""
    numbers = {column: scales.Numbers.of(counts) for column, counts in report.scales.items()}
    low, high = min(n.low for n in numbers.values()), max(n.high for n in numbers.values())
    if "read as a scale" in report.scale:
        return "The thresholds below are applied."
    if "read as yes and no" in report.scale:
        return "Read as yes and no: 1 is good. If it is a scale, say below where good begins and bad ends."
    span = f"{low:g} to {high:g}" if low < high else f"always {low:g}"
    return f"A scale ({span}), so none of its numbers is a label yet. Say where good begins and bad ends."


def balance(report: Report | None, good_from: float | None, bad_to: float | None) -> tuple[str, bool]:
    """What such thresholds would make of the ratings, and whether they can be applied."""
    if report is None or not report.scales or (good_from is None and bad_to is None):
        return "", False
    numbers = {column: scales.Numbers.of(counts) for column, counts in report.scales.items()}
    if problem := disorder(good_from, bad_to) or scales.misfit(numbers, good_from, bad_to):
        return note(_plain(problem), "bad"), False
    good, bad, between = scales.cut(_together(report), good_from, bad_to)
    total = max(1, good + bad + between)
    parts = ((good, "good", "👍 Good"), (bad, "bad", "👎 Bad"), (between, "out", "Left out"))
    bar = "".join(f'<i class="{kind}" style="width:{100 * n / total:.2f}%"></i>' for n, kind, _ in parts if n)
    legend = "".join(
        f'<span><i class="dot {kind}"></i>{name} <b>{n:,}</b></span>' for n, kind, name in parts if n or kind != "out"
    )
    text = f"{good:,} good, {bad:,} bad, {between:,} left out"
    return (
        f'<div class="cut" role="img" aria-label="{text}">{bar}</div><div class="balance-legend">{legend}</div>'
    ), True


def _plain(problem: str) -> str:
    """A problem of thresholds without the command line's advice."""
    return problem.partition(" Set good_from")[0].replace("good_from:", "Good from:").replace("bad_to:", "Bad to:")


# ---- what is chosen


def choose(data_id: str, *chosen: str) -> None:
    """Keep which column is which. A column that was another target's is that no longer."""
    before = column_map.parse(readings.of(data_id).get("map", ""))
    columns = {target: column for target, column in zip(TARGETS, chosen, strict=True) if column}
    new = {column for target, column in columns.items() if before.get(target) != column}
    columns = {t: c for t, c in columns.items() if c not in new or before.get(t) != c}
    readings.keep(data_id, map=column_map.written(columns))


def typed(ui, data_id: str, good_from: float | None, bad_to: float | None) -> dict:
    """The balance that is typed, before it is applied."""
    found = jobs.look(data_id, start=False)
    kept = readings.of(data_id)
    text, right = balance(found.loaded.report if found.loaded else None, good_from, bad_to)
    new = (good_from, bad_to) != (kept.get("good_from"), kept.get("bad_to"))
    return {ui.cut: text, ui.apply: gr.update(interactive=right and new)}


def apply(ui, data_id: str, good_from: float | None, bad_to: float | None) -> dict:
    """Keep thresholds that can be applied."""
    out = typed(ui, data_id, good_from, bad_to)
    found = jobs.look(data_id, start=False)
    if balance(found.loaded.report if found.loaded else None, good_from, bad_to)[1]:
        readings.keep(data_id, good_from=good_from, bad_to=bad_to)
    return out


def uncut(data_id: str) -> None:
    """Read the ratings without thresholds."""
    readings.keep(data_id, good_from=None, bad_to=None)


def events(ctx: Context, ui, again: Callable) -> None:
    """What is chosen of columns and thresholds; ``again(event)`` shows the rows as they are read then."""
    columns, cuts = [ctx.chosen_data, *controls(ui)], [ctx.chosen_data, ui.good_from, ui.bad_to]

    def bound(fn):
        return ctx.guarded(lambda *values: fn(ui, *values))

    chosen = lenient(ctx.guarded(choose), columns)  # a list that changed refuses a value of the list before
    again(gr.on([c.input for c in columns[1:]], chosen, columns, None, preprocess=False, **_MAPPED))
    gr.on([ui.good_from.input, ui.bad_to.input], bound(typed), cuts, [ui.cut, ui.apply], **_LAST)
    again(ui.apply.click(bound(apply), cuts, [ui.cut, ui.apply], **QUICK))
    again(ui.uncut.click(ctx.guarded(uncut), cuts[:1], None, **QUICK))
