"""The chosen runs beside each other: a card for each, what differs, final numbers, answers, curves."""

from __future__ import annotations

import html
from collections.abc import Sequence

from kto_core.compare import series, settings
from kto_core.compare.facts import Facts
from kto_core.runs.events import RunState, thin
from kto_core.runs.run import Run
from kto_core.verdict import wording
from kto_studio.shared import curves, views
from kto_studio.shared.curves import number
from kto_studio.shared.prose import prose

from . import view

METRICS = {
    "loss": "Loss",
    "eval_loss": "Validation loss",
    "rewards/margins": "Reward margin",
    "eval_rewards/margins": "Validation reward margin",
    "rewards/chosen": "Reward of good answers",
    "eval_rewards/chosen": "Validation reward of good answers",
    "rewards/rejected": "Reward of bad answers",
    "eval_rewards/rejected": "Validation reward of bad answers",
    "logps/chosen": "Log-prob of good answers",
    "eval_logps/chosen": "Validation log-prob of good answers",
    "logps/rejected": "Log-prob of bad answers",
    "eval_logps/rejected": "Validation log-prob of bad answers",
    "kl": "KL",
    "eval_kl": "Validation KL",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
}
STEP, TIME = "step", "time"


def color(i: int) -> str:
    """Of the run at this place among the chosen ones."""
    return f"var(--run-{i % view.MOST + 1})"


def _dot(i: int) -> str:
    return f'<i class="run-dot" style="background:{color(i)}"></i>'


# ---- cards


def cards(facts: Sequence[Facts], verdicts: Sequence[str]) -> str:
    """One for each run: what it is, its verdict, and what can be done with it."""
    body = "".join(_card(i, f, said) for i, (f, said) in enumerate(zip(facts, verdicts, strict=True)))
    return f'<div class="run-cards">{body}</div>' if body else ""


def _card(i: int, f: Facts, verdict: str) -> str:
    title, run = html.escape(f.title), html.escape(f.id)
    about = " · ".join(html.escape(t) for t in (f.data, f.model) if t)
    said = f"cannot be read: {f.problem}" if f.problem else verdict or "Not judged."
    tone = " bad" if f.problem else ""
    note = f'<p class="run-note-whole">{html.escape(f.note)}</p>' if f.note else ""
    names = [("open", "Open in Train", f"Open {title} in Train")]
    names += [("start", "Start from these settings", f"Start from the settings of {title}")] if not f.problem else []
    names += [("edit", "Edit", f"Edit name, tags and note of {title}"), ("drop", "Remove", f"Do not compare {title}")]
    buttons = "".join(
        f'<button type="button" data-do="{what}" data-run="{run}" aria-label="{said_}">{shown}</button>'
        for what, shown, said_ in names
    )
    under = f'<span class="run-id">{run}</span>' if f.name else ""
    return (
        f'<article class="run-card" style="border-top-color:{color(i)}"><h3>{title}</h3>{under}'
        f'<div class="run-line">{"" if f.problem else view.state(f)}{view.tags(f)}</div>'
        f'<p class="card-text">{about}</p><p class="run-said{tone}">{prose(said)}</p>{note}'
        f'<div class="run-buttons">{buttons}</div></article>'
    )


# ---- tables


def _heads(facts: Sequence[Facts], *first: str) -> str:
    names = [f'<th scope="col">{html.escape(name)}</th>' for name in first]
    names += [f'<th scope="col">{_dot(i)}{html.escape(f.title)}</th>' for i, f in enumerate(facts)]
    return f"<thead><tr>{''.join(names)}</tr></thead>"


def _table(title: str, head: str, lines: Sequence[str], kind: str = "") -> str:
    return (
        f'<section><h3 class="card-title">{title}</h3><div class="report {kind}" tabindex="0" role="region" '
        f'aria-label="{title}"><table>{head}<tbody>{"".join(lines)}</tbody></table></div></section>'
    )


def _line(name: str, cells: Sequence[str]) -> str:
    return f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def details(facts: Sequence[Facts], runs: Sequence[Run]) -> str:
    """What differs, the final numbers and the answers."""
    if not runs:
        return ""
    parts = []
    if len(runs) > 1:
        differ = settings.differences(runs)
        if differ:
            lines = [
                _line(f"<code>{html.escape(name)}</code>", [html.escape(v) or "<i>none</i>" for v in values])
                for name, values in differ
            ]
            parts.append(_table("Settings that differ", _heads(facts, "Setting"), lines))
        else:
            parts.append('<section><h3 class="card-title">Settings that differ</h3><p class="card-text">None: model, '
                         "dataset and all settings are the same.</p></section>")  # fmt: skip
    if found := settings.metrics(runs):
        lines = [_line(html.escape(name), ["" if v is None else number(v) for v in values]) for name, values in found]
        parts.append(_table("Final numbers", _heads(facts, "Metric"), lines))
    if answers := settings.answers(runs):
        lines = [_answers(*row) for row in answers]
        parts.append(_table("Answers side by side", _heads(facts, "Prompt", "Before"), lines, "answers"))
    return f'<div class="beside">{"".join(parts)}</div>' if parts else ""


def _answers(prompt: str, base: str, tuned: Sequence[str | None]) -> str:
    cells = [html.escape(prompt), html.escape(base), *(_answer(base, text) for text in tuned)]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _answer(base: str, text: str | None) -> str:
    """What is new in it is marked."""
    if text is None:
        return '<span class="lines">not asked</span>'
    if text == base:
        return '<span class="lines">the same</span>'
    pieces = [(kind, html.escape(piece)) for kind, piece in wording.changed(base, text) if kind != "gone"]
    return "".join(f"<ins>{piece}</ins>" if kind == "new" else piece for kind, piece in pieces)


# ---- curves


def plot(facts: Sequence[Facts], states: Sequence[RunState], metric: str, x: str,
         zoom: curves.Range | None = None) -> str:  # fmt: skip
    """The runs' curves of one metric over each other, or that none has it."""
    metric = metric if metric in METRICS else "loss"
    if x == TIME:
        unit, lines = series.in_unit([series.by_time(s, metric) for s in states])
    else:
        unit, lines = STEP, [series.by_step(s, metric) for s in states]
    drawn = [curves.Line(f.title, color(i), points) for i, (f, points) in enumerate(zip(facts, lines, strict=True))]
    made = curves.Curve("plot-runs", METRICS[metric], drawn, x=unit, thin=lambda points: thin(points, views.POINTS))
    if not facts:
        return ""
    missing = [f.title for f, points in zip(facts, lines, strict=True) if not points]
    text = f"{', '.join(missing)}: no value of {metric}." if missing else ""
    note = f'<p class="card-text">{html.escape(text)}</p>' if text else ""
    return curves.view([made], zoom) + note
