"""Any known row shape -> messages and a label; pure, standard library only.

Shapes: ``prompt``/``completion``/``label``; ``conversations`` or ``messages`` + ``label``; ``chosen``/``rejected``,
with or without a prompt, which give two rows. Texts are strings, one message or lists of messages, in role/content or
ShareGPT's from/value. The last assistant turn is the completion, everything before it the prompt. This module knows
nothing of files, templates or tokens.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field

WANTED = "prompt, completion and label; or conversations (or messages) and label; or chosen and rejected"

_ROLES = {
    **{r: r for r in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "chatbot", "model", "ai", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "ipython"), "tool"),
}
COLUMNS = frozenset(("prompt", "completion", "label", "conversations", "messages", "chosen", "rejected", "tools"))
_TRUE, _FALSE = frozenset(("true", "1", "yes", "👍")), frozenset(("false", "0", "no", "👎"))
_THUMB_LOOKS = re.compile("[\ufe0e\ufe0f\U0001f3fb-\U0001f3ff]")  # variation selectors, skin tones
_PLAIN = {"role", "content"}
_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # Anthropic's hh-rlhf writes a whole talk into one string


@dataclass(frozen=True, slots=True)
class Row:
    """One KTO example.

    Attributes:
        prompt: messages ``{"role", "content", optional "tool_calls", "name", "tool_call_id", …}``, never empty.
        completion: one assistant message; its content may be None if it has tool_calls.
        label: True desirable, False undesirable.
        line: 1-based line (JSONL) or row number in the source.
        tools: JSON schemas of the tools the model was offered.
        extra: the other columns.
    """

    prompt: list[dict]
    completion: list[dict]
    label: bool
    line: int
    tools: list[dict] | None = None
    extra: dict = field(default_factory=dict)


class DroppedRow(Exception):
    """A row that cannot be used.

    Args:
        reason: short and stable, to count by.
        detail: what was found there.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def parse(obj: dict, line: int) -> tuple[list[Row], str, list[str]]:
    """Rows, name of the format, and names of the changes made.

    One side of a pair that cannot be used is left out and named among the changes.

    Raises:
        DroppedRow: no row can be made of it.
    """
    parsed, form, changes = parse_all(obj, line)
    rows = [r for r in parsed if isinstance(r, Row)]
    lost = [r for r in parsed if isinstance(r, DroppedRow)]
    if not rows:
        raise lost[0]
    return rows, form, changes + [f"one side left out: {r.reason}" for r in lost]


def parse_all(obj: object, line: int) -> tuple[list[Row | DroppedRow], str, list[str]]:
    """Like `parse`, but all KTO rows the object stands for are there (two for a pair), each a Row or its DroppedRow."""
    if not isinstance(obj, dict):
        return [DroppedRow("not an object", shorten(obj))], "", []
    changes: list[str] = []
    form, used = _form(obj)
    if form is None:
        return [DroppedRow("wrong columns", ", ".join(map(str, list(obj)[:12])) or "none")], "", []
    if form == "pair":
        return _pair(obj, line, used, changes)
    sharegpt = False
    try:
        label = parse_label(obj.get("label"))
        if form == "prompt/completion/label":
            prompt = _turns(obj["prompt"], "user", "prompt", changes)
            turns = prompt + _turns(obj["completion"], "assistant", "completion", changes)
            least = len(prompt)
        else:
            value = _unpack(obj[used], used)
            sharegpt = isinstance(value, list) and any(isinstance(m, dict) and "from" in m for m in value)
            turns, least = _turns(value, None, used, changes), 0
        tools = _tools(obj.get("tools"))
        row = _row(turns, least, label, line, tools, _extra(obj, (used,), changes), obj, changes)
    except DroppedRow as e:
        row = e
    return [row], form + (" (ShareGPT)" if sharegpt else ""), list(dict.fromkeys(changes))


def _form(obj: dict) -> tuple[str | None, str]:
    """Name of the shape, and the column of the messages ("" for none)."""
    if "chosen" in obj and "rejected" in obj:
        return "pair", next((c for c in ("prompt", "conversations", "messages") if obj.get(c) is not None), "")
    if "prompt" in obj and "completion" in obj:
        return "prompt/completion/label", ""
    for column in ("conversations", "messages"):
        if column in obj:
            return f"{column}/label", column
    return None, ""


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


def _turns(value: object, role: str | None, column: str, changes: list[str]) -> list[dict]:
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


def _tools(value: object) -> list[dict] | None:
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


def _unpack(value: object, column: str) -> object:
    """A list of messages written as JSON text (a CSV cell, a Parquet string column)."""
    if not isinstance(value, str):
        return value
    found = _json(value)
    if not isinstance(found, list | dict):
        raise DroppedRow(f"{column} is neither text nor messages", shorten(value))
    return found


# --- rows -------------------------------------------------------------------------------------------------------------


def _row(turns, least, label, line, tools, extra, obj, changes) -> Row:
    """A row of a whole conversation; the completion is the last assistant turn at or after ``least``."""
    last = next((i for i in range(len(turns) - 1, least - 1, -1) if turns[i]["role"] == "assistant"), None)
    if last is None:
        raise DroppedRow("no assistant turn")
    if last < len(turns) - 1:
        changes.append("turns after the last assistant turn left out")
    completion, prompt = turns[last], turns[:last]
    if not (completion["content"] or "").strip() and "tool_calls" not in completion:
        raise DroppedRow("empty completion")
    system = obj.get("system")
    if isinstance(system, str) and not any(m["role"] == "system" for m in prompt):
        extra = {k: v for k, v in extra.items() if k != "system"}
        if system.strip():
            prompt = [{"role": "system", "content": system}, *prompt]
            changes.append("system column put before the prompt")
    if not prompt:
        prompt = [{"role": "user", "content": ""}]
        changes.append("no prompt: an empty user turn put before the completion")
    return Row(prompt, [completion], label, line, tools, extra)


def _extra(obj: dict, used: tuple[str, ...], changes: list[str], pair: bool = False) -> dict:
    """The other columns. One whose name means something in our saved forms is renamed, so that it survives them."""
    if pair:
        taken = {"chosen", "rejected", "tools", *used}
    elif used == ("",):
        taken = {"prompt", "completion", "label", "tools"}
    else:
        taken = {"label", "tools", *used}
    extra = {}
    for key, value in obj.items():
        if key in taken:
            continue
        if key in COLUMNS:
            renamed = f"original_{key}"
            while renamed in obj:
                renamed += "_"
            changes.append(f"column {key} renamed to {renamed}")
            key = renamed
        extra[key] = value
    return extra


def _pair(obj: dict, line: int, used: str, changes: list[str]):
    """The two rows of a chosen/rejected pair, each a Row or its DroppedRow."""
    form = "prompt/chosen/rejected" if used else "chosen/rejected"
    sides = [obj["chosen"], obj["rejected"]]
    if any(_is_sharegpt(v) for v in (*sides, obj.get(used))):
        form += " (ShareGPT)"
    try:
        base = _turns(_maybe_messages(obj[used], used), "user", used, changes) if used else []
        tools = _tools(obj.get("tools"))
    except DroppedRow as e:
        return [e, e], form, changes
    if not used and all(isinstance(s, str) for s in sides):
        sides = _without_prompt(*sides, changes)
    extra = _extra(obj, (used,), changes, pair=True)
    rows: list[Row | DroppedRow] = []
    for column, value, label in (("chosen", sides[0], True), ("rejected", sides[1], False)):
        try:
            turns, least = _join(base, _turns(value, "assistant", column, changes))
            rows.append(_row(turns, least, label, line, tools, extra, obj, changes))
        except DroppedRow as e:
            rows.append(e)
    return rows, form, list(dict.fromkeys(changes))


def _maybe_messages(value: object, column: str) -> object:
    return value if column == "prompt" else _unpack(value, column)


def _is_sharegpt(value: object) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and "from" in first


def _join(base: list[dict], side: list[dict]) -> tuple[list[dict], int]:
    """Prompt and answer as one conversation, and how many turns of it cannot be the completion.

    Many sets repeat the prompt in ``chosen``: what overlaps is taken once.
    """
    n = len(base)
    if n and any(side[i : i + n] == base for i in range(len(side) - n + 1)):
        return side, 0
    k = next((k for k in range(min(n, len(side)), 0, -1) if base[-k:] == side[:k]), 0)
    return base + side[k:], n


def _without_prompt(chosen: str, rejected: str, changes: list[str]) -> list:
    """Sides of a pair of strings that have their prompt in them: hh-rlhf's turns, or else their common beginning."""
    if all(_HH_TURN.match(s) for s in (chosen, rejected)):
        changes.append("Human:/Assistant: text read as turns")
        return [_hh(chosen), _hh(rejected)]
    n = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), -1)
    cut = max(chosen.rfind(" ", 0, n), chosen.rfind("\n", 0, n)) + 1 if n > 0 else 0  # at a word's beginning
    prompt = chosen[:cut].strip()
    if not prompt:
        return [chosen, rejected]
    changes.append("prompt taken from the common beginning of chosen and rejected")
    asked = {"role": "user", "content": prompt}
    return [[asked, {"role": "assistant", "content": s[cut:].lstrip()}] for s in (chosen, rejected)]


def _hh(text: str) -> list[dict]:
    parts = _HH_TURN.split(text)[1:]
    return [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def shorten(value: object, limit: int = 80) -> str:
    """A value as one short line of text, for reports."""
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text[: 4 * limit].split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


# --- saved forms ------------------------------------------------------------------------------------------------------


def to_trl(row: Row) -> dict:
    """TRL's conversational unpaired preference row: prompt, completion, label (tools, extra columns)."""
    return {"prompt": row.prompt, "completion": row.completion, **_rest(row)}


def to_chatml(row: Row) -> dict:
    """conversations (prompt and completion), label (tools, extra columns)."""
    return {"conversations": row.prompt + row.completion, **_rest(row)}


def _rest(row: Row) -> dict:
    tools = {"tools": row.tools} if row.tools else {}
    return {"label": row.label, **tools, **row.extra}
