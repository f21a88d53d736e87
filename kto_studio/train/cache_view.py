"""What the packed engine keeps on disk between runs: how much it is, and a way to clear it."""

from __future__ import annotations

import gradio as gr

from kto_core import engine
from kto_studio.shared import views
from kto_studio.shared.context import Context, Event

WHAT = (
    "The packed engine caches the reference log-prob of every answer, so that a later run on the same rows starts "
    "immediately. After clearing, the log-probs are recomputed. No run is deleted."
)


def build(ctx: Context) -> None:
    with gr.Accordion("Reference log-prob cache", open=False, elem_id="train-cache") as room, gr.Row():
        size = gr.HTML(_text("…"), show_label=False)
        clear = gr.Button("Clear", size="sm", scale=0, min_width=90, elem_id="train-cache-clear")

    def freed():
        return _text(f"{views.size(engine.clear_cache())} freed")

    quick: Event = {"show_progress": "hidden", "api_visibility": "private"}
    room.expand(ctx.guarded(lambda: _text(views.size(engine.cache_size()))), None, [size], **quick)
    clear.click(ctx.guarded(freed), None, [size], **quick)


def _text(size: str) -> str:
    return f'<p class="card-text"><b>{size}.</b> {WHAT}</p>'
