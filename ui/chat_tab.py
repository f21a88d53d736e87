"""The Chat tab: talk to a run or a model, compare tuned with base, collect thumbs as training rows."""

from __future__ import annotations

import threading
import time

import gradio as gr

from kto_core import chat, feedback, paths
from kto_core.errors import Cancelled, ModelError
from ui import chat_models, chat_session, chat_view
from ui.chat_session import BASE, BOTH, TUNED, Settings
from ui.context import Context, error

FEEDBACK = "chat_feedback.jsonl"
BROWSER_KEY = "kto-studio-browser"
# through the queue: an error that is raised outside of it shows no toast, but a failed request in the console
QUICK = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
ANSWERS = {
    "concurrency_limit": None,  # the model takes one at a time; a page that waits shows its question and Stop
    "show_progress": "hidden",
    "trigger_mode": "once",
    "api_visibility": "private",
}


class _Answer(threading.Event):
    """Set to end an answer. ``void``: what it has written is not wanted any more."""

    void = False


KEPT = 1.0  # seconds after which the browser keeps what was written: a reload loses no more
_stops: dict[str, _Answer] = {}  # page -> ends the answer it waits for


def build(ctx: Context) -> None:
    talk = gr.State(chat_session.empty())
    kept = ctx.talk or gr.BrowserState({}, storage_key="kto-studio-chat", secret=BROWSER_KEY)  # survives a reload
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=300):
            model, checkpoint, load, unload, state = _model_controls()
            controls = _settings_controls()
        with gr.Column(scale=3, min_width=480):
            with gr.Row():
                left, right = _chatbot("chat-a", "Conversation"), _chatbot("chat-b", BASE, visible=False)
            stats = gr.HTML("", elem_id="chat-stats", show_label=False)
            message, send, stop, clear = _message_controls()
            with gr.Row(equal_height=True):
                note = gr.HTML(chat_view.feedback(0, 0, FEEDBACK), elem_id="chat-note", show_label=False)
                use = gr.Button(
                    "Open in the Data tab", size="sm", visible=False, scale=0, min_width=190, elem_id="chat-use"
                )
    settings = [model, checkpoint, *controls]
    screen = [talk, left, right, stats, send, stop, kept]
    _answers(ctx, settings, screen, message, clear)
    _loading(ctx, model, checkpoint, load, unload, state)
    _feedback(ctx, settings, screen, note, use)


# ---- layout


def _model_controls():
    model = gr.Dropdown(
        [("Demo model (SmolLM2 135M)", "demo")],
        value="demo",
        label="Model",
        info="A run, the demo model, or a Hub id typed as owner/name.",
        allow_custom_value=True,
        elem_id="chat-model",
    )
    checkpoint = gr.Dropdown(
        [],
        label="Adapter",
        info="The end of the run, or one of its checkpoints.",
        visible=False,
        elem_id="chat-checkpoint",
    )
    with gr.Row():
        load = gr.Button("Load", variant="primary", min_width=80, elem_id="chat-load")
        unload = gr.Button("Unload", min_width=80, interactive=False, elem_id="chat-unload")
    state = gr.HTML(chat_view.status(None, False, "", None), elem_id="chat-status", show_label=False)
    return model, checkpoint, load, unload, state


def _settings_controls() -> list:
    """In the order of `Settings` after model and checkpoint."""
    mode = gr.Radio(
        list(chat_view.MODES),
        value=TUNED,
        label="Who answers",
        info="One loaded model: base is the same with the adapter off.",
        elem_id="chat-mode",
    )
    system = gr.Textbox(label="System prompt", info="Empty: none is sent.", lines=2, max_lines=8, elem_id="chat-system")
    with gr.Accordion("Sampling", open=False, elem_id="chat-sampling"):
        sampling = [
            gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", info="0: always the likeliest token."),
            gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p", info="Draw from the likeliest tokens with this share."),
            gr.Slider(0, 200, 50, step=1, label="Top-k", info="Draw from this many tokens at most; 0: all."),
            gr.Slider(1, 2, 1.0, step=0.05, label="Repetition penalty", info="Above 1: repeat less."),
            gr.Slider(
                16, 4096, 512, step=16, label="Max tokens", info="The longest answer.", elem_id="chat-max-tokens"
            ),
            gr.Number(-1, precision=0, label="Seed", info="Same seed, same answer; -1: a new one each time."),
        ]
    markdown = gr.Checkbox(
        True, label="Format Markdown", info="Off: every character as the model wrote it.", elem_id="chat-markdown"
    )
    return [mode, system, *sampling, markdown]


def _chatbot(elem_id: str, label: str, visible: bool = True) -> gr.Chatbot:
    return gr.Chatbot(
        label=label,
        height="60vh",
        min_height=320,
        editable="user",
        buttons=["copy", "copy_all"],
        layout="bubble",
        placeholder="**Say something.**\n\nThe chosen model is loaded with your first message.",
        visible=visible,
        latex_delimiters=[],
        elem_id=elem_id,
    )


def _message_controls():
    with gr.Row(equal_height=True):
        message = gr.Textbox(
            label="Your message",
            show_label=False,
            placeholder="Write a message. Enter sends, Shift+Enter makes a new line.",
            lines=1,
            max_lines=8,
            scale=8,
            elem_id="chat-message",
        )
        send = gr.Button("Send", variant="primary", scale=1, min_width=90, elem_id="chat-send")
        stop = gr.Button("Stop", variant="stop", scale=1, min_width=90, visible=False, elem_id="chat-stop")
        clear = gr.Button("Clear", scale=1, min_width=90, elem_id="chat-clear")
    return message, send, stop, clear


# ---- the conversation


def _columns(talk: dict, markdown: bool, thumbs: bool = False) -> list[dict]:
    """Updates of both chatbots."""
    return [
        gr.update(
            value=chat_view.history(talk[s], markdown),
            **({"feedback_value": chat_session.thumbs(talk, s)} if thumbs else {}),
        )
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
        for grown, line in chat_session.answer(talk, s, stop):
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
    talk = chat_session.tidy(talk)
    yield talk, *_columns(talk, s.markdown), line, gr.update(visible=True), gr.update(visible=False), _keep(talk, s)
    if problem is not None:
        raise error(problem)


def _index(event) -> int:
    return event.index[0] if isinstance(event.index, list | tuple) else event.index


def _answers(ctx: Context, settings: list, screen: list, message: gr.Textbox, clear: gr.Button) -> None:
    talk, left, right, stats, send, stop, kept = screen
    mode, markdown = settings[2], settings[-1]

    def asked(request: gr.Request, text: str, conversation: dict, *values):
        s = Settings(*values)
        if not (text or "").strip():
            return
        frames = _frames(request, chat_session.ask(conversation, s.mode, text.strip()), s)
        yield *next(frames), ""
        for frame in frames:
            yield *frame, gr.skip()

    def retried(request: gr.Request, event: gr.RetryData, conversation: dict, *values):
        yield from _again(request, conversation, Settings(*values), _index(event), None)

    def edited(request: gr.Request, event: gr.EditData, conversation: dict, *values):
        text = chat_view.typed(chat_view.content(event.value)).strip()
        yield from _again(request, conversation, Settings(*values), _index(event), text)

    def undone(request: gr.Request, event: gr.UndoData, conversation: dict, *values):
        end(request)
        s, index = Settings(*values), _index(event)
        text = conversation["a"][index]["content"] if index < len(conversation["a"]) else ""
        conversation = chat_session.cut(conversation, s.mode, index)
        return conversation, *_columns(conversation, s.markdown, thumbs=True), "", _keep(conversation, s), text

    def end(request: gr.Request) -> None:
        """What is being answered now is not wanted any more."""
        if answer := _stops.get(request.session_hash):
            answer.void = True
            answer.set()

    def wiped(request: gr.Request, *values):
        end(request)
        new = chat_session.empty()
        return new, [], [], "", _keep(new, Settings(*values))

    def stopped(request: gr.Request):
        if event := _stops.get(request.session_hash):
            event.set()

    def columns(conversation: dict, *values):
        s = Settings(*values)
        both = s.mode == BOTH
        conversation = chat_session.align(conversation) if both else conversation
        a, b = _columns(conversation, s.markdown, thumbs=True)
        a |= {"label": TUNED if both else "Conversation", "render_markdown": s.markdown}
        b |= {"visible": both, "render_markdown": s.markdown}
        return conversation, a, b, _keep(conversation, s)

    model, answers = settings[0], []
    for event in (message.submit, send.click):
        answers.append(event(ctx.guarded(asked), [message, talk, *settings], [*screen, message], **ANSWERS))
    for column in (left, right):
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
    yield from _frames(request, chat_session.ask(chat_session.cut(talk, s.mode, index), s.mode, question), s)


def _restored(kept: dict | None):
    """The conversation as the browser kept it, when a page opens."""
    talk, kept = chat_session.restore(kept), kept or {}
    mode = kept.get("mode") if kept.get("mode") in chat_view.MODES else TUNED
    a, b = _columns(talk, True, thumbs=True)
    a |= {"label": TUNED if mode == BOTH else "Conversation"}
    b |= {"visible": mode == BOTH}
    return talk, a, b, kept.get("model") or gr.skip(), mode, kept.get("system") or ""


# ---- loading


def _mended(chosen: str | None):
    """The list of models after something failed: a run that was deleted is neither in it nor chosen any more."""
    return gr.update(choices=chat_models.choices(), value=None) if chat_models.gone(chosen) else gr.skip()


def _loading(ctx: Context, model, checkpoint, load, unload, state) -> None:
    seen, listed = gr.State(""), gr.State(())

    def tick(before: str, known: tuple, chosen: str):
        loaded, job = chat.current(), chat_models.loading()
        text = chat_view.status(
            loaded.name if loaded else None, bool(loaded and loaded.has_adapter), loaded.device if loaded else "", job
        )
        runs = chat_models.signature()
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
        choices = chat_models.choices()
        return *shown, gr.update(choices=choices), runs

    def press_load(chosen: str, step: str | None):
        chat_models.load(chosen, step)
        return tick("", chat_models.signature(), chosen)[:4]

    def press_unload():
        job = chat_models.loading()
        if job and job.running:
            job.cancel()
        elif loaded := chat.current():
            loaded.unload()
        return tick("", chat_models.signature(), "")[:4]

    def adapters(chosen: str):
        found = chat_models.checkpoints(chosen)
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
        known = {value for _, value in chat_models.choices()}
        return f"run:{run_id}" if f"run:{run_id}" in known else gr.skip()

    ctx.chosen_run.change(ctx.guarded(follow), [ctx.chosen_run], [model], **QUICK)


# ---- thumbs


def _count() -> tuple[int, int]:
    """Rows in the feedback file: (desirable, undesirable)."""
    return feedback.counts(paths.data_dir() / FEEDBACK)


def _feedback(ctx: Context, settings: list, screen: list, note: gr.HTML, use: gr.Button) -> None:
    talk, left, right, *_, kept = screen

    def shown():
        up, down = _count()
        return chat_view.feedback(up, down, FEEDBACK), gr.update(visible=bool(up + down))

    def rate(side: str, event: gr.LikeData, conversation: dict, values: tuple):
        s, index = Settings(*values), _index(event)
        messages = chat_session.rated(conversation, side, index, s.system)
        path = paths.data_dir() / FEEDBACK
        liked = dict(conversation["liked"])
        if event.liked is True or event.liked is False:
            feedback.add(path, messages, event.liked)
            liked[f"{side}{index}"] = event.liked
        else:  # taken back
            feedback.remove(path, messages)
            liked.pop(f"{side}{index}", None)
        conversation = conversation | {"liked": liked}
        return conversation, _keep(conversation, s), *shown()

    def rate_left(event: gr.LikeData, conversation: dict, *values):
        return rate("a", event, conversation, values)

    def rate_right(event: gr.LikeData, conversation: dict, *values):
        return rate("b", event, conversation, values)

    for column, handler in ((left, rate_left), (right, rate_right)):
        column.like(ctx.guarded(handler), [talk, *settings], [talk, kept, note, use], **QUICK)
    ctx.on_load(shown, [note, use])

    def open_data():
        if not (paths.data_dir() / FEEDBACK).is_file():
            raise ModelError("No rows were collected yet. Rate an answer first.")
        return f"file:{FEEDBACK}", gr.Tabs(selected="data")

    use.click(ctx.guarded(open_data), None, [ctx.chosen_data, ctx.tabs], **QUICK)
