"""What the model sees: a row or a chat through the model's own chat template, as text and as token ids.

The only place that applies a chat template. Holds for every row: the prompt is a prefix of the whole; the prompt ends
where the answer is to begin; the completion ends with EOS; there is one BOS if the tokenizer puts one; the text of
a special token that somebody typed inside a message stays text.
"""

from __future__ import annotations

import os
import re
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from .errors import DataError, ModelError
from .jobs import Progress, check_cancel, no_progress
from .messages import chatml, probe, shapes
from .rows import Row, shorten

_CHUNK = 512  # rows encoded at once
_MASKS = range(0xF0000, 0xFFFFE)  # a private plane of Unicode: stands for typed special tokens while rendering
_lock = threading.Lock()  # a tokenizer's "special tokens are text" switch is shared by all its users
_frames: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


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
        fate: "ok"; "truncated": the prompt was cut from the left; "too_long": the completion alone does not fit
            (nothing was cut; do not train on it).
        length: tokens of prompt and completion before cutting.
        whole_prompt: the prompt before it was cut, None if it was not: how much is cut depends on the completion, so
            only this tells whether two rows have the same prompt.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    fate: str
    length: int
    whole_prompt: list[int] | None = None


def render(row: Row, tokenizer) -> Rendered:
    """A row as text.

    Raises:
        DataError: the template refuses the row in every form we know.
        ModelError: the tokenizer has no EOS token.
    """
    frame = _frame(tokenizer)
    prompt, completion, masks = frame.texts(row)
    spans, at, text = [], 0, prompt + completion
    for piece, special in frame.pieces(text):
        size = len(piece.translate(masks))
        if special:
            spans.append((at, at + size))
        at += size
    return Rendered(prompt.translate(masks), completion.translate(masks), spans)


def encode(row: Row, tokenizer, max_length: int | None = None) -> Encoded:
    """A row as token ids, at most ``max_length`` of them. Raises like `render`."""
    return next(encode_iter([row], tokenizer, max_length))


def encode_rows(
    rows: Sequence[Row],
    tokenizer,
    max_length: int | None = None,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> list[Encoded]:
    """`encode` for all rows, many at once. Same order, same length."""
    return list(encode_iter(rows, tokenizer, max_length, progress, cancel))


def encode_iter(
    rows: Sequence[Row],
    tokenizer,
    max_length: int | None = None,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> Iterator[Encoded]:
    """`encode_rows` without holding all ids at once."""
    frame = _frame(tokenizer)
    for start in range(0, len(rows), _CHUNK):
        check_cancel(cancel)
        progress(start / len(rows), f"Tokenizing: {start:,} of {len(rows):,} rows")
        for prompt_ids, completion_ids in frame.ids([rows[i] for i in range(start, min(start + _CHUNK, len(rows)))]):
            yield _fit(prompt_ids, completion_ids, max_length, frame.bos_id)


def render_chat(messages: list[dict], tokenizer, tools: list[dict] | None = None) -> list[int]:
    """Token ids of a conversation that the model is to answer. Raises like `render`."""
    frame = _frame(tokenizer)
    typed, masks = frame.mask([messages, tools])
    messages, tools = typed
    refused: Exception | None = None
    for shaped, given in shapes(messages, tools, frame.support):
        try:
            return frame.prompt_ids(frame.apply(shaped, given, True), masks)
        except Exception as e:
            refused = refused or e
    raise DataError(f"The model's chat template refuses this conversation: {shorten(str(refused), 200)}") from refused


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


def _frame(tokenizer) -> _Frame:
    """The tokenizer's _Frame, made once for each of its templates."""
    template = tokenizer.chat_template
    made = _frames.get(tokenizer)
    if made is None or made[0] != template:
        made = _frames[tokenizer] = (template, _Frame(tokenizer))
    return made[1]


class _Frame:
    """A tokenizer with its chat template: what it supports, its special tokens, its BOS and EOS."""

    def __init__(self, tokenizer):
        if tokenizer.eos_token is None:
            raise ModelError(
                "The model's tokenizer has no end-of-text token (eos_token), so an answer could never end. "
                "Choose an instruct model, or set eos_token in its tokenizer_config.json."
            )
        self._tokenizer = weakref.proxy(tokenizer)
        self._has_template = bool(tokenizer.chat_template)
        self.eos = str(tokenizer.eos_token)
        known = {t.content: t for t in tokenizer.added_tokens_decoder.values() if t.special}
        self._ids = {text: tokenizer.convert_tokens_to_ids(text) for text in {*known, *tokenizer.all_special_tokens}}
        self._lstrip = {text for text, t in known.items() if t.lstrip}
        self._rstrip = {text for text, t in known.items() if t.rstrip}
        longest_first = sorted(self._ids, key=lambda t: (-len(t), t))
        self._special = re.compile("|".join(map(re.escape, longest_first)))
        self.bos_id = tokenizer.bos_token_id
        with_bos = tokenizer("a", add_special_tokens=True)["input_ids"]
        without = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._adds_bos = self.bos_id is not None and with_bos[:1] == [self.bos_id] and without[:1] != [self.bos_id]
        self._anchors: dict[str, list[int]] = {}
        self.support = probe(self.apply)

    # --- text ---

    def apply(self, messages: list[dict], tools: list[dict] | None, generation: bool) -> str:
        if not self._has_template:
            return chatml(messages, tools, generation)
        return self._tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=generation
        )

    def mask(self, value: object) -> tuple[object, dict[int, str]]:
        """``value`` with each special token typed in one of its strings replaced by one private character.

        Returns it with the table that `str.translate` undoes this with; empty if there was nothing to do.
        """
        if not any(self._special.search(s) for s in _strings(value)):
            return value, {}
        used = set("".join(_strings(value)))
        free = (c for c in _MASKS if chr(c) not in used)
        characters = {text: chr(next(free)) for text in sorted(self._ids)}
        masked = _map_strings(value, lambda s: self._special.sub(lambda m: characters[m[0]], s))
        return masked, {ord(c): text for text, c in characters.items()}

    def texts(self, row: Row) -> tuple[str, str, dict[int, str]]:
        """Prompt and completion of a row, typed special tokens masked, and the table to undo that."""
        (messages, tools), masks = self.mask([row.prompt + row.completion, row.tools])
        refused: Exception | None = None
        for shaped, given in shapes(messages, tools, self.support):
            try:
                whole = self.apply(shaped, given, False)
                asked = self.apply(shaped[:-1], given, True)
                cut = len(asked) if whole.startswith(asked) else self._boundary(whole, asked, shaped, given)
            except Exception as e:
                refused = refused or e
                continue
            completion = whole[cut:]
            end = completion.rfind(self.eos)
            completion = completion[: end + len(self.eos)] if end >= 0 else completion + self.eos
            return whole[:cut], completion, masks
        raise DataError(
            f"Line {row.line}: the model's chat template refuses this row: {shorten(str(refused), 200)}. "
            "Mend the row, or choose another model."
        ) from refused

    def _boundary(self, whole: str, asked: str, messages: list[dict], tools: list[dict] | None) -> int:
        """Where the answer begins in the whole text, for a template that asks in other words than it records.

        It begins after the turn's header as it stands in the whole text: no token of it may be lost to either side.
        """
        same = len(os.path.commonprefix((whole, asked)))
        before = self.apply(messages[:-1], tools, False)
        header = asked[len(before) :] if asked.startswith(before) else ""
        if same >= len(before) and header:
            marked = [*messages[:-1], {"role": "assistant", "content": "\ue000"}]
            content = self.apply(marked, tools, False).find("\ue000", len(before))
            return min(same, content) if content >= 0 else same
        if header and (at := whole.rfind(header)) >= 0:
            return at + len(header)
        answer = messages[-1].get("content")
        if answer and (at := whole.rfind(answer.strip())) >= 0:
            return at
        return same

    def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """Masked text cut at its special tokens: (piece, whether it is one)."""
        at = 0
        for m in self._special.finditer(text):
            if m.start() > at:
                yield text[at : m.start()], False
            yield m[0], True
            at = m.end()
        if at < len(text):
            yield text[at:], False

    # --- ids ---

    def ids(self, rows: Iterable[Row]) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, completion ids) of each row.

        A special token parts what is before it from what is after it, so the completion is encoded with the last
        special token of the prompt and what follows it only; prompts that rows share are encoded once.
        """
        texts = [self.texts(row) for row in rows]
        plain: dict[str, list[int]] = {}
        ends = []
        for prompt, completion, masks in texts:
            end = prompt[self._last_special(prompt) :]
            ends.append(end)
            if not masks:
                plain[prompt] = plain[end + completion] = []
            if end not in self._anchors and not masks:
                plain[end] = []
        for text, ids in zip(plain, self._encode(list(plain), False), strict=True):
            plain[text] = ids
        out = []
        for (prompt, completion, masks), end in zip(texts, ends, strict=True):
            if masks:
                prompt_ids, anchor, joined = (self._masked(t, masks) for t in (prompt, end, end + completion))
            else:
                if len(self._anchors) > 1000:
                    self._anchors.clear()
                anchor = self._anchors.get(end) or plain.get(end) or self._encode([end], False)[0]
                self._anchors[end] = anchor
                prompt_ids, joined = plain[prompt], plain[end + completion]
            whole = joined[: len(anchor)] == anchor
            # else a token straddles the border, and the answer is encoded as the model would have to say it
            completion_ids = joined[len(anchor) :] if whole else self._masked(completion, masks)
            out.append((self._with_bos(prompt_ids), completion_ids))
        return out

    def prompt_ids(self, text: str, masks: dict[int, str]) -> list[int]:
        return self._with_bos(self._masked(text, masks))

    def _with_bos(self, ids: list[int]) -> list[int]:
        return [self.bos_id, *ids] if self._adds_bos and ids[:1] != [self.bos_id] else ids

    def _last_special(self, text: str) -> int:
        """Where the last special token begins; 0 if there is none."""
        for start in (max(0, len(text) - 200), 0):
            found = [m.start() for m in self._special.finditer(text, start)]
            if found:
                return found[-1]
        return 0

    def _encode(self, texts: list[str], special_is_text: bool) -> list[list[int]]:
        if not texts:
            return []
        with _lock:
            return self._tokenizer(
                texts,
                add_special_tokens=False,
                split_special_tokens=special_is_text,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]

    def _masked(self, text: str, masks: dict[int, str]) -> list[int]:
        """Ids of a masked text: its own special tokens are special, what the masks stand for is text."""
        if not masks:
            return self._encode([text], False)[0]
        pieces = list(self.pieces(text))
        plain = []
        for i, (piece, special) in enumerate(pieces):
            if special:
                continue
            if i and pieces[i - 1][0] in self._rstrip:
                piece = piece.lstrip()
            if i + 1 < len(pieces) and pieces[i + 1][0] in self._lstrip:
                piece = piece.rstrip()
            plain.append(piece.translate(masks))
        encoded = iter(self._encode(plain, True))
        return [t for piece, special in pieces for t in ([self._ids[piece]] if special else next(encoded))]


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from _strings(k)
            yield from _strings(v)
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _strings(v)


def _map_strings(value, change):
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(k): _map_strings(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(v, change) for v in value]
    return value
