"""The guest's page: talk to the model that the owner has loaded, and nothing else (SECURITY.md).

A guest sends one line of text and which of the two models shall answer. The conversation stays on this side, in a
gr.State: Gradio would open files and make components that a conversation from a browser names.
"""

from __future__ import annotations

import threading
import time

import gradio as gr

from kto_core.chat import chat
from kto_core.data.records import thoughts
from kto_core.errors import BusyError, ModelError, Unloaded
from kto_studio.shared import context

from . import view
from .session import EVERY

MAX_BODY = 256 * 1024  # bytes of any request of a guest; the gate refuses larger ones before they are read
MAX_CHARS = 8000  # of one message
MAX_TURNS = 40  # messages of a conversation, questions and answers
MAX_TALK = 24_000  # characters of a conversation
MAX_TOKENS = 512  # of one answer
MAX_ANSWERS = 4  # pages at once: one is answered, the others wait for the model
MAX_QUEUE = 8  # calls that wait behind those; more are refused
MAX_PAGES = 200  # pages whose conversations are kept, the newest ones; Gradio's own limit is 10,000

ABSENT = "No model is loaded yet. Ask the owner of this app to open **Chat** and press **Load**."
TAKEN = "The owner of this app has unloaded the model, so your answer ends here. Try again when another one is loaded."
TWICE = "Your last message is still being answered. Wait for it, or press Stop."
DROPPED = f"The oldest messages were left out: a conversation here has {MAX_TURNS} messages or {MAX_TALK:,} characters."

_answering: dict[str | None, threading.Event] = {}  # pages whose message is being answered


def build() -> gr.Blocks:
    """A page with one conversation, which ends with the page."""
    with gr.Blocks(title="KTO Studio: chat", fill_width=True, fill_height=True, analytics_enabled=False) as blocks:
        gr.Markdown("## KTO Studio\nYou are a guest. You can chat with the model that is loaded here.")
        talk = gr.State([])
        shown = gr.Chatbot(
            show_label=False,
            height=560,
            sanitize_html=True,
            render_markdown=False,
            placeholder="Ask a question. Answers come from a model that is being fine-tuned, so do not rely on them.",
            elem_id="guest-talk",
        )
        note = gr.HTML("", show_label=False, elem_id="guest-note")
        with gr.Row():
            tuned = gr.Radio(
                [("Tuned", True), ("Base", False)],
                value=True,
                label="Model",
                info="The model after training (Tuned) or before (Base).",
            )
            box = gr.Textbox(
                label="Message",
                placeholder="Type a message and press Enter",
                scale=6,
                max_length=MAX_CHARS,
                autofocus=True,
                elem_id="guest-message",
            )
            stop = gr.Button("Stop", variant="stop", min_width=90)
            clear = gr.Button("Clear", min_width=90)
        # through the queue: an error that is raised outside of it shows no toast
        asked = box.submit(
            context.guarded(_ask), [box, talk], [box, talk, shown, note], concurrency_limit=None, trigger_mode="once"
        )
        answered = asked.success(
            context.guarded(_answer), [talk, tuned], [talk, shown], concurrency_limit=MAX_ANSWERS, trigger_mode="once"
        )
        stop.click(None, cancels=[answered], queue=False)
        for event in (clear.click, shown.clear):
            event(lambda: ([], [], ""), None, [talk, shown, note], cancels=[answered], queue=False)
    for fn in blocks.fns.values():
        fn.api_visibility = "private"
    blocks.queue(max_size=MAX_QUEUE)
    blocks.state_session_capacity = MAX_PAGES
    blocks.has_launched = True  # it is mounted, never launched: Gradio would let calls name any file of this machine
    return blocks


def _ask(text: str, talk: list) -> tuple[str, list[dict], list[dict], str]:
    """The conversation with a question at its end: empty box, conversation, what is shown, what was left out."""
    text = text.strip() if isinstance(text, str) else ""
    if not text:
        raise ModelError("Type a message first.")
    kept, dropped = _kept([*_complete(talk), {"role": "user", "content": text}])
    return "", kept, _shown(kept), f'<div class="note">{DROPPED}</div>' if dropped else ""


def _answer(request: gr.Request, talk: list, tuned: bool):
    """Stream the answer to the last message; closing this generator (Stop) stops the model. The owner goes first.

    Raises:
        BusyError: another message of this page is being answered.
        ModelError: no model is loaded, or the owner has unloaded it; nothing to answer, or too much.
    """
    talk, _ = _kept(talk)
    if not talk or talk[-1]["role"] != "user":
        raise ModelError("Type a message first.")
    if (loaded := chat.current()) is None:
        raise ModelError(ABSENT.replace("**", ""))
    page, stop, text, told = request.session_hash, threading.Event(), "", 0.0
    if _answering.setdefault(page, stop) is not stop:
        raise BusyError(TWICE)
    try:
        asked = [{**m, thoughts.KEY: m["thought"]} if m.get("thought") else m for m in talk]
        for part in loaded.stream(asked, tuned=bool(tuned), max_new_tokens=MAX_TOKENS, cancel=stop, gives_way=True):
            text += part
            if time.monotonic() - told > EVERY:
                told = time.monotonic()
                yield _grown(talk, text)
        yield _grown(talk, text)
    except Unloaded:
        raise ModelError(TAKEN) from None
    finally:
        stop.set()
        del _answering[page]


def _grown(talk: list[dict], text: str) -> tuple[list[dict], list[dict]]:
    """The conversation with an answer at its end, and what is shown of it."""
    thought, said = thoughts.split(text, unfinished=True)
    apart = {"thought": thought} if thought else {}
    talk = [*talk, {"role": "assistant", "content": said, **apart}] if text else talk
    return talk, _shown(talk)


def _kept(talk: list) -> tuple[list[dict], bool]:
    """What counts of a conversation, and whether its oldest messages were left out for being too many or too long.

    Text of questions and answers only: files, components and other roles are no part of a guest's conversation.

    Raises:
        ModelError: a question is too long.
    """
    said = [
        {"role": m["role"], "content": t} | ({"thought": m["thought"]} if isinstance(m.get("thought"), str) else {})
        for m in talk
        if _is_turn(m) and (t := _text(m["content"]).strip())
    ]
    longest = max((len(m["content"]) for m in said if m["role"] == "user"), default=0)
    if longest > MAX_CHARS:
        raise ModelError(f"A message may have {MAX_CHARS:,} characters; this one has {longest:,}. Shorten it.")
    kept, room = said[-MAX_TURNS:], MAX_TALK
    for i in range(len(kept) - 1, -1, -1):
        room -= len(kept[i]["content"]) + len(kept[i].get("thought", ""))
        if room < 0:
            kept = kept[i + 1 :]
            break
    while kept and kept[0]["role"] != "user":
        kept = kept[1:]
    return kept, len(kept) < len(said)


def _is_turn(message: object) -> bool:
    return isinstance(message, dict) and message.get("role") in ("user", "assistant") and "content" in message


def _text(content: object) -> str:
    """The text parts of a message; other parts (files, components) are dropped."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [p if isinstance(p, str) else p.get("text") for p in parts if isinstance(p, str | dict)]
    return "".join(t for t in texts if isinstance(t, str))


def _complete(talk: list[dict]) -> list[dict]:
    """Without a question that was never answered."""
    return talk[:-1] if talk and talk[-1]["role"] == "user" else talk


def _shown(talk: list[dict]) -> list[dict]:
    return view.history(talk, markdown=False)
