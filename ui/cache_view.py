"""What the packed engine keeps on disk between runs: how much it is, and a way to clear it."""

from __future__ import annotations

import gradio as gr

from kto_core import engine
from ui import views
from ui.context import Context

WHAT = (
    "The packed engine scores every answer once with the model as it was before training, and keeps the number: a "
    "later run on the same rows starts at once. Cleared, it scores anew; no run is lost."
)


def build(ctx: Context) -> None:
    with gr.Accordion("Reference scores kept on disk", open=False, elem_id="train-cache") as room, gr.Row():
        size = gr.HTML(_text("…"), show_label=False)
        clear = gr.Button("Clear", size="sm", scale=0, min_width=90, elem_id="train-cache-clear")

    def freed():
        return _text(f"{views.size(engine.clear_cache())} freed")

    quick = {"show_progress": "hidden", "api_visibility": "private"}
    room.expand(ctx.guarded(lambda: _text(views.size(engine.cache_size()))), None, [size], **quick)
    clear.click(ctx.guarded(freed), None, [size], **quick)


def _text(size: str) -> str:
    return f'<p class="card-text"><b>{size}.</b> {WHAT}</p>'
