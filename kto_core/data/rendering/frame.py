"""A tokenizer with its chat template: the prompt that asks, and the answer as the template writes it after that prompt.

A row's prompt is made exactly as a chat makes it: from the history alone, whatever the answer is. The answer is then
taken out of the text of the whole conversation, or of a short one, where the template writes the history in other words
once it is answered.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from kto_core.data.records import thoughts
from kto_core.data.records.rows import Row, shorten
from kto_core.errors import DataError, KTOError, ModelError

from . import bounded_template, said
from .style import Style
from .template_support import answers, as_parts, chatml, parts_only, probe, shapes
from .thinking import QUESTION, SWITCH, Mode, learn
from .tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
LEFT_OUT = "{} left out by the model's chat template"
ANSWER_CUT = "the answer is cut by the model's chat template"
NO_THOUGHT = "reasoning of the answer left out (thinking is off)"
_CHAT: dict[str, Mode] = {"rows": "default", "on": "on", "off": "off"}


@dataclass(frozen=True)
class Asked:
    """A conversation up to where an answer begins. ``shaped``, ``tools``: as they were given to the template;
    ``native``: with calls in its own form; ``absent``: what it left out, as `said.missing` tells.
    """

    text: str
    shaped: list[Message]
    tools: list[Message] | None
    native: bool
    absent: dict[str, str]


@dataclass(frozen=True)
class Texts:
    """A row as text, typed special tokens masked.

    Attributes:
        masks: the table that `str.translate` undoes the masks with.
        changes: what was left out, one reason each; refused: why the row cannot be trained on, "" if it can.
        thought: whether the answer has one (also if it is not trained).
    """

    prompt: str
    completion: str
    masks: dict[int, str]
    changes: tuple[str, ...] = ()
    refused: str = ""
    thought: bool = False


class Frame:
    """What a tokenizer's template supports, and the texts of rows and chats through it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.eos_token is None:
            raise ModelError(
                "The model's tokenizer has no end-of-sequence token (eos_token), so answers would never end. Choose "
                "an instruct model, or set eos_token in its tokenizer_config.json."
            )
        self._tokenizer = weakref.proxy(tokenizer)
        self._has_template, self._parts = bool(tokenizer.chat_template), False
        self.eos = str(tokenizer.eos_token)
        self.tokens = Tokens(cast("PreTrainedTokenizerBase", self._tokenizer))
        self._parts = parts_only(self.apply)
        self.support = probe(self.apply)
        self.thoughts = learn(self.apply)

    def apply(
        self,
        messages: list[Message],
        tools: list[Message] | None,
        generation: bool,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """A conversation through the template, in the tokenizer's own words."""
        if not self._has_template:
            return chatml(messages, tools, generation)
        if self._parts:
            messages = [
                m if isinstance(m["content"], list) else {**m, "content": as_parts(m["content"])} for m in messages
            ]
        template = self._tokenizer.get_chat_template(None, tools)
        given = {**self._tokenizer.special_tokens_map, **(variables or {})}
        return bounded_template.render(template, messages, tools, generation, **given)

    def chat(
        self, messages: list[Message], tools: list[Message] | None, style: Style
    ) -> tuple[str, dict[int, str], dict[str, str]]:
        """The prompt of a conversation that the model is to answer, its masks, and what was left out."""
        (shown, told), masks = self.tokens.mask([[thoughts.parted(m) for m in messages], tools])
        mode = _CHAT[style.thinking]
        asked = self._ask(shown, told, mode, style, "this conversation")
        return self._closed(asked, told, mode) if mode == "off" else asked.text, masks, asked.absent

    def texts(self, row: Row, style: Style) -> Texts:
        """Prompt and completion of a row.

        Raises:
            DataError: the template refuses the row in every form we know.
        """
        given = [[thoughts.parted(m) for m in row.prompt], thoughts.parted(row.completion[0]), row.tools]
        (messages, answer, tools), masks = self.tokens.mask(given)
        has_thought, changes = thoughts.KEY in answer, []
        if has_thought and style.thinking == "off":
            answer, has_thought = {k: v for k, v in answer.items() if k != thoughts.KEY}, False
            changes.append(NO_THOUGHT)
        mode: Mode = "on" if has_thought or style.thinking == "on" else "off"
        what = f"Line {row.line}: the model's chat template rejects this row"
        asked = self._ask(messages, tools, mode, style, what)
        body: str | None
        if has_thought:
            prompt, body = asked.text, self._thought(asked, answer, style, what)
        else:
            prompt, body = self._closed(asked, tools, mode), self._plain(asked, answer, tools, mode, style, what)
            if body is None:  # a call, say, where the frame of plain answers leads to none: the model has to choose
                asked = self._ask(messages, tools, "on", style, what)
                prompt, body = asked.text, self._plain(asked, answer, tools, "on", style, what, opened=True)
        body = body or ""
        refused = "" if said.of_answer(body, answer) else ANSWER_CUT
        end = body.rfind(self.eos)
        body = body[: end + len(self.eos)] if end >= 0 else body + self.eos
        if has_thought and not style.train_thoughts:
            cut = self._answer_at(body, answer[thoughts.KEY].strip())
            prompt, body = prompt + body[:cut], body[cut:]
        changes += [LEFT_OUT.format(name) for name in asked.absent]
        return Texts(prompt, body, masks, tuple(changes), refused, has_thought)

    # ---- the prompt

    def _ask(self, messages: list[Message], tools: list[Message] | None, mode: Mode, style: Style, what: str) -> Asked:
        """The conversation in the first form in which the template leaves nothing out, or the least."""
        best, refused = None, None
        for shaped, given, native in shapes(messages, tools, self.support):
            shaped = self.thoughts.handed(shaped)
            try:
                text = self.apply(shaped, given, True, SWITCH[mode] | style.variables)
            except KTOError:  # not a refusal: it took too much, or was cancelled
                raise
            except Exception as e:  # templates raise what they like
                refused = refused or e
                continue
            absent = said.missing(text, messages, tools)
            found = Asked(text, shaped, given, native, absent)
            if not absent.keys() - {said.THOUGHT}:
                return found
            if best is None or len(absent) < len(best.absent):
                best = found
        if best is None:
            raise _rejected(what, refused)
        return best

    def _closed(self, asked: Asked, tools: list[Message] | None, mode: Mode) -> str:
        """The prompt of an answer without a thought."""
        return self.thoughts.closed(asked.text, mode, self._is_special, bool(tools))

    def _is_special(self, text: str) -> bool:
        return any(special for _, special in self.tokens.pieces(text))

    # ---- the answer

    def _plain(
        self,
        asked: Asked,
        answer: Message,
        tools: list[Message] | None,
        mode: Mode,
        style: Style,
        what: str,
        opened: bool = False,
    ) -> str | None:
        """What the template writes of an answer without a thought; None: it does not follow the closed prompt."""
        plain = self.thoughts.plain[mode]
        closed = not opened and self.thoughts.closes(plain, self._is_special, bool(tools))
        best = None
        for body in self._bodies(asked, answer, mode, style, plain.tail, what):
            if closed and body.startswith(plain.frame):
                body = body[len(plain.frame) :]
            elif closed and not thoughts.EMPTY.search(plain.frame):
                return None
            if said.of_answer(body, answer):
                return body
            best = body if best is None else best
        return best

    def _thought(self, asked: Asked, answer: Message, style: Style, what: str) -> str:
        """What the template writes of an answer with a thought; where it cuts the thought, put before the answer."""
        if self.thoughts.kind != "cut":
            for body in self._bodies(asked, answer, "on", style, self.thoughts.tail, what):
                if said.of_answer(body, answer):
                    return body
        rest = {k: v for k, v in answer.items() if k != thoughts.KEY}
        body = self._plain(asked, rest, None, "on", style, what) or ""
        own = self.thoughts
        opening, middle = (own.opening, own.middle) if own.kind == "cut" else (thoughts.OPEN, thoughts.CLOSE)
        opening = "" if thoughts.OPENS.search(asked.text) else opening
        return f"{opening}{answer[thoughts.KEY].strip()}{middle}{body}"

    def _bodies(self, asked: Asked, answer: Message, mode: Mode, style: Style, tail: str, what: str) -> Iterator[str]:
        """The text after the generation prompt (but for its ``tail``), for each form of the answer.

        Raises:
            DataError: the template refuses all of them.
        """
        variables = SWITCH[mode] | style.variables
        refused, none = None, True
        for shaped in answers(answer, self.support, asked.native):
            handed = self.thoughts.handed([shaped])
            for history, before in self._contexts(asked, variables):
                try:
                    whole = self.apply([*history, *handed], asked.tools, False, variables)
                except KTOError:
                    raise
                except Exception as e:
                    refused = refused or e
                    continue
                base = before[: len(before) - len(tail)] if tail and before.endswith(tail) else before
                if whole.startswith(base):
                    none = False
                    yield whole[len(base) :]
                    break
        if none and (end := self.thoughts.plain[mode]).found and not answer.get("tool_calls"):
            yield (answer.get("content") or "") + end.end
        elif none:
            raise _rejected(what, refused)

    def _contexts(self, asked: Asked, variables: dict[str, Any]) -> Iterator[tuple[list[Message], str]]:
        """(messages, their prompt): the row's own, and a short one that no template writes anew once it is answered."""
        yield asked.shaped, asked.text
        try:
            yield [QUESTION], self.apply([QUESTION], asked.tools, True, variables)
        except KTOError:
            raise
        except Exception:  # a template that wants a system prompt, say
            return

    def _answer_at(self, body: str, thought: str) -> int:
        """Where the answer begins after its thought."""
        end = body.find(thought) + len(thought)
        return end + len(os.path.commonprefix((self.thoughts.middle, body[end:])))


def _rejected(what: str, refused: Exception | None) -> DataError:
    if what.startswith("Line"):
        text = f"{what}: {shorten(str(refused), 200)}. Fix the row, or choose another model."
    else:
        text = f"The model's chat template rejects {what}: {shorten(str(refused), 200)}"
    error = DataError(text)
    error.__cause__ = refused
    return error
