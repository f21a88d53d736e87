"""The columns of a data set as its owner names them: ``prompt=question,completion=answer,label=rating``.

A map is a text where people write or keep it, and a dict (what a row needs -> the data set's column) where it is used.
"""

from __future__ import annotations

import difflib
import json
import re

TARGETS = {  # what a row is made of: what each of it is
    "prompt": "the question, or the turns before the answer",
    "completion": "the answer",
    "label": "whether the answer is good",
    "messages": "a conversation that ends in the answer",
    "chosen": "the better answer of a pair",
    "rejected": "the worse answer of a pair",
    "system": "the system prompt",
    "history": "turns before the prompt",
    "tools": "definitions of tools",
}
EXAMPLE = "--map prompt=question,completion=answer,label=rating"
_NEXT = re.compile(r",(?=\s*\w+\s*=)")  # a comma before another TARGET=, so that columns may have commas


def parse(text: str) -> dict[str, str]:
    """Target -> column; {} of an empty text.

    Raises:
        ValueError: a target that is not known or is given twice, or no column; one sentence that says what to do.
    """
    if text.lstrip().startswith("{"):
        try:
            pairs = [(str(k), str(v)) for k, v in json.loads(text).items()]
        except (ValueError, RecursionError):
            raise ValueError(f"map: must be TARGET=COLUMN, separated by commas, for example {EXAMPLE}.") from None
    else:
        pairs = [(t.strip(), c.strip()) for t, _, c in (p.partition("=") for p in _NEXT.split(text) if p.strip())]
    found: dict[str, str] = {}
    for target, column in pairs:
        if target not in TARGETS:
            near = difflib.get_close_matches(target, TARGETS, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"map: {target[:60]!r} is none of {', '.join(TARGETS)}.{hint} Write it as in {EXAMPLE}.")
        if not column:
            raise ValueError(f"map: {target} has no column. Write it as in {EXAMPLE}.")
        if target in found or column in found.values():
            twice = target if target in found else column
            raise ValueError(f"map: {twice[:60]} is given twice. Name each target and each column once.")
        found[target] = column
    return found


def written(columns: dict[str, str]) -> str:
    """The text that `parse` reads as ``columns``; "" of an empty map."""
    text = ",".join(f"{target}={column}" for target, column in columns.items())
    try:
        return text if parse(text) == columns else json.dumps(columns, ensure_ascii=False)
    except ValueError:  # a column with a blank at its end, or with ",label=" in its name
        return json.dumps(columns, ensure_ascii=False)


def wrong(text: str) -> str:
    """Why a text is no map, in a sentence; "" if it is one."""
    try:
        parse(text)
    except ValueError as e:
        return str(e)
    return ""
