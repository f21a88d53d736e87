"""How the shown run's learning rate was found: a table and a curve of its trials, read from the run's folder."""

from __future__ import annotations

import html

import gradio as gr

from kto_core.guards import bounded
from kto_core.planning.rate import short
from kto_core.runs import rates
from kto_core.runs.rates import Found, Trial
from kto_studio.shared import curves, views
from kto_studio.shared.prose import prose

SERIES = "validation"  # rows that were not trained on, in the color that they have in the other plots


def build() -> list:
    """The components: a card, the table in it, and the plot."""
    with gr.Column(visible=False, elem_classes="card", elem_id="train-rate") as card:
        table = gr.HTML("", show_label=False, elem_id="train-rate-table")
        plot = curves.component("train-rate-plot")
    return [card, table, plot]


def key(run) -> tuple:
    """Changes with the run's file."""
    return (run.id, bounded.stamp(run.path / rates.FILE)) if run else (None,)


def values(run) -> list:
    """What `build`'s components show of a run; nothing where its rate was not looked for."""
    found = rates.read(run.path) if run else None
    if found is None or not (found.trials or found.rate):
        return [gr.update(visible=False), "", ""]
    return [gr.update(visible=True), view(found), curves.view([curve(found)])]


def curve(found: Found) -> curves.Curve:
    """Loss by rate."""
    points = sorted((t.rate, t.loss) for t in found.trials if t.loss is not None)
    line = curves.Line(SERIES, views.COLORS[SERIES], points)
    return curves.Curve("plot-rate", "Loss after a few steps at each rate", [line], x="learning rate", log=True)


def view(found: Found) -> str:
    """Sentence and table as HTML."""
    if found.rate is None:
        head, why = "Finding the learning rate", f"{len(found.trials)} of at most {found.most} rates are tried."
    else:
        head = f"Learning rate {short(found.rate)}" + (", by the rule" if found.by == "rule" else "")
        why = found.reason
    text = f'<div class="panel-head"><h2>{html.escape(head)}</h2><p>{prose(why)}</p></div>'
    if not found.trials:
        return text
    names = ("Rate", "Loss", "Reward margin", "Reward of good", "Moved, nats per answer")
    cells = "".join(f'<th scope="col">{name}</th>' for name in names)
    lines = "".join(_line(t, t.rate == found.rate) for t in found.trials)
    about = f"After {found.steps} steps at each rate, on {found.rows} rows that were not trained on."
    return (
        f'{text}<div class="report"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'
        f'<p class="card-text">{about}</p>'
    )


def _line(t: Trial, taken: bool) -> str:
    numbers = ["NaN", "", "", ""]
    if t.loss is not None:
        numbers = [f"{t.loss:.4f}", f"{t.margin:+.3f}", f"{t.chosen:+.3f}", f"{t.nats:.3g}"]
    mark = ' class="mine" aria-current="true"' if taken else ""
    cells = "".join(f"<td>{text}</td>" for text in (short(t.rate), *numbers))
    return f"<tr{mark}>{cells}</tr>"
