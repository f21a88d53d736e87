"""A conversation in the Chat tab: its state, what the events do to it, answers as they grow. Knows no layout."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

from kto_core.chat import chat
from kto_core.data.records import thoughts
from kto_core.errors import ModelError
from kto_studio.shared import model_choices

from . import view

TUNED, BASE, BOTH = view.MODES
EVERY = 0.06  # seconds between two updates of a growing answer
SEPARATOR = " &nbsp;|&nbsp; "
POLL = 0.1  # seconds between two looks at a model that is being loaded
MARKS = ("liked", "corrected")  # of a conversation: what is known of single answers


@dataclass(frozen=True)
class Settings:
    """The controls beside the conversation, in the order the events send them."""

    model: str
    checkpoint: str | None
    mode: str
    system: str
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    max_tokens: int
    seed: int | None
    markdown: bool


def empty() -> dict:
    """``a`` is the left (or only) column, ``b`` the right one.

    ``liked`` has "a3" -> True or False, ``corrected`` the text that was written in place of a bad answer.
    """
    return {"a": [], "b": [], "liked": {}, "corrected": {}}


def restore(kept: dict | None) -> dict:
    """The conversation a browser kept; whatever is not of that form is left out."""
    kept = kept if isinstance(kept, dict) else {}
    talk = empty()
    for side in "ab":
        talk[side] = [m for m in kept.get(side) or [] if isinstance(m, dict) and m.get("role") and "content" in m]
        talk[side] = [m if isinstance(m.get("thought", ""), str) else m | {"thought": ""} for m in talk[side]]
    talk["liked"] = {k: v for k, v in (kept.get("liked") or {}).items() if isinstance(v, bool)}
    written = kept.get("corrected")
    talk["corrected"] = {k: v for k, v in written.items() if isinstance(v, str)} if isinstance(written, dict) else {}
    return talk


def sides(mode: str) -> str:
    return "ab" if mode == BOTH else "a"


def align(talk: dict) -> dict:
    """For comparing: the right column gets the left one's history unless both were asked the same."""
    asked = [[m["content"] for m in talk[s] if m["role"] == "user"] for s in "ab"]
    if asked[0] == asked[1]:
        return talk
    ours = {name: {k: v for k, v in talk[name].items() if k[0] == "a"} for name in MARKS}
    return {"a": talk["a"], "b": list(talk["a"])} | ours


def ask(talk: dict, mode: str, text: str) -> dict:
    """The conversation with a question at its end, in place of one that was never answered (a reload cut it off)."""
    return talk | {s: [*_answered(talk[s]), {"role": "user", "content": text}] for s in sides(mode)}


def _answered(messages: list[dict]) -> list[dict]:
    return messages[:-1] if messages and messages[-1]["role"] == "user" else messages


def cut(talk: dict, mode: str, index: int) -> dict:
    """The conversation before message ``index``. Rows that thumbs wrote for what goes stay in the file."""
    kept = {s: talk[s][:index] for s in sides(mode)}
    stay = {n: {k: v for k, v in talk[n].items() if k[0] not in kept or int(k[1:]) < index} for n in MARKS}
    return talk | kept | stay


def thumbs(talk: dict, side: str) -> list[str | None]:
    """The form in which gr.Chatbot takes them: an entry for each answer."""
    names = {True: "Like", False: "Dislike"}
    return [names.get(talk["liked"].get(f"{side}{i}")) for i, m in enumerate(talk[side]) if m["role"] == "assistant"]


def rated(talk: dict, side: str, index: int, system: str) -> list[dict]:
    """The messages of one rated answer, system prompt first, the answer last; its thought stands apart.

    Raises:
        ModelError: there is no finished answer at ``index``.
    """
    messages = talk[side][: index + 1]
    if len(messages) <= index or messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise ModelError("There is no answer to rate yet. Wait until it is complete.")
    return _with_system(messages, messages[-1].get("system", system))


def _with_system(messages: list[dict], system: str) -> list[dict]:
    plain = [
        {"role": m["role"], "content": m["content"]} | ({thoughts.KEY: m["thought"]} if m.get("thought") else {})
        for m in messages
    ]
    return [{"role": "system", "content": system}, *plain] if system.strip() else plain


def ready(settings: Settings, stop: threading.Event) -> Iterator[chat.Chat | None]:
    """Wait for the chosen model, loading it if another one is there, or none; yields None while waiting, then the Chat.

    Raises:
        ModelError: it could not be loaded (or was not in time for Stop).
    """
    wanted = (model_choices.target(settings.model), settings.checkpoint or "") if settings.model else None
    while (loaded := chat.current()) is None or (wanted and loaded.asked not in (None, wanted)):
        if loaded is not None and loaded.answering:  # somebody else's answer is not cut off
            if stop.wait(POLL):
                return
            yield None
            continue
        job = model_choices.load(settings.model, settings.checkpoint)
        while job.running:
            if stop.wait(POLL):
                job.cancel()
                return
            yield None
        if job.state != "done":
            raise ModelError(job.error or "The model could not be loaded. Press Load to try again.")
    yield loaded


def answer(talk: dict, settings: Settings, stop: threading.Event) -> Iterator[tuple[dict, str]]:
    """Answer the last question on every side; yields (conversation, line of statistics) as the answers grow.

    ``stop`` ends it and keeps what was written. Closing the generator sets ``stop``, so that the model ends too.
    """
    try:
        loaded = None
        for loaded in ready(settings, stop):
            if loaded is None:
                yield talk, "Loading the model…"
        if loaded is None:  # stopped while loading
            return
        lines: list[str] = []
        for side in sides(settings.mode):
            if stop.is_set():
                break
            tuned = settings.mode == TUNED or (settings.mode == BOTH and side == "a")
            name = f"{TUNED if tuned else BASE}: " if settings.mode == BOTH else ""
            for grown in _stream(loaded, talk, side, tuned, settings, stop):
                talk = grown
                yield talk, SEPARATOR.join(lines)
            lines.append(name + _stats(loaded))
            yield talk, SEPARATOR.join(lines)
    finally:
        stop.set()


def _stream(loaded, talk: dict, side: str, tuned: bool, s: Settings, stop: threading.Event) -> Iterator[dict]:
    asked = talk[side]
    reply = {"role": "assistant", "content": "", "system": s.system, "by": origin(s, tuned)}
    stream = loaded.stream(
        _with_system(asked, s.system),
        tuned=tuned,
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=int(s.top_k),
        repetition_penalty=s.repetition_penalty,
        max_new_tokens=int(s.max_tokens),
        seed=None if s.seed is None or s.seed < 0 else int(s.seed),
        cancel=stop,
    )
    yield talk | {side: [*asked, reply]}
    shown, text = 0.0, ""
    try:
        for part in stream:
            text += part
            thought, said = thoughts.split(text, unfinished=True)
            reply = reply | {"content": said} | ({"thought": thought} if thought else {})
            if time.monotonic() - shown > EVERY:
                shown = time.monotonic()
                yield talk | {side: [*asked, reply]}
    finally:
        stream.close()
    yield talk | {side: [*asked, reply]}


def origin(s: Settings, tuned: bool) -> dict:
    """Who answers and how, as `feedback.about` takes it: model, adapter ("" for the base model), sampling."""
    sampling = {
        "temperature": s.temperature,
        "top_p": s.top_p,
        "top_k": int(s.top_k),
        "repetition_penalty": s.repetition_penalty,
        "max_new_tokens": int(s.max_tokens),
        "seed": None if s.seed is None or s.seed < 0 else int(s.seed),
    }
    model, adapter = model_choices.origin(s.model, s.checkpoint)
    return {"model": model, "adapter": adapter if tuned else "", "sampling": sampling}


def is_origin(kept: object) -> TypeGuard[dict[str, Any]]:
    """Whether what a browser kept is of the form of `origin`."""
    return (
        isinstance(kept, dict)
        and kept.keys() == {"model", "adapter", "sampling"}
        and isinstance(kept["model"], str)
        and isinstance(kept["adapter"], str)
        and isinstance(kept["sampling"], dict)
    )


def _stats(loaded) -> str:
    s = loaded.stats
    return view.stats(s["tokens_per_second"], s["tokens"], s["seconds"], s.get("ended"), s.get("forgotten"))


def tidy(talk: dict) -> dict:
    """The conversation after an answer ended: an answer without any text (stopped at once, failed) is left out."""
    return talk | {s: talk[s][:-1] if talk[s] and _is_blank(talk[s][-1]) else talk[s] for s in "ab"}


def _is_blank(message: dict) -> bool:
    return not message["content"].strip() and not message.get("thought")
