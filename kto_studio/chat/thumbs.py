"""Thumbs of the Chat tab become rows, and so does what somebody writes in place of a bad answer."""

from __future__ import annotations

from collections.abc import Callable

import gradio as gr

from kto_core import paths
from kto_core.data import feedback
from kto_core.errors import ModelError
from kto_studio.shared.context import QUICK, Context

from . import session, view
from .session import Settings

FEEDBACK = "chat_feedback.jsonl"


def build(ctx: Context, settings: list, screen: list, under: tuple, correction: tuple, keep: Callable) -> None:
    """Connect the thumbs.

    Args:
        under: the note under the conversation and its button. correction: `layout.correction_controls`.
        keep: (conversation, settings) -> what the browser keeps.
    """
    note, use = under
    talk, left, right, *_, kept = screen
    room, text, save, cancel = correction
    which = gr.Textbox("", visible=False)  # the answer that the field is for: column and place, as in ``liked``

    def shown():
        up, down = _count()
        return view.feedback(up, down, FEEDBACK), gr.update(visible=bool(up + down))

    def rate(side: str, event: gr.LikeData, conversation: dict, values: tuple):
        s, place = Settings(*values), event.index[0] if isinstance(event.index, list | tuple) else event.index
        index = view.position(conversation[side], place)
        messages = session.rated(conversation, side, index, s.system)
        key, liked = f"{side}{index}", dict(conversation["liked"])
        if event.liked is True or event.liked is False:
            feedback.add(_path(), messages, event.liked, **_about("thumb", conversation[side][index]))
            liked[key] = event.liked
        else:  # taken back
            feedback.remove(_path(), messages)
            liked.pop(key, None)
        if event.liked is not False:
            conversation = _corrected(conversation, key, messages, "")
        conversation = conversation | {"liked": liked}
        asks = event.liked is False
        field = (gr.update(visible=asks), conversation["corrected"].get(key, ""), key if asks else "")
        return conversation, keep(conversation, s), *shown(), *field

    def rate_left(event: gr.LikeData, conversation: dict, *values):
        return rate("a", event, conversation, values)

    def rate_right(event: gr.LikeData, conversation: dict, *values):
        return rate("b", event, conversation, values)

    def correct(key: str, better: str, conversation: dict, *values):
        s, better = Settings(*values), (better or "").strip()
        if not key or conversation["liked"].get(key) is not False:
            raise ModelError("This answer is not rated 👎 any more. Rate it again, then write the better answer.")
        side, index = key[0], int(key[1:])
        messages = session.rated(conversation, side, index, s.system)
        if not better or better == messages[-1]["content"].strip():
            raise ModelError("Write what the answer should have said, in other words than it has.")
        conversation = _corrected(conversation, key, messages, better)
        gr.Info("Saved as a 👍 Good row. The answer itself stays 👎 Bad.")
        return conversation, keep(conversation, s), *shown(), gr.update(visible=False), "", ""

    outputs = [talk, kept, note, use, room, text, which]
    for column, handler in ((left, rate_left), (right, rate_right)):
        column.like(ctx.guarded(handler), [talk, *settings], outputs, **QUICK)
    save.click(ctx.guarded(correct), [which, text, talk, *settings], outputs, **QUICK)
    cancel.click(lambda: (gr.update(visible=False), "", ""), None, [room, text, which], **QUICK)
    ctx.on_load(shown, [note, use])

    def open_data():
        if not _path().is_file():
            raise ModelError("No rated answers yet. Rate an answer first.")
        return f"file:{FEEDBACK}", gr.Tabs(selected="data")

    use.click(ctx.guarded(open_data), None, [ctx.chosen_data, ctx.tabs], **QUICK)


def _path():
    return paths.data_dir() / FEEDBACK


def _count() -> tuple[int, int]:
    """Rows in the feedback file: (desirable, undesirable)."""
    return feedback.counts(_path())


def _about(what: str, message: dict) -> dict:
    """Columns that say who gave the answer and how; none for an answer of which nobody noted it."""
    by = message.get("by")
    return feedback.about(what, **by) if session.is_origin(by) else {}


def _corrected(conversation: dict, key: str, messages: list[dict], better: str) -> dict:
    """The conversation with a correction of one answer, or without if it is empty; the file follows."""
    corrected = dict(conversation["corrected"])
    before = corrected.pop(key, "")
    if before and before != better:
        feedback.remove(_path(), [*messages[:-1], {"role": "assistant", "content": before}])
    if better:
        about = _about("correction", conversation[key[0]][int(key[1:])])
        feedback.add(_path(), [*messages[:-1], {"role": "assistant", "content": better}], True, **about)
        corrected[key] = better
    return conversation | {"corrected": corrected}
