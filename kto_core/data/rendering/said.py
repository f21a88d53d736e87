"""What messages say, looked for in the text that a chat template made of them.

A template may trim a text, write it as JSON or in other order; what it may not do is leave it out without a word.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from kto_core.data.records import thoughts
from kto_core.data.records.rows import call_name

THOUGHT = "reasoning of an earlier answer"
_NAMES = {"user": "a user turn", "assistant": "an earlier answer", "tool": "a tool result"}
_SYSTEM = "a system prompt"
_CALL = "a tool call"
_TOOL = "a tool's definition"


def missing(text: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> dict[str, str]:
    """What of a conversation does not stand in its text: name of the part -> the first that is absent."""
    absent: dict[str, str] = {}
    for (name, said), times in Counter(_parts(messages, tools)).items():
        if not stands(said, text, times):
            absent.setdefault(name, said)
    return absent


def of_answer(text: str, message: dict[str, Any]) -> bool:
    """Whether all that an answer says stands in ``text``."""
    return all(stands(said, text, times) for (_, said), times in Counter(_parts([message], None)).items())


def stands(said: str, text: str, times: int = 1) -> bool:
    """Whether ``said`` is in a text that often: as it is, as JSON, or line by line."""
    said = said.strip()
    if not said:
        return True
    if (said in text) if times == 1 else text.count(said) >= times:
        return True
    for plain in (False, True):
        if text.count(json.dumps(said, ensure_ascii=plain)[1:-1]) >= times:
            return True
    lines = [line.strip() for line in said.split("\n")]
    return len(lines) > 1 and all(text.count(line) >= times for line in lines if line)


def _parts(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> Iterator[tuple[str, str]]:
    """(name, text) of everything that is said."""
    for m in messages:
        if content := m.get("content"):
            yield _NAMES.get(m["role"], _SYSTEM), content
        if thought := m.get(thoughts.KEY):
            yield THOUGHT, thought
        for call in m.get("tool_calls") or ():
            yield _CALL, call_name(call)
            inner = call.get("function", call)
            arguments = inner.get("arguments") if isinstance(inner, dict) else None
            for leaf in _leaves(_decoded(arguments)):
                yield _CALL, leaf
    for tool in tools or ():
        inner = tool.get("function", tool)
        name = inner.get("name") if isinstance(inner, dict) else None
        if isinstance(name, str):
            yield _TOOL, name


def _decoded(arguments: object) -> object:
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict | list) else arguments


def _leaves(value: object) -> Iterator[str]:
    """Names and texts inside a call's arguments. Numbers are left out: there are too many ways to write them."""
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            yield from (k for k in one if isinstance(k, str))
            todo += one.values()
        elif isinstance(one, list):
            todo += one
