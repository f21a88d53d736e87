"""The Chat tab: talk to a run or a model, compare tuned with base, collect thumbs as training rows."""

from __future__ import annotations

import threading
import time

import gradio as gr

from kto_core.chat import chat
from kto_core.errors import Cancelled
from kto_studio.shared import model_choices
from kto_studio.shared.context import QUICK, Context, Event, error

from . import layout, session, thumbs, view, vote_layout, vote_tab
from .session import BASE, BOTH, TUNED, Settings
from .thumbs import FEEDBACK

BROWSER_KEY = "kto-studio-browser"
ANSWERS: Event = {
    "concurrency_limit": None,  # the model takes one at a time; a page that waits shows its question and Stop
    "show_progress": "hidden",
    "trigger_mode": "once",
    "api_visibility": "private",
}


class _Answer(threading.Event):
    """Set to end an answer. ``void``: what it has written is not wanted any more."""

    void = False


KEPT = 1.0  # seconds after which the browser keeps what was written: a reload loses no more
_stops: dict[str | None, _Answer] = {}  # page -> ends the answer it waits for


def build(ctx: Context) -> None:
    talk = gr.State(session.empty())
    kept = ctx.talk or gr.BrowserState({}, storage_key="kto-studio-chat", secret=BROWSER_KEY)  # survives a reload
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=300):
            model, checkpoint, load, unload, state = layout.model_controls()
            controls = layout.settings_controls()
        with gr.Column(scale=3, min_width=480, elem_id="chat-side"):
            vote_layout.kind()
            with gr.Column(elem_id="chat-talk"):
                with gr.Row():
                    left = layout.chatbot("chat-a", "Conversation")
                    right = layout.chatbot("chat-b", BASE, visible=False)
                stats = gr.HTML("", elem_id="chat-stats", show_label=False)
                correction = layout.correction_controls()
                message, send, stop, clear = layout.message_controls()
                with gr.Row(equal_height=True):
                    note = gr.HTML(view.feedback(0, 0, FEEDBACK), elem_id="chat-note", show_label=False)
                    use = gr.Button(
                        "Open in the Data tab", size="sm", visible=False, scale=0, min_width=190, elem_id="chat-use"
                    )
            vote = vote_layout.side()
    settings = [model, checkpoint, *controls]
    screen = [talk, left, right, stats, send, stop, kept]
    _answers(ctx, settings, screen, message, clear)
    _loading(ctx, model, checkpoint, load, unload, state)
    thumbs.build(ctx, settings, screen, (note, use), correction, _keep)
    vote_tab.build(ctx, vote, settings)


# ---- the conversation


def _columns(talk: dict, markdown: bool, thumbs: bool = False) -> list[dict]:
    """Updates of both chatbots."""
    return [
        gr.update(value=view.history(talk[s], markdown))
        | ({"feedback_value": session.thumbs(talk, s)} if thumbs else {})
        for s in "ab"
    ]


def _keep(talk: dict, s: Settings) -> dict:
    return talk | {"model": s.model, "mode": s.mode, "system": s.system}


def _frames(request: gr.Request, talk: dict, s: Settings):
    """Values for `screen` while the last question is answered, and once more when all is done."""
    stop = _stops[request.session_hash] = _Answer()
    line, problem, kept = "", None, time.monotonic()
    try:
        yield talk, *_columns(talk, s.markdown), "", gr.update(visible=False), gr.update(visible=True), _keep(talk, s)
        for grown, line in session.answer(talk, s, stop):
            if stop.void:
                break
            talk, keep = grown, gr.skip()
            if time.monotonic() - kept > KEPT:
                keep, kept = _keep(talk, s), time.monotonic()
            yield talk, *_columns(talk, s.markdown), line, gr.skip(), gr.skip(), keep
    except Cancelled:  # stopped while it waited for its turn
        pass
    except Exception as e:
        problem = e
    finally:
        stop.set()
        if _stops.get(request.session_hash) is stop:
            del _stops[request.session_hash]
    if stop.void:
        yield *[gr.skip()] * 4, gr.update(visible=True), gr.update(visible=False), gr.skip()
        return
    talk = session.tidy(talk)
    yield talk, *_columns(talk, s.markdown), line, gr.update(visible=True), gr.update(visible=False), _keep(talk, s)
    if problem is not None:
        raise error(problem)


def _index(event, messages: list[dict]) -> int:
    """The message of a column that an event is about."""
    return view.position(messages, event.index[0] if isinstance(event.index, list | tuple) else event.index)


def _answers(ctx: Context, settings: list, screen: list, message: gr.Textbox, clear: gr.Button) -> None:
    talk, left, right, stats, send, stop, kept = screen
    mode, markdown = settings[2], settings[-1]

    def asked(request: gr.Request, text: str, conversation: dict, *values):
        s = Settings(*values)
        if not (text or "").strip():
            return
        frames = _frames(request, session.ask(conversation, s.mode, text.strip()), s)
        yield *next(frames), ""
        for frame in frames:
            yield *frame, gr.skip()

    def changes(side: str) -> tuple:
        """What retry, edit and undo of a column do."""

        def retried(request: gr.Request, event: gr.RetryData, conversation: dict, *values):
            yield from _again(request, conversation, Settings(*values), _index(event, conversation[side]), None)

        def edited(request: gr.Request, event: gr.EditData, conversation: dict, *values):
            text = view.typed(view.content(event.value)).strip()
            yield from _again(request, conversation, Settings(*values), _index(event, conversation[side]), text)

        def undone(request: gr.Request, event: gr.UndoData, conversation: dict, *values):
            end(request)
            s, index = Settings(*values), _index(event, conversation[side])
            text = conversation["a"][index]["content"] if index < len(conversation["a"]) else ""
            conversation = session.cut(conversation, s.mode, index)
            return conversation, *_columns(conversation, s.markdown, thumbs=True), "", _keep(conversation, s), text

        return retried, edited, undone

    def end(request: gr.Request) -> None:
        """What is being answered now is not wanted any more."""
        if answer := _stops.get(request.session_hash):
            answer.void = True
            answer.set()

    def wiped(request: gr.Request, *values):
        end(request)
        new = session.empty()
        return new, [], [], "", _keep(new, Settings(*values))

    def stopped(request: gr.Request):
        if event := _stops.get(request.session_hash):
            event.set()

    def columns(conversation: dict, *values):
        s = Settings(*values)
        both = s.mode == BOTH
        conversation = session.align(conversation) if both else conversation
        a, b = _columns(conversation, s.markdown, thumbs=True)
        a |= {"label": TUNED if both else "Conversation", "render_markdown": s.markdown}
        b |= {"visible": both, "render_markdown": s.markdown}
        return conversation, a, b, _keep(conversation, s)

    model, answers = settings[0], []
    for event in (message.submit, send.click):
        answers.append(event(ctx.guarded(asked), [message, talk, *settings], [*screen, message], **ANSWERS))
    for side, column in (("a", left), ("b", right)):
        retried, edited, undone = changes(side)
        answers.append(column.retry(ctx.guarded(retried), [talk, *settings], screen, **ANSWERS))
        answers.append(column.edit(ctx.guarded(edited), [talk, *settings], screen, **ANSWERS))
        column.undo(ctx.guarded(undone), [talk, *settings], [talk, left, right, stats, kept, message], **QUICK)
    for event in (clear.click, left.clear, right.clear):
        event(ctx.guarded(wiped), settings, [talk, left, right, stats, kept], **QUICK)
    for answer in answers:
        answer.failure(ctx.guarded(_mended), [model], [model], **QUICK)
    stop.click(ctx.guarded(stopped), None, None, **QUICK)
    for control in (mode, markdown):
        control.input(ctx.guarded(columns), [talk, *settings], [talk, left, right, kept], **QUICK)
    ctx.blocks.unload(stopped)  # the page was closed: nobody waits for the answer
    ctx.on_load(_restored, [talk, left, right, model, mode, settings[3]], [kept])


def _again(request: gr.Request, talk: dict, s: Settings, index: int, text: str | None):
    """Answer message ``index`` anew, with ``text`` in its place if that was edited."""
    if index >= len(talk["a"]):
        return
    question = text or talk["a"][index]["content"]
    yield from _frames(request, session.ask(session.cut(talk, s.mode, index), s.mode, question), s)


def _restored(kept: dict | None):
    """The conversation as the browser kept it, when a page opens."""
    talk, kept = session.restore(kept), kept or {}
    mode = kept.get("mode") if kept.get("mode") in view.MODES else TUNED
    a, b = _columns(talk, True, thumbs=True)
    a |= {"label": TUNED if mode == BOTH else "Conversation"}
    b |= {"visible": mode == BOTH}
    return talk, a, b, kept.get("model") or gr.skip(), mode, kept.get("system") or ""


# ---- loading


def _mended(chosen: str | None):
    """The list of models after something failed: a run that was deleted is neither in it nor chosen any more."""
    return gr.update(choices=model_choices.choices(), value=None) if model_choices.gone(chosen) else gr.skip()


def _loading(ctx: Context, model, checkpoint, load, unload, state) -> None:
    seen, listed = gr.State(""), gr.State(())

    def tick(before: str, known: tuple | None, chosen: str):
        loaded, job = chat.current(), model_choices.loading()
        text = view.status(
            loaded.name if loaded else None, bool(loaded and loaded.has_adapter), loaded.device if loaded else "", job
        )
        runs = model_choices.signature()
        shown = (gr.skip(),) * 4
        if text != before:
            busy = bool(job and job.running)
            shown = (
                text,
                text,
                gr.update(interactive=not busy),
                gr.update(interactive=busy or loaded is not None, value="Cancel" if busy else "Unload"),
            )
        if runs == known:
            return *shown, gr.skip(), gr.skip()
        choices = model_choices.choices()
        return *shown, gr.update(choices=choices), runs

    def press_load(chosen: str, step: str | None):
        model_choices.load(chosen, step)
        return tick("", model_choices.signature(), chosen)[:4]

    def press_unload():
        job = model_choices.loading()
        if job and job.running:
            job.cancel()
        elif loaded := chat.current():
            loaded.unload()
        return tick("", model_choices.signature(), "")[:4]

    def adapters(chosen: str):
        found = model_choices.checkpoints(chosen)
        return gr.update(choices=found, value=found[0][1] if found else None, visible=len(found) > 1)

    outputs = [state, seen, load, unload]
    ctx.on_tick(tick, [*outputs, model, listed], [seen, listed, model])
    ctx.on_load(lambda chosen: tick("", None, chosen), [*outputs, model, listed], [model])
    loads = load.click(ctx.guarded(press_load), [model, checkpoint], outputs, **QUICK)
    unload.click(ctx.guarded(press_unload), None, outputs, **QUICK)
    looks = model.change(ctx.guarded(adapters), [model], [checkpoint], **QUICK)
    for event in (loads, looks):
        event.failure(ctx.guarded(_mended), [model], [model], **QUICK)

    def follow(run_id: str):
        """A run chosen in Train is the one to talk to."""
        known = {value for _, value in model_choices.choices()}
        return f"run:{run_id}" if f"run:{run_id}" in known else gr.skip()

    ctx.chosen_run.change(ctx.guarded(follow), [ctx.chosen_run], [model], **QUICK)
