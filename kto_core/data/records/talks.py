"""Lists of messages as they are written, before they are read: who speaks, and who speaks last."""

from __future__ import annotations

from typing import Any

from .names import ANSWERS, PROMPTS, spelled
from .turns import role_of, unpacked_messages


def messages_of(value: object) -> list[dict[str, Any]]:
    """The messages of a cell, also as JSON text; [] if it is anything else."""
    value = unpacked_messages(value) if isinstance(value, str) else value
    return value if isinstance(value, list) and all(isinstance(m, dict) for m in value) else []


def ends_in_answer(value: object) -> bool:
    """Whether the last message of a cell is the assistant's."""
    found = messages_of(value)
    return bool(found) and role_of(found[-1]) == "assistant"


def answers_only(messages: list[Any]) -> bool:
    return all(isinstance(m, dict) and role_of(m) == "assistant" for m in messages)


def has_system(messages: object) -> bool:
    return isinstance(messages, list) and any(isinstance(m, dict) and role_of(m) == "system" for m in messages)


def from_pairs(value: object) -> list[dict[str, Any]]:
    """Turns of a list that has a question and its answer in each object, ``[{"human": …, "assistant": …}, …]``.

    [] if the value is anything else.
    """
    turns: list[dict[str, Any]] = []
    for pair in value if isinstance(value, list) else ():
        if not isinstance(pair, dict) or "role" in pair or "from" in pair:
            return []
        names = {spelled(k): v for k, v in pair.items() if isinstance(v, str)}
        asked = next((names[n] for n in PROMPTS if n in names), None)
        said = next((names[n] for n in ANSWERS if n in names), None)
        if asked is None or said is None:
            return []
        system = [{"role": "system", "content": names["system"]}] if names.get("system") and not turns else []
        turns += [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return turns
