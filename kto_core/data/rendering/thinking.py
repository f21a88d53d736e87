"""How a chat template writes thoughts: found by trying it once, with one question and one answer.

A template may have a switch (``enable_thinking``), a key for the thought, a frame around it, and a frame that it writes
where nothing was thought. That last one belongs to the prompt: it is no part of what the model answers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from kto_core.data.records import thoughts
from kto_core.errors import KTOError

Message = dict[str, Any]
Apply = Callable[..., str]  # (messages, tools, generation prompt, variables) -> text
Mode = Literal["default", "on", "off"]
Kind = Literal["reasoning_content", "thinking", "reasoning", "tags", "cut"]

SWITCH: dict[Mode, dict[str, Any]] = {
    "default": {},
    "on": {"enable_thinking": True, "thinking": True},
    "off": {"enable_thinking": False, "thinking": False},
}
QUESTION = {"role": "user", "content": "zqquestion"}
_ANSWER, _THOUGHT = "zqanswer", "zqthought"


@dataclass(frozen=True)
class Plain:
    """An answer without a thought, in one mode.

    Attributes:
        tail: end of the generation prompt that the template does not write again before the answer.
        frame: what it writes between the rest of that prompt and the answer.
        end: what it writes after the answer.
        found: False if the template refused to be tried.
    """

    tail: str = ""
    frame: str = ""
    end: str = ""
    found: bool = False


@dataclass(frozen=True)
class Thoughts:
    """What a chat template does with thoughts.

    Attributes:
        kind: the key it takes a thought from; "tags": it writes the content as it is; "cut": it writes no thought.
        plain: answers without a thought, in each mode.
        opening: what it writes between the generation prompt and a thought; middle: between a thought and the answer.
        tail: as `Plain.tail`, before a thought.
    """

    kind: Kind
    plain: dict[Mode, Plain]
    opening: str
    middle: str
    tail: str

    def handed(self, messages: list[Message]) -> list[Message]:
        """Messages with their thoughts as the template takes them."""
        if not any(thoughts.KEY in m for m in messages):
            return messages
        return [self._handed(m) if thoughts.KEY in m else m for m in messages]

    def _handed(self, message: Message) -> Message:
        if self.kind == "reasoning_content":
            return message
        rest = {k: v for k, v in message.items() if k != thoughts.KEY}
        thought = message[thoughts.KEY]
        if self.kind == "tags":
            return {**rest, "content": thoughts.join(thought, message.get("content") or "")}
        if self.kind in ("thinking", "reasoning"):
            if rest.get("tool_calls") and rest.get("content"):  # such templates take one of the two beside a call
                return {**rest, "content": f"{thought}\n\n{rest['content']}"}
            return {**rest, self.kind: thought}
        return rest

    def closed(self, asked: str, mode: Mode, is_special: Callable[[str], bool], tools: bool) -> str:
        """A generation prompt after which the answer begins at once: nothing is thought."""
        plain = self.plain[mode]
        if self.closes(plain, is_special, tools) and asked.endswith(plain.tail):
            return asked[: len(asked) - len(plain.tail)] + plain.frame
        return asked + thoughts.closing(asked)

    def closes(self, plain: Plain, is_special: Callable[[str], bool], tools: bool) -> bool:
        """Whether the frame of an answer without a thought says that nothing was thought.

        A channel says so too, but where tools are offered the model has to choose between it and a call.
        """
        if thoughts.EMPTY.search(plain.frame):
            return True
        return not tools and self.kind not in ("tags", "cut") and is_special(plain.frame)


def learn(apply: Apply) -> Thoughts:
    """Try a chat template. One that refuses is taken for one that knows nothing of thoughts."""

    def tried(answer: Message | None, mode: Mode) -> str:
        try:
            return apply([QUESTION] if answer is None else [QUESTION, answer], None, answer is None, SWITCH[mode])
        except KTOError:  # it took too much, or was cancelled
            raise
        except Exception:  # templates raise what they like
            return ""

    plain: dict[Mode, Plain] = {}
    for mode in SWITCH:
        asked, whole = tried(None, mode), tried({"role": "assistant", "content": _ANSWER}, mode)
        before, found, end = whole.partition(_ANSWER)
        same = len(os.path.commonprefix((asked, before)))
        ok = bool(asked and found)
        plain[mode] = Plain(asked[same:], before[same:], end, True) if ok else Plain()
    asked = tried(None, "on")
    kind: Kind = "tags"
    if (made := _tried_keys(tried)) is None:
        form = next((f for f in thoughts.WRITTEN if _cuts(tried, f)), None)
        text = "" if form else tried(_answer(content=thoughts.join(_THOUGHT, _ANSWER)), "on")
        if not _whole(text):
            opening, middle = form or thoughts.WRITTEN[0]
            return Thoughts("cut", plain, opening, middle, "")
        whole = text
    else:
        kind, whole = made
    before, _, rest = whole.partition(_THOUGHT)
    same = len(os.path.commonprefix((asked, before)))
    return Thoughts(kind, plain, before[same:], rest.partition(_ANSWER)[0], asked[same:])


def _answer(**keys: str) -> Message:
    return {"role": "assistant", "content": _ANSWER, **keys}


def _whole(text: str) -> bool:
    once = text.count(_THOUGHT) == 1 and text.count(_ANSWER) == 1
    return once and text.find(_THOUGHT) < text.find(_ANSWER)


def _tried_keys(tried: Callable[[Message | None, Mode], str]) -> tuple[Kind, str] | None:
    """The first key through which a thought comes, with the text that it gave."""
    keys: tuple[Kind, ...] = ("reasoning_content", "thinking", "reasoning")
    for kind in keys:
        text = tried(_answer(**{kind: _THOUGHT}), "on")
        if _whole(text):
            return kind, text
    return None


def _cuts(tried: Callable[[Message | None, Mode], str], form: tuple[str, str]) -> bool:
    """Whether a thought that is written in the content is cut out of it: the template knows this form."""
    text = tried(_answer(content=f"{form[0]}{_THOUGHT}{form[1]}{_ANSWER}"), "on")
    return _ANSWER in text and _THOUGHT not in text
