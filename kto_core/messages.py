"""Messages as a chat template can take them: what a template supports is found by trying it.

Where a template has nothing for tools, calls and results become text between ChatML's usual tags. Where it refuses
system prompts or two turns of one role in a row, they are folded together. This module knows nothing of tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .rows import call_name

Apply = Callable[[list[dict], "list[dict] | None", bool], str]  # messages, tools, generation prompt -> text
Shaped = tuple[list[dict], "list[dict] | None"]

_EXAMPLE = 'Call one by answering\n<tool_call>\n{"name": "<tool name>", "arguments": {<its arguments>}}\n</tool_call>'


@dataclass(frozen=True)
class Support:
    """What a chat template can render natively.

    Attributes:
        system, developer: turns of that role.
        definitions: the ``tools`` argument.
        calls: (content of a turn that is calls only, "dict" or "str" for arguments), or None.
        calls_with_content: a turn with both keeps its content (many templates lose it).
        results: turns of role tool.
    """

    system: bool
    developer: bool
    definitions: bool
    calls: tuple[str | None, str] | None
    calls_with_content: bool
    results: bool


def probe(apply: Apply) -> Support:
    """Render small conversations and look for what was put in."""
    asked = {"role": "user", "content": "zqquestion"}

    def shows(messages: list[dict], *marks: str, tools: list[dict] | None = None) -> str:
        try:
            text = apply(messages, tools, False)
        except Exception:  # templates raise what they like
            return ""
        return text if all(m in text for m in marks) else ""

    calls = None
    for content in (None, ""):
        for kind, arguments in (("dict", {"zqkey": "zqvalue"}), ("str", '{"zqkey": "zqvalue"}')):
            call = {"id": "zqcall001", "type": "function", "function": {"name": "zqname", "arguments": arguments}}
            turn = {"role": "assistant", "content": content, "tool_calls": [call]}
            text = shows([asked, turn], "zqquestion", "zqname", "zqvalue")
            if text and calls is None and "None" not in text and "'zqkey'" not in text and '\\"zqkey' not in text:
                calls = (content, kind)
    both = results = False
    if calls:
        arguments = {"zqkey": "zqvalue"} if calls[1] == "dict" else '{"zqkey": "zqvalue"}'
        call = {"id": "zqcall001", "type": "function", "function": {"name": "zqname", "arguments": arguments}}
        turn = {"role": "assistant", "content": calls[0], "tool_calls": [call]}
        both = bool(shows([asked, {**turn, "content": "zqcontent"}], "zqcontent", "zqname"))
        answer = {"role": "tool", "content": "zqresult", "name": "zqname", "tool_call_id": "zqcall001"}
        results = bool(shows([asked, turn, answer], "zqresult"))
    schema = {"name": "zqtool", "description": "zqdoes", "parameters": {"type": "object", "properties": {}}}
    return Support(
        system=bool(shows([{"role": "system", "content": "zqsystem"}, asked], "zqsystem", "zqquestion")),
        developer=bool(shows([{"role": "developer", "content": "zqdeveloper"}, asked], "zqdeveloper", "zqquestion")),
        definitions=bool(shows([asked], "zqtool", tools=[{"type": "function", "function": schema}])),
        calls=calls,
        calls_with_content=both,
        results=results,
    )


def shapes(messages: list[dict], tools: list[dict] | None, support: Support) -> Iterator[Shaped]:
    """The conversation in the forms worth trying, the most native first."""
    if not support.developer:
        messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
    has_calls = any(m.get("tool_calls") for m in messages)
    has_both = any(m.get("tool_calls") and (m.get("content") or "").strip() for m in messages)
    has_results = any(m["role"] == "tool" for m in messages)
    can_call = bool(support.calls) and (support.calls_with_content or not has_both)
    if (can_call or not has_calls) and (support.results or not has_results):
        native = [_native(m, support.calls) for m in messages]
        told, given = native, _schemas(tools)
        if not support.definitions:  # how to call is the template's own affair, if it has calls
            told, given = _with_tools(native, tools, example=not support.calls), None
        told = told if support.system else _fold_system(told)
        yield told, given
        if has_calls:
            yield _short_ids(told), given
    text = _with_tools([_as_text(m) for m in messages], tools)
    yield (text if support.system else _fold_system(text)), None
    yield _merge(text), None
    yield _merge(_fold_system(text)), None


def chatml(messages: list[dict], tools: list[dict] | None, generation: bool) -> str:
    """The frame for a model without a chat template."""
    turns = [f"<|im_start|>{m['role']}\n{m['content'] or ''}<|im_end|>\n" for m in messages]
    return "".join(turns) + ("<|im_start|>assistant\n" if generation else "")


def _function(call: dict) -> dict:
    inner = call.get("function", call)
    return inner if isinstance(inner, dict) else {}


def _arguments(call: dict, kind: str) -> object:
    """Arguments of a call as an object or as JSON text; text that is no JSON object stays as it is."""
    value = _function(call).get("arguments")
    if kind == "str":
        return value if isinstance(value, str) else json.dumps({} if value is None else value, ensure_ascii=False)
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else {}
        except (ValueError, RecursionError):
            return value
    return {} if value is None else value


def _native(message: dict, calls: tuple[str | None, str] | None) -> dict:
    if not message.get("tool_calls"):
        return message if message.get("content") is not None else {**message, "content": ""}
    empty, kind = calls
    shaped = []
    for call in message["tool_calls"]:
        function = {**_function(call), "name": call_name(call), "arguments": _arguments(call, kind)}
        rest = {k: v for k, v in call.items() if k not in ("name", "arguments", "function")}
        shaped.append({"type": "function", **rest, "function": function})
    return {**message, "content": message.get("content") or empty, "tool_calls": shaped}


def _schemas(tools: list[dict] | None) -> list[dict] | None:
    return [t if "function" in t else {"type": "function", "function": t} for t in tools] if tools else None


def _as_text(message: dict) -> dict:
    """A call or a result as text; other messages as they are."""
    content = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    parts = [content] if content.strip() else []
    for call in message.get("tool_calls") or ():
        said = {"name": call_name(call), "arguments": _arguments(call, "dict")}
        parts.append(f"<tool_call>\n{json.dumps(said, ensure_ascii=False)}\n</tool_call>")
    rest = {k: v for k, v in message.items() if k not in ("tool_calls", "tool_call_id")}
    return {**rest, "content": "\n".join(parts) if message.get("tool_calls") else content}


def _with_tools(messages: list[dict], tools: list[dict] | None, example: bool = True) -> list[dict]:
    """The tools' definitions at the end of the system prompt."""
    if not tools:
        return messages
    listed = "\n".join(json.dumps(t, ensure_ascii=False) for t in tools)
    told = f"Tools you can call:\n<tools>\n{listed}\n</tools>" + (f"\n{_EXAMPLE}" if example else "")
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{told}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]


def _fold_system(messages: list[dict]) -> list[dict]:
    """System prompts at the head of the next user turn."""
    out, held = [], []
    for m in messages:
        if m["role"] == "system":
            held.append(m["content"] or "")
        elif held and m["role"] == "user":
            out.append({**m, "content": "\n\n".join([*held, m["content"] or ""])})
            held = []
        else:
            if held:
                out.append({"role": "user", "content": "\n\n".join(held)})
                held = []
            out.append(m)
    return [*out, {"role": "user", "content": "\n\n".join(held)}] if held else out


def _merge(messages: list[dict]) -> list[dict]:
    """User and assistant in turn, the user first; a system prompt only at the head."""
    out: list[dict] = []
    for m in messages:
        role = m["role"]
        if role == "system" and out:
            role = "user"
        previous = out[-1]["role"] if out else None
        if previous == role:
            out[-1] = {**out[-1], "content": f"{out[-1]['content']}\n\n{m['content'] or ''}"}
            continue
        if role == "assistant" and previous != "user":
            out.append({"role": "user", "content": ""})
        out.append({**m, "role": role, "content": m["content"] or ""})
    return out


def _short_ids(messages: list[dict]) -> list[dict]:
    """Ids of calls as nine letters and digits, which is all that some templates take; absent ones are made."""

    def short(value: object) -> str:
        return hashlib.sha256(str(value).encode("utf-8", "replace")).hexdigest()[:9]

    out = []
    for m in messages:
        if m.get("tool_calls"):
            calls = [{**c, "id": short(c.get("id") or f"{len(out)} {i}")} for i, c in enumerate(m["tool_calls"])]
            m = {**m, "tool_calls": calls}
        elif m["role"] == "tool":
            m = {**m, "tool_call_id": short(m.get("tool_call_id") or f"{len(out) - 1} 0")}
        out.append(m)
    return out
