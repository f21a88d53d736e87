"""A line of a vote's file -> what it means. Whatever a line is, it is used or refused with ValueError, never half used.

Kinds, in the order in which they come: ``session`` (once, the first line), ``remark`` (what a reader of the result must
know), ``prompt``, ``pair`` (both answers to a prompt), ``edit`` (a better answer that somebody wrote), ``vote``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from kto_core.data.records import thoughts
from kto_core.plain_text import one_line

from .sides import KEYS, Side

CHOICES = ("left", "right", "tie", "bad")  # tie: no difference; bad: both are
PLACES = ("left", "right")
ROLES = ("system", "user", "assistant")
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """What does not change during a vote: the sides, how they answer, and the seed of all that is drawn."""

    a: Side
    b: Side
    sampling: dict[str, float]
    system: str
    seed: int
    began: float

    def same(self, other: Settings) -> bool:
        """Whether votes of both may be counted together."""
        return (self.a, self.b, self.sampling, self.system) == (other.a, other.b, other.sampling, other.system)


@dataclass(frozen=True)
class Answer:
    """What one side said; ``thought`` is not shown to who votes."""

    text: str
    thought: str = ""

    def message(self) -> dict[str, Any]:
        return {"role": "assistant", "content": self.text} | ({thoughts.KEY: self.thought} if self.thought else {})


@dataclass
class Pair:
    """Both answers to one prompt, and what somebody thought of them.

    Attributes:
        number: the prompt's, from 1. answers: by side. left: the side that is shown on the left.
        seed: of both answers. choice: one of `CHOICES`, "" before the vote. edits: by side.
        t, voted: Unix times.
    """

    number: int
    prompt: Messages
    answers: dict[str, Answer]
    left: str
    seed: int
    t: float
    choice: str = ""
    voted: float = 0.0
    edits: dict[str, str] = field(default_factory=dict)

    @property
    def identical(self) -> bool:
        """Both said the same: nobody is asked."""
        return self.answers["a"].text.strip() == self.answers["b"].text.strip()

    @property
    def waits(self) -> bool:
        return not self.choice and not self.identical

    def side(self, place: str) -> str:
        """Whose answer is at this place."""
        return self.left if place == "left" else next(key for key in KEYS if key != self.left)

    @property
    def winner(self) -> str:
        """The side that was preferred, "" if none was."""
        return self.side(self.choice) if self.choice in PLACES else ""


def settings_of(line: dict[str, Any]) -> Settings:
    """Of the first line. Raises ValueError."""
    sampling = line.get("sampling")
    if line.get("kind") != "session" or not isinstance(sampling, dict):
        raise ValueError("not a vote")
    return Settings(
        Side.read(line.get("a")),
        Side.read(line.get("b")),
        {str(k): _number(v) for k, v in sampling.items()},
        _text(line.get("system")),
        int(_number(line.get("seed"))),
        _number(line.get("t")),
    )


def prompt_of(line: dict[str, Any]) -> tuple[int, Messages]:
    """Its number and messages. Raises ValueError."""
    return _whole(line.get("number")), _messages(line.get("messages"))


def remark_of(line: dict[str, Any]) -> str:
    """Raises ValueError."""
    return one_line(_text(line.get("text")), 1000)


def pair_of(line: dict[str, Any]) -> Pair:
    """Raises ValueError."""
    said = line.get("answers")
    if not isinstance(said, dict) or line.get("left") not in KEYS:
        raise ValueError("not a pair")
    answers = {}
    for key in KEYS:
        one = said.get(key)
        if not isinstance(one, dict):
            raise ValueError("not an answer")
        answers[key] = Answer(_text(one.get("content")), _text(one.get(thoughts.KEY, "")))
    return Pair(
        _whole(line.get("number")),
        _messages(line.get("messages")),
        answers,
        line["left"],
        int(_number(line.get("seed"))),
        _number(line.get("t")),
    )


def add_vote(pair: Pair, line: dict[str, Any]) -> None:
    """The first vote counts: two windows may show the same pair. Raises ValueError."""
    if line.get("choice") not in CHOICES:
        raise ValueError("not a choice")
    if not pair.choice:
        pair.choice, pair.voted = line["choice"], _number(line.get("t"))


def add_edit(pair: Pair, line: dict[str, Any]) -> None:
    """The last edit of a side counts; an empty one takes it back. Raises ValueError."""
    if line.get("side") not in KEYS:
        raise ValueError("not a side")
    pair.edits[line["side"]] = _text(line.get("text"))


def _messages(value: object) -> Messages:
    if not isinstance(value, list) or not value:
        raise ValueError("no messages")
    for m in value:
        if not isinstance(m, dict) or m.get("role") not in ROLES or not isinstance(m.get("content"), str):
            raise ValueError("not a message")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("not a text")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("not a number")
    return value


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("not a number of a prompt")
    return value
