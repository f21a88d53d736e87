"""Open WebUI: the feedback that an administrator exports, and chats whose answers have thumbs.

A chat is a tree: messages by id, each with its ``parentId``. The prompt of a rated answer is its path to the root.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from typing import Any

from kto_core.data.records.rows import DroppedRow, shorten
from kto_core.data.records.turns import NEEDS_EYES
from kto_core.errors import DataError

from .common import Importer, Item, Record, Turn, ancestors, at, corrected, dicts, record, text_at

_THOUGHT = re.compile(r'<details type="reasoning"[^>]*>\s*(?:<summary>.*?</summary>)?(.*?)</details>\s*', re.DOTALL)
_QUOTE = re.compile(r"^> ?", re.MULTILINE)
_CALL = re.compile(r'<details type="tool_calls"([^>]*)>\s*(?:<summary>.*?</summary>)?(.*?)</details>\s*', re.DOTALL)
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')
_OTHER = re.compile(r'<details type="(\w+)"')


class _Chat:
    """Messages of one chat, by id."""

    def __init__(self, chat: object):
        listed = dicts(at(chat, "history", "messages")) or dicts(at(chat, "messages"))
        linear = not any("parentId" in m for m in listed)
        self.messages: dict[str, Record] = {}
        before: str | None = None
        for i, m in enumerate(listed):
            key = str(m.get("id", i))
            self.messages[key] = {**m, "parentId": before} if linear else m
            before = key
        system = text_at(chat, "params", "system") or text_at(chat, "system")
        self.system: list[Turn] = [{"role": "system", "content": system}] if system.strip() else []

    def before(self, message: Record) -> list[Turn]:
        """The prompt of an answer. Raises DroppedRow: a message is missing, or cannot be read."""
        above = ancestors(self.messages, message.get("parentId"), "parentId")
        path = [turn for m in above for turn in _turns(m, m.get("content"))]
        return path if path and path[0]["role"] == "system" else self.system + path


def _turns(m: Record, content: object) -> list[Turn]:
    """The turns of one message: an answer with tool calls is several."""
    if any(at(f, "type") == "image" or text_at(f, "content_type").startswith("image") for f in dicts(m.get("files"))):
        raise DroppedRow(NEEDS_EYES, "a file of a message")
    thoughts: list[str] = []
    if not content and isinstance(m.get("output"), list):
        content, thoughts = _output(m["output"])
    if not isinstance(content, str) or "<details" not in content:
        return [_said(m, content, thoughts)]
    out: list[Turn] = []
    at_ = 0
    for call in _CALL.finditer(content):
        asked, result = _called(call, len(out))
        out += [_said(m, content[at_ : call.start()].strip(), []) | {"tool_calls": [asked]}, result]
        at_ = call.end()
    if (rest := content[at_:].strip()) or not out:
        out.append(_said(m, rest, thoughts))
    for turn in out:
        if not turn["content"] and "tool_calls" in turn:
            turn["content"] = None
    return out


def _said(m: Record, content: object, thoughts: list[str]) -> Turn:
    """A turn without tool calls; thoughts that are written as HTML are set apart."""
    if isinstance(content, str):
        thoughts = thoughts + [html.unescape(_QUOTE.sub("", t.strip())) for t in _THOUGHT.findall(content)]
        content = _THOUGHT.sub("", content).strip() if thoughts else content
        if other := _OTHER.search(content):
            raise DroppedRow("a part of a message is not understood", other[1])
    out: Turn = {"role": m.get("role"), "content": content}
    return out | ({"reasoning_content": "\n".join(thoughts)} if any(thoughts) else {})


def _called(found: re.Match[str], number: int) -> tuple[Record, Turn]:
    """A tool call that is written as HTML, and the turn of its result."""
    about = {name: html.unescape(value) for name, value in _ATTRIBUTE.findall(found[1])}
    if not about.get("name"):
        raise DroppedRow("tool_calls not understood", shorten(found[0]))
    key = about.get("id") or f"call_{number}"
    call = {"id": key, "type": "function",
            "function": {"name": about["name"], "arguments": _plain(about.get("arguments", "{}"))}}  # fmt: skip
    result = about.get("result") or html.unescape(found[2]).strip()
    return call, {"role": "tool", "name": about["name"], "tool_call_id": key, "content": _plain(result)}


def _plain(text: str) -> str:
    """Text that was written as JSON text, once more or not."""
    value = text.strip()
    if value.startswith('"'):
        try:
            found = json.loads(value)
        except ValueError:
            return text
        return found if isinstance(found, str) else text
    return text


def _output(items: list[Any]) -> tuple[str, list[str]]:
    """Text and thoughts of an answer that was kept as the items of a response."""
    said: list[str] = []
    thoughts: list[str] = []
    for item in dicts(items):
        texts = [text_at(p, "text") for p in dicts(item.get("content")) or dicts(item.get("summary"))]
        if item.get("type") == "message":
            said += texts
        elif item.get("type") == "reasoning":
            thoughts += texts
        else:
            raise DroppedRow("tool calls written as items", shorten(item.get("type")))
    return "".join(said), thoughts


def _rows(chat: _Chat, message: Record, rating: object, **extra: Any) -> Iterator[Item]:
    """An answer with its thumb; one that was edited is the second row, and the thumb is of the first."""
    if rating in (None, ""):
        return
    if message.get("role") != "assistant":
        raise DroppedRow("the rated message is no answer", shorten(message.get("role")))
    label = {"1": True, "1.0": True, "-1": False, "-1.0": False}.get(str(rating))
    if label is None:
        raise DroppedRow("label not understood", shorten(rating))
    prompt = chat.before(message)
    edited = message.get("originalContent")
    was = edited if isinstance(edited, str) and edited.strip() and edited != message.get("content") else None
    if was is None or label:
        yield record(prompt, _turns(message, message.get("content")), label, **extra)
    else:
        yield record(prompt, _turns(message, was), label, **extra)
        yield corrected(prompt, _turns(message, message.get("content")), **extra)


def _about(data: object) -> dict[str, Any]:
    return {
        "comment": at(data, "comment"),
        "reason": at(data, "reason"),
        "tags": at(data, "tags"),
        "details_rating": at(data, "details", "rating"),
    }


def _feedback(obj: Record) -> Iterator[Item]:
    if obj.get("version") not in (0, None):
        raise DataError(
            f"This is Open WebUI feedback of version {shorten(obj['version'], 20)}; version 0 is known. Export it from "
            "Open WebUI 0.4 or later, or convert it to rows."
        )
    if obj.get("type") != "rating":
        raise DroppedRow("feedback that is no rating", shorten(obj.get("type")))
    snapshot = at(obj, "snapshot", "chat", "chat")
    if not isinstance(snapshot, dict):
        raise DroppedRow("feedback without its chat", "export it under Evaluations, Feedback")
    chat = _Chat(snapshot)
    message = chat.messages.get(str(at(obj, "meta", "message_id")))
    if message is None:
        raise DroppedRow("a message of the chat is missing", shorten(at(obj, "meta", "message_id")))
    data = obj["data"]
    yield from _rows(chat, message, data.get("rating"), **_about(data), model=data.get("model_id"))


def _chats(obj: Record) -> Iterator[Item]:
    chat = _Chat(obj["chat"] if isinstance(obj.get("chat"), dict) else obj)
    for message in chat.messages.values():
        said = message.get("annotation")
        try:
            yield from _rows(chat, message, at(said, "rating"), **_about(said), model=message.get("model"))
        except DroppedRow as e:
            yield e


def _is_feedback(obj: Record) -> bool:
    data = obj.get("data")
    return isinstance(data, dict) and "rating" in data and ("snapshot" in obj or "meta" in obj)


def _is_chat(obj: Record) -> bool:
    chat = obj["chat"] if isinstance(obj.get("chat"), dict) else obj
    tree = isinstance(at(chat, "history", "messages"), dict)
    return tree or (chat is not obj and isinstance(chat.get("messages"), list))


FEEDBACK = Importer("Open WebUI feedback", _is_feedback, _feedback)
CHATS = Importer("Open WebUI chats", _is_chat, _chats)
