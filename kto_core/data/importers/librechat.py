"""LibreChat: a conversation exported as JSON, as a list of messages or, if exported recursively, as a tree of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kto_core.data.records.rows import DroppedRow, shorten
from kto_core.data.records.turns import NEEDS_EYES
from kto_core.errors import DataError

from .common import Importer, Item, Record, Turn, ancestors, at, dicts, record, text_at

_LABELS = {"thumbsUp": True, "thumbsDown": False}


def _listed(messages: object) -> dict[str, Record]:
    """Messages by id, each with its parent's; children are taken out of their parents."""
    found: dict[str, Record] = {}
    todo: list[tuple[Record, str | None]] = [(m, None) for m in reversed(dicts(messages))]
    linked = any("parentMessageId" in m or "children" in m for m, _ in todo)
    before: str | None = None
    while todo:
        m, above = todo.pop()
        key = str(m.get("messageId", len(found)))
        parent = m.get("parentMessageId", above) if linked else before
        root = str(parent).startswith("00000000-")
        found[key] = {**m, "parentMessageId": None if root else parent, "children": None}
        before = key
        todo += [(child, key) for child in reversed(dicts(m.get("children")))]
    return found


def _spoken(m: Record) -> list[Turn]:
    """The turns of one message: an answer with tools is several."""
    if m.get("isCreatedByUser"):
        if any(text_at(f, "type").startswith("image") for f in dicts(m.get("files"))):
            raise DroppedRow(NEEDS_EYES, "a file of a message")
        return [{"role": "user", "content": m.get("text") or _joined(m.get("content"))}]
    said: list[Turn] = []
    text, thought = "", ""
    for part in dicts(m.get("content")):
        kind = part.get("type")
        inner: Any = part.get(str(kind))
        if kind == "text":
            text += text_at(inner, "value") or text_at(part, "text")
        elif kind == "think":
            thought += text_at(part, "think")
        elif kind == "tool_call" and text_at(inner, "name"):
            call = {"name": inner["name"], "arguments": inner.get("args") or "{}"}
            key = str(inner.get("id") or f"call_{len(said)}")
            turn: Turn = {"role": "assistant", "content": text or None}
            turn["tool_calls"] = [{"id": key, "type": "function", "function": call}]
            result = {"role": "tool", "name": inner["name"], "tool_call_id": key, "content": text_at(inner, "output")}
            said += [turn | ({"reasoning_content": thought} if thought else {}), result]
            text, thought = "", ""
        else:
            raise DroppedRow("a part of a message is not understood", shorten(kind))
    text = text or (text_at(m, "text") if not said else "")
    if text or thought or not said:
        said.append({"role": "assistant", "content": text} | ({"reasoning_content": thought} if thought else {}))
    return said


def _joined(parts: object) -> str:
    return "".join(text_at(p, "text", "value") or text_at(p, "text") for p in dicts(parts))


def _before(messages: dict[str, Record], message: Record) -> list[Turn]:
    path = ancestors(messages, message["parentMessageId"], "parentMessageId")
    return [turn for m in path for turn in _spoken(m)]


def _records(obj: Record) -> Iterator[Item]:
    if not isinstance(obj.get("messages"), list):
        raise DataError(
            "This is a list of LibreChat's single messages, or an export without any. Export whole conversations as "
            "JSON."
        )
    options = obj.get("options")
    system = text_at(options, "promptPrefix") or text_at(options, "system")
    before: list[Turn] = [{"role": "system", "content": system}] if system.strip() else []
    messages = _listed(obj["messages"])
    for m in messages.values():
        said = m.get("feedback")
        if not isinstance(said, dict) or said.get("rating") is None:
            continue
        try:
            label = _LABELS.get(str(said["rating"]))
            if label is None:
                raise DroppedRow("label not understood", shorten(said["rating"]))
            about = {"comment": said.get("text"), "reason": at(said, "tag", "key") or said.get("tag"),
                     "model": m.get("model")}  # fmt: skip
            yield record(before + _before(messages, m), _spoken(m), label, **about)
        except DroppedRow as e:
            yield e


def _knows(obj: Record) -> bool:
    if "conversationId" not in obj:
        return False
    first = at(obj, "messages", 0)
    return "isCreatedByUser" in obj or (
        isinstance(first, dict) and ("isCreatedByUser" in first or "messageId" in first)
    )


CHATS = Importer("LibreChat", _knows, _records)
