"""What the shown run's log says of its health, under its plots: what is seen and what to change, in plain words."""

from __future__ import annotations

import html
from collections.abc import Sequence

import gradio as gr

from kto_core.health import reading
from kto_core.health.about import WARNING, Finding
from kto_studio.shared.prose import prose

NOTHING = "The rules find nothing unusual in the log so far."


def build() -> list:
    """The component."""
    return [gr.HTML("", show_label=False, visible=False, elem_id="train-health")]


def key(run) -> tuple:
    """Changes with the run's points and state."""
    s = run.state() if run else None
    return (run.id, s.metrics.total, len(s.metrics), s.state, s.error) if s else (None,)


def values(run) -> list:
    """What `build`'s component shows; nothing before the first numbers."""
    state = run.state() if run else None
    if state is None or not state.metrics:
        return [gr.update(value="", visible=False)]
    return [gr.update(value=view(reading.of_run(run)), visible=True)]


def view(findings: Sequence[Finding]) -> str:
    """A card with a line each."""
    lines = "".join(map(_line, findings)) or f'<p class="card-text">{NOTHING}</p>'
    return f'<div class="card"><div class="panel-head"><h2>Health</h2></div>{lines}</div>'


def _line(found: Finding) -> str:
    tone = " note-warning" if found.level == WARNING else ""
    kind, level = html.escape(found.kind), html.escape(found.level)
    text = f"<b>{prose(found.sentence)}</b> {prose(found.change)}"
    return f'<div class="note{tone}" data-kind="{kind}" data-level="{level}">{text}</div>'
