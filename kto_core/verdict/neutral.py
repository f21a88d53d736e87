"""A text about everyday subjects that has nothing to do with anybody's rows: what a model forgot shows in it."""

from __future__ import annotations

from pathlib import Path

WINDOW = 256  # tokens that are read together: enough context, and every model and memory takes it
LEAST = 8  # tokens of a window that are worth a pass


def paragraphs() -> list[str]:
    """The text, one subject a paragraph."""
    text = Path(__file__).with_name("neutral.txt").read_text(encoding="utf-8")
    return [p.strip() for p in text.split("\n\n") if p.strip()]


def windows(tokenizer) -> list[tuple[list[int], list[int]]]:
    """(context, ids to predict) of all paragraphs, in windows of at most `WINDOW` tokens.

    The context is the token that the tokenizer begins every text with, else the window's own first one.
    """
    begin = tokenizer("a").input_ids[:1]
    begins = begin == [tokenizer.bos_token_id]
    found = []
    for paragraph in paragraphs():
        ids = tokenizer(paragraph, add_special_tokens=False).input_ids
        for start in range(0, len(ids), WINDOW - 1):
            part = ids[start : start + WINDOW - 1]
            if len(part) >= LEAST:
                found.append((begin, part) if begins else (part[:1], part[1:]))
    return found
