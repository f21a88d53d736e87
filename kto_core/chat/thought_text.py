"""What a model generates -> text with its thought between `<think>` tags, however its own template writes thoughts.

Works on pieces as they come: whoever reads them can show the thought while it grows (`thoughts.split`). This module
knows strings and markers, nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kto_core.data.records import thoughts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


BLANKS = 8  # characters before a marker


@dataclass(frozen=True)
class Markers:
    """How one model tells its thoughts from its answers.

    Attributes:
        opening, closing: around a thought; answer: what may stand before an answer without one.
        special: texts of special tokens, which are no part of what is said.
        raw: whether special tokens have to be decoded too, because markers are made of them.
        opened: whether the prompt has opened a thought already.
    """

    opening: tuple[str, ...]
    closing: tuple[str, ...]
    answer: tuple[str, ...]
    special: Collection[str]
    raw: bool
    opened: bool


def markers(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Markers:
    """Those of a model that is to answer the prompt ``ids``."""
    from kto_core.data.rendering.template import thoughts_of

    found, special = thoughts_of(tokenizer)
    frames = [p.frame.strip() for p in found.plain.values()]
    opening, closing = _distinct(found.opening, thoughts.OPEN), _distinct(found.middle, thoughts.CLOSE)
    own = "".join((*opening, *closing, *frames))
    opened = bool(thoughts.OPENS.search(str(tokenizer.decode(ids[-32:]))))
    return Markers(
        opening, closing, _distinct(*frames), special, found.kind != "tags" and any(s in own for s in special), opened
    )


def _distinct(*texts: str) -> tuple[str, ...]:
    """Without empty ones, the longest first."""
    return tuple(sorted({t.strip() for t in texts if t.strip()}, key=lambda t: (-len(t), t)))


class ThoughtText:
    """Turns pieces of one answer into text whose thought, if it has one, stands between `thoughts.OPEN` and `CLOSE`."""

    def __init__(self, found: Markers):
        self._found, self._state, self._held = found, "before" if found.opened else "start", ""
        self._begun = found.opened
        self._special = re.compile("|".join(map(re.escape, sorted(found.special, key=len, reverse=True))) or r"(?!)")

    def feed(self, piece: str) -> str:
        """The text that is certain after this piece."""
        self._held += piece
        return self._opened() + self._read(False)

    def finish(self) -> str:
        """The rest, at the end of the answer. A thought that was not closed stays open."""
        return self._opened() + self._read(True)

    def _opened(self) -> str:
        begun, self._begun = self._begun, False
        return thoughts.OPEN if begun else ""

    def _read(self, last: bool) -> str:
        out = ""
        if self._state == "start":
            text = self._held.lstrip()
            if found := next((m for m in self._found.opening if text.startswith(m)), ""):
                self._state, self._held, out = "before", text[len(found) :], thoughts.OPEN
            elif found := next((m for m in self._found.answer if text.startswith(m)), ""):
                self._state, self._held = "answer", text[len(found) :]
            elif not last and self._may_open(text):
                return ""
            else:
                self._state = "answer"
        if self._state == "before":  # blank lines before the thought are the frame's
            self._held = self._held.lstrip("\n")
            if not self._held:
                return out
            self._state = "thought"
        if self._state == "thought":
            ends = [(at, -len(m), m) for m in self._found.closing if (at := self._held.find(m)) >= 0]
            if not ends:
                return out + self._certain(self._found.closing, last)
            at, _, marker = min(ends)
            out += self._clean(self._held[:at].rstrip()) + thoughts.CLOSE
            self._state, self._held = "after", self._held[at + len(marker) :]
        if self._state == "after":  # blank lines before the answer are the frame's
            self._held = self._held.lstrip("\n")
            if not self._held:
                return out
            self._state = "answer"
        return out + self._certain((), last)

    def _may_open(self, text: str) -> bool:
        """Whether what is held may become a marker: more blanks than any template writes are an answer of blanks."""
        if len(self._held) - len(text) > BLANKS:
            return False
        return any(m.startswith(text) for m in (*self._found.opening, *self._found.answer))

    def _certain(self, ahead: tuple[str, ...], last: bool) -> str:
        """What is held, without an end that may be the beginning of a marker or of a special token."""
        text, keep = self._held, 0
        if not last:
            awaited = (*ahead, *(self._found.special if self._found.raw else ()))
            longest = max(map(len, awaited), default=1)
            for n in range(min(len(text), longest - 1), 0, -1):
                if any(m.startswith(text[-n:]) for m in awaited):
                    keep = n
                    break
            while ahead and keep < len(text) and text[len(text) - keep - 1].isspace():  # before a closing marker
                keep += 1
        self._held = text[len(text) - keep :] if keep else ""
        return self._clean(text[: len(text) - keep])

    def _clean(self, text: str) -> str:
        return self._special.sub("", text) if self._found.raw else text


def whole(tokenizer: PreTrainedTokenizerBase, prompt: list[int], answer: list[int]) -> str:
    """A whole answer, given as its token ids."""
    found = markers(tokenizer, prompt)
    reader = ThoughtText(found)
    return reader.feed(str(tokenizer.decode(answer, skip_special_tokens=not found.raw))) + reader.finish()
