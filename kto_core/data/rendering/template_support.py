"""Messages as a chat template can take them: what a template supports is found by trying it.

Where a template has nothing for tools, calls and results become text between ChatML's usual tags. Where it refuses
system prompts or two turns of one role in a row, they are folded together. This module knows nothing of tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kto_core.data.records.rows import call_name
from kto_core.errors import KTOError

Apply = Callable[
    [list[dict[str, Any]], "list[dict[str, Any]] | None", bool], str
]  # messages, tools, generation prompt -> text
Shaped = tuple[list[dict[str, Any]], "list[dict[str, Any]] | None", bool]  # messages, tools, calls in its own form

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
        parts: contents are lists of parts, as templates of models that see take them; a plain string would vanish.
    """

    system: bool
    developer: bool
    definitions: bool
    calls: tuple[str | None, str] | None
    calls_with_content: bool
    results: bool
    parts: bool = False


def parts_only(apply: Apply) -> bool:
    """Whether a template loses contents that are plain strings, and shows them as lists of parts."""

    def shown(content: object) -> bool:
        try:
            text = apply([{"role": "user", "content": content}], None, False)
        except KTOError:
            raise
        except Exception:  # templates raise what they like
            return False
        return "zqquestion" in text and "{'" not in text  # a list that is written as Python would write it

    return not shown("zqquestion") and shown(as_parts("zqquestion"))


def as_parts(content: str | None) -> list[dict[str, str]]:
    return [{"type": "text", "text": content or ""}]


def probe(apply: Apply) -> Support:
    """Render small conversations and look for what was put in."""
    asked = {"role": "user", "content": "zqquestion"}

    def shows(messages: list[dict[str, Any]], *marks: str, tools: list[dict[str, Any]] | None = None) -> str:
        try:
            text = apply(messages, tools, False)
        except KTOError:  # it took too much, or was cancelled
            raise
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


def shapes(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, support: Support) -> Iterator[Shaped]:
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
        yield told, given, True
        if has_calls:
            yield _short_ids(told), given, True
    text = _with_tools([_as_text(m) for m in messages], tools)
    yield (text if support.system else _fold_system(text)), None, False
    yield _merge(text), None, False
    yield _merge(_fold_system(text)), None, False


def answers(message: dict[str, Any], support: Support, native: bool) -> Iterator[dict[str, Any]]:
    """An answer in the forms worth trying, after a prompt whose calls are ``native`` or text."""
    if not message.get("tool_calls"):
        yield message if message.get("content") is not None else {**message, "content": ""}
        return
    if native and support.calls:
        shaped = _native(message, support.calls)
        yield shaped
        yield from _short_ids([shaped])
    yield _as_text(message)


def chatml(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, generation: bool) -> str:
    """The frame for a model without a chat template."""
    turns = [f"<|im_start|>{m['role']}\n{m['content'] or ''}<|im_end|>\n" for m in messages]
    return "".join(turns) + ("<|im_start|>assistant\n" if generation else "")


def _function(call: dict[str, Any]) -> dict[str, Any]:
    inner = call.get("function", call)
    return inner if isinstance(inner, dict) else {}


def _arguments(call: dict[str, Any], kind: str) -> object:
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


def _native(message: dict[str, Any], calls: tuple[str | None, str] | None) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message if message.get("content") is not None else {**message, "content": ""}
    assert calls, "asked only of a template that shows calls"
    empty, kind = calls
    shaped = []
    for call in message["tool_calls"]:
        function = {**_function(call), "name": call_name(call), "arguments": _arguments(call, kind)}
        rest = {k: v for k, v in call.items() if k not in ("name", "arguments", "function")}
        shaped.append({"type": "function", **rest, "function": function})
    return {**message, "content": message.get("content") or empty, "tool_calls": shaped}


def _schemas(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    return [t if "function" in t else {"type": "function", "function": t} for t in tools] if tools else None


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
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


def _with_tools(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, example: bool = True
) -> list[dict[str, Any]]:
    """The tools' definitions at the end of the system prompt."""
    if not tools:
        return messages
    listed = "\n".join(json.dumps(t, ensure_ascii=False) for t in tools)
    told = f"Tools you can call:\n<tools>\n{listed}\n</tools>" + (f"\n{_EXAMPLE}" if example else "")
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{told}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]


def _fold_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
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


def _merge(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """User and assistant in turn, the user first; a system prompt only at the head."""
    out: list[dict[str, Any]] = []
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


def _short_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ids of calls as nine letters and digits, which is all that some templates take; absent ones are made."""

    def short(value: object) -> str:
        return hashlib.sha256(str(value).encode("utf-8", "replace")).hexdigest()[:9]

    out: list[dict[str, Any]] = []
    for m in messages:
        if m.get("tool_calls"):
            calls = [{**c, "id": short(c.get("id") or f"{len(out)} {i}")} for i, c in enumerate(m["tool_calls"])]
            m = {**m, "tool_calls": calls}
        elif m["role"] == "tool":
            m = {**m, "tool_call_id": short(m.get("tool_call_id") or f"{len(out) - 1} 0")}
        out.append(m)
    return out
