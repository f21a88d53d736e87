"""What importers share: messages as programs write them, one verdict out of several, the record that comes of it.

Standard library only. Nothing here raises anything but DroppedRow, whatever a stranger's file holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from kto_core.data.records import names
from kto_core.data.records.rows import DroppedRow, shorten

Record = dict[str, Any]
Turn = dict[str, Any]
Item = Record | DroppedRow

UNRATED = "no rated answer"
DISAGREE = "ratings disagree"

ANSWERS = (*names.ANSWERS, "generated_text", "text", "content", "result")  # these are answers only where one was logged
_LIKED = (re.compile("thumb|feedback|kto"), re.compile("user|label|rating|prefer"))  # the first that one name fits
_KEPT = ("tool_calls", "function_call", "name", "tool_call_id", "reasoning_content", "reasoning")
_LANGCHAIN = {"HumanMessage": "user", "AIMessage": "assistant", "SystemMessage": "system", "ToolMessage": "tool"}
_NESTED = 6  # levels of wrapping around messages


class Importer(NamedTuple):
    """One program's exports: its name, whether an object is one of them, and the records that it stands for.

    ``records`` may raise DroppedRow where the object gives none, and DataError where its version or form is unknown.
    ``gather`` puts objects together that stand for a record only together; it keeps the number of each one's line.
    """

    name: str
    knows: Callable[[Record], bool]
    records: Callable[[Record], Iterator[Item]]
    gather: Callable[[Iterable[tuple[int, object]]], Iterator[tuple[int, object]]] | None = None


def at(value: object, *keys: str | int) -> Any:
    """What stands under these keys, one within the other; None where a level is missing."""
    for key in keys:
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and isinstance(key, int) and -len(value) <= key < len(value):
            value = value[key]
        else:
            return None
    return value


def text_at(value: object, *keys: str | int) -> str:
    """The text under these keys; "" where there is none."""
    found = at(value, *keys)
    return found if isinstance(found, str) else ""


def dicts(value: object) -> list[Record]:
    """The objects of a list, or of an object's values."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [v for v in items if isinstance(v, dict)]


def number(value: object) -> float | None:
    """A number, but neither a truth value nor NaN."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and value == value else None


# --- messages ---------------------------------------------------------------------------------------------------------


def turn(value: object) -> Turn | None:
    """One message of OpenAI's form, ShareGPT's or one of LangChain's three; None if it is none."""
    if not isinstance(value, dict):
        return None
    inner = value.get("kwargs") or value.get("data")
    if isinstance(inner, dict) and "content" in inner:  # LangChain's, as it saves objects
        known = _LANGCHAIN.get(str(at(value, "id", -1)).removesuffix("Chunk"))
        value = {"role": known or inner.get("type") or value.get("type"), **inner}
    role = next((r for k in ("role", "from", "type", "author") if isinstance(r := value.get(k), str)), None)
    if role is None or not any(k in value for k in ("content", "value", "tool_calls", "text")):
        return None
    content = next((value[k] for k in ("content", "value", "text") if value.get(k) is not None), None)
    out: Turn = {"role": role, "content": content}
    return out | {k: value[k] for k in _KEPT if value.get(k)}


def turns(value: object) -> list[Turn]:
    """Messages of a list; [] if it is anything else than a list of messages."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]  # a batch of one
    found = [turn(m) for m in value] if isinstance(value, list) else []
    return [m for m in found if m] if found and all(found) else []


def unwrapped(value: object) -> object:
    """JSON text as what it says, if that is a list or an object."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "[") and value.rstrip()[-1:] in ("}", "]"):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if isinstance(found, list | dict) else value
    return value


def asked(value: object, depth: int = _NESTED) -> list[Turn]:
    """The messages that a model was asked with, out of what a program logged as its input; [] if none is found."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}] if value.strip() else []
    if found := turns(value):
        return found
    if not isinstance(value, dict) or not depth:
        return []
    system = next((value[s] for s in names.SYSTEM if isinstance(value.get(s), str | list) and value[s]), None)
    before = [{"role": "system", "content": system}] if system else []
    for key in names.MESSAGES:
        if found := turns(value.get(key)):
            return found if found[0]["role"] == "system" else before + found
    if alone := turn(value):
        return before + [alone]
    for key in (*names.PROMPTS, "inputs", "args", "kwargs"):
        inner = value.get(key)
        if inner and (found := asked(inner[0] if key == "args" and isinstance(inner, list) else inner, depth - 1)):
            return found if found[0]["role"] == "system" else before + found
    texts = [v for v in value.values() if isinstance(v, str) and v.strip()]
    return [*before, {"role": "user", "content": texts[0]}] if len(texts) == 1 and not before else []


def answered(value: object, depth: int = _NESTED) -> list[Turn]:
    """The answer, out of what a program logged as a model's output; [] if none is found."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}] if value.strip() else []
    if isinstance(value, list):
        found = turns(value)
        if found and found[-1]["role"].lower() not in ("user", "human", "system", "text"):
            return found[-1:]
        return answered(value[0], depth - 1) if len(value) == 1 and depth else []
    if not isinstance(value, dict) or not depth:
        return []
    parts = value.get("content")
    if value.get("type") == "message" and isinstance(parts, list):  # Anthropic's whole response
        return [{"role": "assistant", "content": [p for p in parts if at(p, "type") != "thinking"]}]
    if (alone := turn(value)) and alone["role"] != "text":
        return [{**alone, "role": "assistant"}]
    for key in ("message", "choices", "generations", "messages", *ANSWERS, "outputs"):
        inner = value.get(key)
        if isinstance(inner, list) and key in ("choices", "generations"):
            inner = inner[:1]  # what was shown
        if inner and (found := answered(inner, depth - 1)):
            return found
    texts = [v for v in value.values() if isinstance(v, str) and v.strip()]
    return [{"role": "assistant", "content": texts[0]}] if len(texts) == 1 else []


def exchange(fields: Record) -> tuple[list[Turn], list[Turn]]:
    """Question and answer out of named fields.

    Raises:
        DroppedRow: one of them is not found.
    """
    fields = {str(k): unwrapped(v) for k, v in fields.items()}
    by_name = {names.spelled(k): k for k in reversed(fields)}
    system = next((fields[by_name[s]] for s in names.SYSTEM if isinstance(fields.get(by_name.get(s, "")), str)), "")
    before: list[Turn] = [{"role": "system", "content": system}] if system else []
    answer = next((found for a in ANSWERS if (found := answered(fields.get(by_name.get(a, ""))))), [])
    talk = next((found for t in names.MESSAGES if (found := turns(fields.get(by_name.get(t, ""))))), [])
    if not talk:
        talk = next((found for q in names.PROMPTS if (found := asked(fields.get(by_name.get(q, ""))))), [])
    elif not answer and talk[-1]["role"].lower() in ("assistant", "gpt", "ai", "bot", "model"):
        talk, answer = talk[:-1], talk[-1:]
    if not talk or not answer:
        raise DroppedRow("no question and answer found", ", ".join(map(str, list(fields)[:12])))
    return (talk if talk[0]["role"] == "system" else before + talk), answer


# --- verdicts ---------------------------------------------------------------------------------------------------------


def one(values: list[Any]) -> Any:
    """What several people said, as one: the value they share, or the mean of a scale.

    Raises:
        DroppedRow: they disagree, and it is no scale.
    """
    if all(v == values[0] for v in values):
        return values[0]
    points = [n for v in values if (n := number(v)) is not None]
    if len(points) == len(values) and set(points) - {-1, 0, 1}:
        return sum(points) / len(points)
    raise DroppedRow(DISAGREE, ", ".join(shorten(v, 20) for v in values[:8]))


def pick(found: dict[str, Any]) -> Any:
    """The verdict among those that have names: the only one, or the one whose name says that it is a person's.

    Raises:
        DroppedRow: there is none, or several could be it.
    """
    if not found:
        raise DroppedRow(UNRATED)
    own = list(found)
    for liked in _LIKED:
        if len(own) > 1 and len(fits := [n for n in own if liked.search(n.lower())]) >= 1:
            own = fits
    if len(own) > 1:
        raise DroppedRow("several ratings of one answer", ", ".join(own[:12]))
    return found[own[0]]


def is_correction(name: str) -> bool:
    """Whether a text of this name is a better answer, not a remark."""
    return bool(re.search("correct|rewrit|edit|improv|ideal|better|repair|expected|fixed", name.lower()))


def record(prompt: list[Turn], completion: list[Turn], verdict: Any, **extra: Any) -> Record:
    """A plain record. A verdict that is a number goes under ``rating``, where thresholds are applied to it."""
    name = "label" if number(verdict) is None else "rating"
    kept = {k: v for k, v in extra.items() if v not in (None, "", [], {})}
    return {"prompt": prompt, "completion": completion, name: verdict, **kept}


def corrected(prompt: list[Turn], better: list[Turn], **extra: Any) -> Record:
    """The record of a corrected answer: a desirable one."""
    return record(prompt, better, True, **extra, corrected=True)


def rated(
    prompt: list[Turn], answer: list[Turn], verdict: Callable[[], Any], better: Iterable[list[Turn]], **extra: Any
) -> Iterator[Item]:
    """The record of an answer, or why ``verdict`` finds none; then those of its corrections."""
    try:
        yield record(prompt, answer, verdict(), **extra)
    except DroppedRow as e:
        yield e
    for turns in better:
        yield corrected(prompt, turns, **extra) if turns else DroppedRow("correction not understood")


def as_answer(text: str) -> list[Turn]:
    """A text as the answer."""
    return [{"role": "assistant", "content": text}]


def ancestors(messages: dict[str, Record], key: Any, parent: str) -> list[Record]:
    """The messages of a tree from its root down to ``key``; [] for None.

    Raises:
        DroppedRow: one of them is missing, or they go in a circle.
    """
    path: list[Record] = []
    seen: set[str] = set()
    while key is not None:
        found = messages.get(str(key))
        if found is None or str(key) in seen:
            raise DroppedRow("a message of the chat is missing", shorten(key))
        seen.add(str(key))
        path.append(found)
        key = found.get(parent)
    return path[::-1]
