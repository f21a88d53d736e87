"""Text to token ids: special tokens that a user typed stay text, prompts that rows share are encoded once."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MASKS = range(0xF0000, 0xFFFFE)  # a private plane of Unicode: stands for typed special tokens while rendering
_lock = threading.Lock()  # a tokenizer's "special tokens are text" switch is shared by all its users


class Tokens:
    """A tokenizer's special tokens, its BOS, and the ids of texts with and without them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        known = {t.content: t for t in tokenizer.added_tokens_decoder.values() if t.special}
        special = {*known, *tokenizer.all_special_tokens}
        self._ids: dict[str, Any] = {text: tokenizer.convert_tokens_to_ids(text) for text in special}
        self._lstrip = {text for text, t in known.items() if t.lstrip}
        self._rstrip = {text for text, t in known.items() if t.rstrip}
        longest_first = sorted(self._ids, key=lambda t: (-len(t), t))
        self._special = re.compile("|".join(map(re.escape, longest_first)))
        self.special = longest_first
        self.bos_id = tokenizer.bos_token_id
        with_bos = tokenizer("a", add_special_tokens=True)["input_ids"]
        without = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._adds_bos = self.bos_id is not None and with_bos[:1] == [self.bos_id] and without[:1] != [self.bos_id]
        self._anchors: dict[str, list[int]] = {}

    def mask(self, value: Any) -> tuple[Any, dict[int, str]]:
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

    def ids(self, texts: Sequence[tuple[str, str, dict[int, str]]]) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, completion ids) of each row, given as its prompt, its completion and the table of `mask`.

        A special token parts what is before it from what is after it, so the completion is encoded with the last
        special token of the prompt and what follows it only; prompts that rows share are encoded once.
        """
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
        """Ids of a masked text that begins a sequence: with BOS where the tokenizer puts one."""
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
            ids: list[list[int]] = self._tokenizer(
                texts,
                add_special_tokens=False,
                split_special_tokens=special_is_text,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
            return ids

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


def _map_strings(value: object, change: Callable[[str], str]) -> object:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(k): _map_strings(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(v, change) for v in value]
    return value
