"""What `evaluate` said of the shown run: one line, and its numbers in a fold. Read from the run's folder."""

from __future__ import annotations

import html

import gradio as gr

from kto_core.verdict import keeping, wording
from kto_studio.shared.prose import prose


def build() -> list:
    """The component."""
    return [gr.HTML("", show_label=False, visible=False, elem_id="train-verdict")]


def key(run) -> tuple:
    """Changes with the run's verdict, and with the adapter that it is about."""
    return (run.id, *keeping.key(run)) if run else (None,)


def values(run) -> list:
    """What `build`'s component shows; nothing where the run's adapter was not judged."""
    found = keeping.read(run) if run else None
    return [gr.update(value=view(found) if found else "", visible=bool(found))]


def view(found: dict) -> str:
    """The line and the fold as HTML."""
    lines = [("Measured on", found["data"]), *wording.lines(found), *(("Note", text) for text in found["remarks"])]
    rows = "".join(f'<tr><th scope="row">{html.escape(n)}</th><td>{html.escape(t)}</td></tr>' for n, t in lines)
    return (
        f'<details class="card" data-verdict="{html.escape(found["verdict"]["word"])}"><summary>'
        f"{prose(found['verdict']['sentence'])}</summary>"
        f'<div class="report"><table><tbody>{rows}</tbody></table></div></details>'
    )
