"""The guest's page: talk to the model that the owner has loaded, and nothing else (SECURITY.md)."""

from __future__ import annotations

import threading

import gradio as gr

from kto_core import chat
from kto_core.errors import ModelError
from ui import chat_view, context

MAX_CHARS = 8000  # of one message
MAX_TOKENS = 512
ABSENT = "The owner of this app has not loaded a model yet. Ask them to open **Chat** and press **Load**."


def build() -> gr.Blocks:
    """A page with one conversation; it is kept in the open page only."""
    with gr.Blocks(title="KTO Studio: chat", fill_width=True, fill_height=True, analytics_enabled=False) as blocks:
        gr.Markdown("## KTO Studio\nYou are a guest: chat with the model that is loaded here.")
        talk = gr.Chatbot(
            show_label=False,
            height=560,
            sanitize_html=True,
            render_markdown=False,
            placeholder="Ask something. Answers come from a model that is being tuned: do not rely on them.",
            elem_id="guest-talk",
        )
        with gr.Row():
            tuned = gr.Radio(
                [("Tuned", True), ("Base", False)],
                value=True,
                label="Model",
                info="The model after or before training.",
            )
            box = gr.Textbox(
                label="Message",
                placeholder="Type a message and press Enter",
                scale=6,
                max_length=MAX_CHARS,
                autofocus=True,
            )
            stop = gr.Button("Stop", variant="stop", min_width=90)
            clear = gr.Button("Clear", min_width=90)
        asked = box.submit(_ask, [box, talk], [box, talk], queue=False).success(
            context.guarded(_answer), [talk, tuned], talk, concurrency_limit=2
        )
        stop.click(None, cancels=[asked], queue=False)
        clear.click(list, None, talk, cancels=[asked], queue=False)
    for fn in blocks.fns.values():
        fn.api_visibility = "private"
    return blocks


def _ask(text: str, talk: list) -> tuple[str, list]:
    text = (text or "").strip()
    if not text:
        raise context.error("Type a message first.")
    return "", [*talk, {"role": "user", "content": chat_view.shown(text[:MAX_CHARS], markdown=False)}]


def _answer(talk: list, tuned: bool):
    """Stream the answer to the last message; closing this generator (Stop) stops the model."""
    if (loaded := chat.current()) is None:
        raise ModelError(ABSENT.replace("**", ""))
    messages = [{"role": m["role"], "content": chat_view.typed(chat_view.content(m["content"]))} for m in talk]
    stop, text = threading.Event(), ""
    try:
        for part in loaded.stream(messages, tuned=bool(tuned), max_new_tokens=MAX_TOKENS, cancel=stop):
            text += part
            yield [*talk, {"role": "assistant", "content": chat_view.shown(text, markdown=False)}]
    finally:
        stop.set()
