"""The question and the answers of a record as turns: text rendered before, messages as JSON text, prompts said twice.

This module knows one question and its answers, nothing of columns.
"""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from typing import Any

from . import rendered
from .turns import read_turns, unpacked_messages

Turns = list[dict[str, Any]]
_ODD = frozenset("[{<HS#B \t\r\n")  # what messages as JSON and text rendered before may begin with


def read_question(value: object, column: str, changes: list[str]) -> tuple[Turns, str | None]:
    """Turns of a prompt, and the beginning of the answer that rendered text ends in (None: it is plain text)."""
    if isinstance(value, str) and value[:1] in _ODD:
        if (found := unpacked_messages(value)) is not None:
            changes.append("messages read from JSON text")
            value = found
        elif talk := rendered.read(value):
            changes.append(talk[2])
            return talk[0], talk[1]
        elif rendered.looks_rendered(value):
            changes.append("text looks rendered already, kept as it is")
    return read_turns(value, "user", column, changes), None


def read_answer(value: object, column: str, begun: str | None, changes: list[str]) -> Turns:
    """Turns of an answer; ``begun`` as `read_question` found it."""
    if not isinstance(value, str):
        return read_turns(value, "assistant", column, changes)
    if begun is None and value[:1] not in _ODD:
        return [{"role": "assistant", "content": value}]
    if (found := unpacked_messages(value)) is not None:
        changes.append("messages read from JSON text")
        return read_turns(found, "assistant", column, changes)
    if (talk := rendered.read(value)) and (talk[1] or talk[0][-1]["role"] == "assistant"):
        changes.append(talk[2])
        if not talk[1]:
            return talk[0]
        return [*talk[0], {"role": "assistant", "content": rendered.without_end(talk[1])}]
    if begun is None:
        return [{"role": "assistant", "content": value}]
    if begun:
        changes.append("answer begun in the prompt put before the completion")
    return [{"role": "assistant", "content": (begun + rendered.without_end(value)).lstrip()}]


def is_sharegpt(value: object) -> bool:
    """Whether messages are written with from/value."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and "from" in first


def join(base: Turns, side: Turns) -> tuple[Turns, int]:
    """Prompt and answer as one conversation, and how many turns of it cannot be the completion.

    Many sets repeat the prompt in ``chosen``: what overlaps is taken once, whatever blanks stand around its texts.
    """
    n = len(base)
    for same in (lambda turns: turns, _bare):
        asked, said = same(base), same(side)
        if n and any(said[i : i + n] == asked for i in range(len(said) - n + 1)):
            return side, 0
        if k := next((k for k in range(min(n, len(said)), 0, -1) if asked[-k:] == said[:k]), 0):
            return base + side[k:], n
        if len(side) == 1:
            break  # an answer that is no more than the prompt's last turn is one all the same
    return base + side, n


def _bare(turns: Turns) -> Turns:
    return [{**m, "content": m["content"].strip()} if m["content"] else m for m in turns]


def without_question(asked: Turns, answers: Sequence[object], changes: list[str]) -> Sequence[object]:
    """Answers of a pair, all of which repeat the question at their head, without it."""
    question = asked[-1]["content"] if asked and asked[-1]["role"] == "user" else None
    if not question or " " not in (words := question.strip()):
        return answers
    texts = [a for a in answers if isinstance(a, str) and a.lstrip().startswith(words)]
    cut = [t.lstrip()[len(words) :] for t in texts]
    if len(cut) < 2 or len(cut) < len(answers) or not all(c[:1].isspace() and c.strip() for c in cut):
        return answers
    changes.append("question repeated at the head of the answers taken out")
    return [c.strip() for c in cut]


def own_prompts(answers: Sequence[str], changes: list[str]) -> Sequence[object]:
    """Answers of a pair that have their prompt in them: rendered talks, or else what all of them begin with."""
    if all(rendered.read(s) for s in answers):
        return answers
    whole = os.path.commonprefix(answers)
    n = len(whole) if all(len(s) > len(whole) for s in answers) else -1
    cut = max(whole.rfind(" ", 0, n), whole.rfind("\n", 0, n)) + 1 if n > 0 else 0  # at a word's beginning
    prompt = whole[:cut].strip()
    if not prompt:
        return answers
    changes.append("prompt taken from the common beginning of chosen and rejected")
    asked = {"role": "user", "content": prompt}
    return [[asked, {"role": "assistant", "content": s[cut:].lstrip()}] for s in answers]


def say_trajectories(sides: Sequence[Turns], changes: list[str]) -> None:
    """Name it if the sides differ in more than their last answer: only that is trained."""
    shortest = min(sides, key=len, default=[])
    same = next((i for i, m in enumerate(shortest) if any(s[i] != m for s in sides)), 0) if len(sides) > 1 else 0
    if any(len(s) > same + 1 and sum(m["role"] == "assistant" for m in s[same:]) > 1 for s in sides):
        changes.append("only the last answer is trained")
        if any(a[-1] == b[-1] for i, a in enumerate(sides) for b in sides[:i]):
            changes.append("chosen and rejected end in the same answer")
