"""Messages, tool calls and tools as people write them -> as we keep them; pure, standard library only.

This module knows one value at a time, nothing of rows and columns.
"""

from __future__ import annotations

import json
import math
from typing import Any

from . import thoughts

_ROLES = {
    **{r: r for r in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "chatbot", "model", "ai", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}
_PLAIN = {"role", "content"}
_THOUGHT_PARTS = ("thinking", "reasoning")
_SEEN = ("image", "image_url", "input_image", "video", "video_url", "audio", "input_audio", "audio_url")  # parts

NEEDS_EYES = "images, video or sound, and training uses text only"
NOT_UTF8 = "not valid UTF-8"


class DroppedRow(Exception):
    """A row that cannot be used.

    Args:
        reason: short and stable, to count by.
        detail: what was found there.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


# --- messages ---------------------------------------------------------------------------------------------------------


def read_turns(value: object, role: str | None, column: str, changes: list[str]) -> list[dict[str, Any]]:
    """Messages of a column. A string is one turn of ``role`` (None: not allowed)."""
    if isinstance(value, str):
        if role:
            return [{"role": role, "content": value}]
    elif isinstance(value, list):
        if not value and column != "prompt":
            raise DroppedRow("no assistant turn")
        return [_message(m, changes) for m in value]
    elif isinstance(value, dict):
        return [_message(value, changes)]
    elif value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise DroppedRow(f"no {column}")
    elif role and isinstance(value, int | float) and not isinstance(value, bool):
        changes.append("number read as text")
        return [{"role": role, "content": str(value)}]
    raise DroppedRow(f"{column} is neither text nor messages", shorten(value))


def _message(m: object, changes: list[str]) -> dict[str, Any]:
    """One message with our role names; keys that we do not know are kept."""
    if not isinstance(m, dict):
        raise DroppedRow("message is not an object", shorten(m))
    role, content = m.get("role"), m.get("content")
    if m.keys() == _PLAIN and content.__class__ is str and role.__class__ is str and _ROLES.get(role) == role:
        return m
    if "role" not in m and "from" in m:
        role, content = m["from"], m.get("value")
    known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise DroppedRow("role not understood", shorten(role))
    out = {k: v for k, v in m.items() if k not in ("role", "content", "from", "value")}
    for key in ("tool_calls", "name", "tool_call_id", "function_call"):
        if key in out and (out[key] is None or out[key] == [] or out[key] == ""):
            del out[key]
    for key in thoughts.KEYS[:2]:  # a thought as a list of parts, or as something that is no text at all
        if not isinstance(given := out.get(key), str | None):
            if not (texts := _texts(given)):
                raise DroppedRow(f"{key} is not text", shorten(given))
            out[key] = "\n\n".join(texts)
    if "tool_calls" in out:
        out["tool_calls"] = _tool_calls(out["tool_calls"])
    elif "function_call" in out:  # OpenAI's first form
        out["tool_calls"] = _tool_calls([out.pop("function_call")])
        changes.append("function_call read as tool_calls")
    elif isinstance(role, str) and role.strip().lower() in ("function_call", "tool_call") and isinstance(content, str):
        out["tool_calls"], content = _tool_calls(content), None  # ShareGPT's form, ms-swift's
    return {"role": known, "content": _content(content, out, changes), **out}


def _content(content: object, message: dict[str, Any], changes: list[str]) -> str | None:
    if isinstance(content, str):
        return content
    if content is None or content != content:
        if "tool_calls" in message:
            return None
        raise DroppedRow("message without content")
    if isinstance(content, list):  # parts, as multimodal chats have them
        content = _without_thoughts(content, message, changes)
        parts = [p if isinstance(p, str) else p.get("text") if isinstance(p, dict) else None for p in content]
        texts = [t for t in parts if isinstance(t, str)]
        if len(texts) == len(parts):
            changes.append("content parts joined")
            return "".join(texts)
        if any(isinstance(p, dict) and p.get("type") in _SEEN for p in content):
            raise DroppedRow(NEEDS_EYES, "a part of a message")
    elif isinstance(content, int | float) and not isinstance(content, bool):
        changes.append("number read as text")
        return str(content)
    raise DroppedRow("content is not text", shorten(content))


def _without_thoughts(parts: list[Any], message: dict[str, Any], changes: list[str]) -> list[Any]:
    """Parts without those that are thoughts, which go under `thoughts.KEY` of the message."""
    found = [p for p in parts if isinstance(p, dict) and p.get("type") in _THOUGHT_PARTS]
    if not found:
        return parts
    texts = [t for p in found for t in _texts(p.get("thinking") or p.get("text") or p.get("reasoning"))]
    if texts and not message.get(thoughts.KEY):
        message[thoughts.KEY] = "\n\n".join(texts)
        changes.append("thinking parts read as reasoning_content")
    return [p for p in parts if p not in found]


def _texts(value: object) -> list[str]:
    if isinstance(value, list):
        return [t for v in value for t in _texts(v.get("text") if isinstance(v, dict) else v)]
    return [value] if isinstance(value, str) and value.strip() else []


def _tool_calls(calls: object) -> list[dict[str, Any]]:
    """A list of calls, each with a name; as it was, except that JSON text is decoded."""
    if isinstance(calls, str):
        calls = _json(calls)
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list) or not all(isinstance(c, dict) and call_name(c) for c in calls):
        raise DroppedRow("tool_calls not understood", shorten(calls))
    return calls


def call_name(call: dict[str, Any]) -> str:
    """The name of a tool call, ``{"function": {"name": …}}`` or ``{"name": …}``; "" if it has none."""
    inner = call.get("function", call)
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) else ""


def read_tools(value: object) -> list[dict[str, Any]] | None:
    if value is None or value == "" or value == [] or value != value:
        return None
    tools = _json(value) if isinstance(value, str) else value
    if isinstance(tools, dict):
        tools = [tools]
    if isinstance(tools, list):
        found = [_json(t) if isinstance(t, str) else t for t in tools]
        shaped = [t for t in found if isinstance(t, dict)]
        if len(shaped) == len(found):
            return shaped or None
    raise DroppedRow("tools not understood", shorten(value))


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def unpack(value: object, column: str) -> object:
    """A list of messages written as JSON text (a CSV cell, a Parquet string column)."""
    if not isinstance(value, str):
        return value
    found = _json(value)
    if not isinstance(found, list | dict):
        raise DroppedRow(f"{column} is neither text nor messages", shorten(value))
    return found


def unpacked_messages(text: str) -> list[Any] | None:
    """The messages that a text is the JSON of; None if it is any other text."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    found = _json(text)
    messages = [found] if isinstance(found, dict) else found
    if not isinstance(messages, list) or not messages:
        return None
    return messages if all(isinstance(m, dict) and _speaks(m) for m in messages) else None


def role_of(m: dict[str, Any]) -> str | None:
    """Our name of who speaks in a message as it is written; None if nobody does whom we know."""
    role = m.get("role", m.get("from"))
    return _ROLES.get(role.strip().lower()) if isinstance(role, str) else None


def _speaks(m: dict[str, Any]) -> bool:
    return role_of(m) is not None and len(m) > 1


def untrained(message: dict[str, Any]) -> bool:
    """Whether a message is marked as one not to train on: ``weight: 0``, or a mark of Axolotl's or ms-swift's."""
    if len(message) == 2:
        return False
    return message.get("weight") == 0 or any(message.get(k) is False for k in ("train", "training", "loss"))


def shorten(value: object, limit: int = 80) -> str:
    """A value as one short line of text, for reports."""
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text[: 4 * limit].split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
