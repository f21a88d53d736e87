"""Labels, messages, tool calls and tools as people write them -> as we keep them; pure, standard library only.

This module knows one value at a time, nothing of rows and columns.
"""

from __future__ import annotations

import json
import math
import re

_ROLES = {
    **{r: r for r in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "chatbot", "model", "ai", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "ipython"), "tool"),
}
_TRUE, _FALSE = frozenset(("true", "1", "yes", "👍")), frozenset(("false", "0", "no", "👎"))
_THUMB_LOOKS = re.compile("[\ufe0e\ufe0f\U0001f3fb-\U0001f3ff]")  # variation selectors, skin tones
_PLAIN = {"role", "content"}


class DroppedRow(Exception):
    """A row that cannot be used.

    Args:
        reason: short and stable, to count by.
        detail: what was found there.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


# --- labels -----------------------------------------------------------------------------------------------------------


def parse_label(value: object) -> bool:
    """true/false, 1/0, "true"/"false", "yes"/"no", 👍/👎; case and blanks around do not matter.

    Raises:
        DroppedRow: "no label" (missing, null, NaN, empty) or "label not understood".
    """
    if value is True or value is False:
        return value
    if isinstance(value, int | float):
        if value == 1:
            return True
        if value == 0:
            return False
        if value != value:
            raise DroppedRow("no label", "NaN")
    elif isinstance(value, str):
        text = _THUMB_LOOKS.sub("", value).strip().lower()
        if text in _TRUE:
            return True
        if text in _FALSE:
            return False
        if text in ("", "nan", "null", "none"):
            raise DroppedRow("no label", shorten(value))
    elif value is None:
        raise DroppedRow("no label")
    raise DroppedRow("label not understood", shorten(value))


# --- messages ---------------------------------------------------------------------------------------------------------


def read_turns(value: object, role: str | None, column: str, changes: list[str]) -> list[dict]:
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


def _message(m: object, changes: list[str]) -> dict:
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
    if "tool_calls" in out:
        out["tool_calls"] = _tool_calls(out["tool_calls"])
    elif "function_call" in out:  # OpenAI's first form
        out["tool_calls"] = _tool_calls([out.pop("function_call")])
        changes.append("function_call read as tool_calls")
    elif isinstance(role, str) and role.strip().lower() == "function_call" and isinstance(content, str):
        out["tool_calls"], content = _tool_calls(content), None  # ShareGPT's form
    return {"role": known, "content": _content(content, out, changes), **out}


def _content(content: object, message: dict, changes: list[str]) -> str | None:
    if isinstance(content, str):
        return content
    if content is None or content != content:
        if "tool_calls" in message:
            return None
        raise DroppedRow("message without content")
    if isinstance(content, list):  # parts, as multimodal chats have them
        texts = [p if isinstance(p, str) else p.get("text") if isinstance(p, dict) else None for p in content]
        if all(isinstance(t, str) for t in texts):
            changes.append("content parts joined")
            return "".join(texts)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        changes.append("number read as text")
        return str(content)
    raise DroppedRow("content is not text", shorten(content))


def _tool_calls(calls: object) -> list[dict]:
    """A list of calls, each with a name; as it was, except that JSON text is decoded."""
    if isinstance(calls, str):
        calls = _json(calls)
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list) or not all(isinstance(c, dict) and call_name(c) for c in calls):
        raise DroppedRow("tool_calls not understood", shorten(calls))
    return calls


def call_name(call: dict) -> str:
    """The name of a tool call, ``{"function": {"name": …}}`` or ``{"name": …}``; "" if it has none."""
    inner = call.get("function", call)
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) else ""


def read_tools(value: object) -> list[dict] | None:
    if value is None or value == "" or value == [] or value != value:
        return None
    tools = _json(value) if isinstance(value, str) else value
    if isinstance(tools, dict):
        tools = [tools]
    if isinstance(tools, list):
        tools = [_json(t) if isinstance(t, str) else t for t in tools]
        if all(isinstance(t, dict) for t in tools):
            return tools or None
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


def shorten(value: object, limit: int = 80) -> str:
    """A value as one short line of text, for reports."""
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text[: 4 * limit].split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
