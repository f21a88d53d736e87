"""How the shown run's learning rate was found: a table and a curve of its trials, read from the run's folder."""

from __future__ import annotations

import html

import gradio as gr

from kto_core.guards import bounded
from kto_core.planning.rate import short
from kto_core.runs import rates
from kto_core.runs.rates import Found, Trial
from kto_studio.shared import views
from kto_studio.shared.prose import prose

SERIES = "validation"  # rows that were not trained on, in the color that they have in the other plots


def build() -> list:
    """The components: a card, the table in it, and the plot."""
    with gr.Column(visible=False, elem_classes="card", elem_id="train-rate") as card:
        table = gr.HTML("", show_label=False, elem_id="train-rate-table")
        plot = gr.LinePlot(
            _frame(()),
            x="rate",
            y="loss",
            color="series",
            color_map={SERIES: views.COLORS[SERIES]},
            x_title="learning rate",
            y_title=" ",  # else the column's name
            color_title="",
            colors_in_legend=[],
            tooltip=["rate", "loss"],
            height=180,
            label="Loss after a few steps at each rate",
            show_label=True,
            buttons=["fullscreen"],
            elem_id="plot-rate",
            elem_classes="plot",
        )
    return [card, table, plot]


def key(run) -> tuple:
    """Changes with the run's file."""
    return (run.id, bounded.stamp(run.path / rates.FILE)) if run else (None,)


def values(run) -> list:
    """What `build`'s components show of a run; nothing where its rate was not looked for."""
    found = rates.read(run.path) if run else None
    if found is None or not (found.trials or found.rate):
        return [gr.update(visible=False), "", gr.update(visible=False)]
    drawn = [t for t in found.trials if t.loss is not None]
    return [gr.update(visible=True), view(found), gr.update(value=_frame(drawn), visible=len(drawn) > 1)]


def view(found: Found) -> str:
    """Sentence and table as HTML."""
    if found.rate is None:
        head, why = "Finding the learning rate", f"{len(found.trials)} of at most {found.most} rates are tried."
    else:
        head = f"Learning rate {short(found.rate)}" + (", by the rule" if found.by == "rule" else "")
        why = found.reason
    text = f'<div class="panel-head"><h3>{html.escape(head)}</h3><p>{prose(why)}</p></div>'
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


def _frame(trials):
    import pandas as pd  # gradio has it loaded already

    return pd.DataFrame({
        "rate": [short(t.rate) for t in trials],
        "loss": [t.loss for t in trials],
        "series": [SERIES for _ in trials],
    })  # fmt: skip
