"""What the model sees: a row or a chat through the model's own chat template, as text and as token ids.

The only place that applies a chat template. Holds for every row: the prompt is a prefix of the whole; the prompt ends
where the answer is to begin; the completion ends with EOS; there is one BOS if the tokenizer puts one; the text of
a special token that somebody typed inside a message stays text.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kto_core.data.records.rows import Row
from kto_core.jobs import Progress, check_cancel, no_progress

from . import bounded_template
from .frame import Frame, Texts
from .style import PLAIN, Style
from .thinking import Thoughts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 512  # rows encoded at once
_frames: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, Frame]] = weakref.WeakKeyDictionary()


@dataclass
class Rendered:
    """``prompt + completion`` is the whole text; the completion ends with the EOS token's text.

    ``special``: (start, end) of each real special token in the whole text; the same letters elsewhere are plain text.
    """

    prompt: str
    completion: str
    special: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Encoded:
    """Token ids of a row.

    Attributes:
        fate: "ok"; "truncated": the prompt was cut from the left; "too_long": the completion alone does not fit;
            "refused": the template cuts the answer, and ``refused`` says so (nothing was cut; do not train on either).
        length: tokens of prompt and completion before cutting.
        whole_prompt: the prompt before it was cut, None if it was not: how much is cut depends on the completion, so
            only this tells whether two rows have the same prompt.
        changes: what of the row is left out, one reason each; thought: whether its answer has one.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    fate: str
    length: int
    whole_prompt: list[int] | None = None
    changes: tuple[str, ...] = ()
    refused: str = ""
    thought: bool = False

    @property
    def trained(self) -> bool:
        return self.fate in ("ok", "truncated")


def render(row: Row, tokenizer: PreTrainedTokenizerBase, style: Style = PLAIN) -> Rendered:
    """A row as text.

    Raises:
        DataError: the template refuses the row in every form we know.
        ModelError: the tokenizer has no EOS token.
    """
    frame = _frame(tokenizer)
    shown = frame.texts(row, style)
    prompt, completion, masks = shown.prompt, shown.completion, shown.masks
    spans, at, text = [], 0, prompt + completion
    for piece, special in frame.tokens.pieces(text):
        size = len(piece.translate(masks))
        if special:
            spans.append((at, at + size))
        at += size
    return Rendered(prompt.translate(masks), completion.translate(masks), spans)


def encode(
    row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, style: Style = PLAIN
) -> Encoded:
    """A row as token ids, at most ``max_length`` of them. Raises like `render`."""
    return next(encode_iter([row], tokenizer, max_length, style=style))


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
    style: Style = PLAIN,
) -> list[Encoded]:
    """`encode` for all rows, many at once. Same order, same length."""
    return list(encode_iter(rows, tokenizer, max_length, progress, cancel, style))


def encode_iter(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
    style: Style = PLAIN,
) -> Iterator[Encoded]:
    """`encode_rows` without holding all ids at once."""
    with bounded_template.cancelled_by(cancel):
        frame = _frame(tokenizer)
    for start in range(0, len(rows), _CHUNK):
        check_cancel(cancel)
        progress(start / len(rows), f"Tokenizing: {start:,} of {len(rows):,} rows")
        with bounded_template.cancelled_by(cancel):
            texts = [frame.texts(rows[i], style) for i in range(start, min(start + _CHUNK, len(rows)))]
            encoded = frame.tokens.ids([(t.prompt, t.completion, t.masks) for t in texts])
        for (prompt_ids, completion_ids), text in zip(encoded, texts, strict=True):
            yield _noted(_fit(prompt_ids, completion_ids, max_length, frame.tokens.bos_id), text)


def render_chat(
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    tools: list[dict[str, Any]] | None = None,
    style: Style = PLAIN,
) -> list[int]:
    """Token ids of a conversation that the model is to answer. Raises like `render`."""
    frame = _frame(tokenizer)
    text, masks, _ = frame.chat(messages, tools, style)
    return frame.tokens.prompt_ids(text, masks)


def thoughts_of(tokenizer: PreTrainedTokenizerBase) -> tuple[Thoughts, Collection[str]]:
    """What the tokenizer's chat template does with thoughts, and the texts of its special tokens."""
    frame = _frame(tokenizer)
    return frame.thoughts, frame.tokens.special


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template writes today's date into prompts."""
    frame = _frame(tokenizer)
    talk = [{"role": "user", "content": "Hello"}]
    return frame.chat(talk, None, Style(began=0.0)) != frame.chat(talk, None, PLAIN)


def _noted(encoded: Encoded, text: Texts) -> Encoded:
    encoded.changes, encoded.thought = text.changes, text.thought
    if text.refused:
        encoded.fate, encoded.refused = "refused", text.refused
    return encoded


def _fit(prompt: list[int], completion: list[int], max_length: int | None, bos: int | None) -> Encoded:
    length = len(prompt) + len(completion)
    if not max_length or length <= max_length:
        return Encoded(prompt, completion, "ok", length)
    keep = max_length - len(completion)
    if keep < 1:  # the first token of the completion needs one before it
        return Encoded(prompt, completion, "too_long", length)
    cut = prompt[-keep:]
    if keep > 1 and bos is not None and prompt[0] == bos and bos not in prompt[1:]:
        cut = [bos, *cut[1:]]  # a real BOS, not ChatML's <|im_start|>, stays at the head
    return Encoded(cut, completion, "truncated", length, prompt)


def _frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """The tokenizer's Frame, made once for each of its templates."""
    template = tokenizer.chat_template
    made = _frames.get(tokenizer)
    if made is None or made[0] != template:
        made = _frames[tokenizer] = (template, Frame(tokenizer))
    return made[1]
