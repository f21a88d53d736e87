"""Any known row shape -> messages and a label; pure, standard library only.

Shapes: ``prompt``/``completion``/``label``; ``conversations`` or ``messages`` + ``label``; ``chosen``/``rejected``,
with or without a prompt, which give two rows. Texts are strings, one message or lists of messages, in role/content or
ShareGPT's from/value. The last assistant turn is the completion, everything before it the prompt. This module knows
nothing of files, templates or tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .turns import DroppedRow, call_name, parse_label, read_tools, read_turns, shorten, unpack

__all__ = [
    "COLUMNS", "WANTED", "DroppedRow", "Row", "call_name", "parse", "parse_all", "parse_label", "shorten",
    "to_chatml", "to_trl",
]  # fmt: skip

WANTED = "prompt, completion and label; or conversations (or messages) and label; or chosen and rejected"

COLUMNS = frozenset(("prompt", "completion", "label", "conversations", "messages", "chosen", "rejected", "tools"))
_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # Anthropic's hh-rlhf writes a whole talk into one string


@dataclass(frozen=True, slots=True)
class Row:
    """One KTO example.

    Attributes:
        prompt: messages ``{"role", "content", optional "tool_calls", "name", "tool_call_id", …}``, never empty.
        completion: one assistant message; its content may be None if it has tool_calls.
        label: True desirable, False undesirable.
        line: 1-based line (JSONL, CSV) or row number in the source.
        tools: JSON schemas of the tools the model was offered.
        extra: the other columns.
    """

    prompt: list[dict]
    completion: list[dict]
    label: bool
    line: int
    tools: list[dict] | None = None
    extra: dict = field(default_factory=dict)


def parse(obj: dict, line: int) -> tuple[list[Row], str, list[str]]:
    """Rows, name of the format, and names of the changes made.

    One side of a pair that cannot be used is left out and named among the changes.

    Raises:
        DroppedRow: no row can be made of it.
    """
    parsed, form, changes = parse_all(obj, line)
    rows = [r for r in parsed if isinstance(r, Row)]
    lost = [r for r in parsed if isinstance(r, DroppedRow)]
    if not rows:
        raise lost[0]
    return rows, form, changes + [f"one side left out: {r.reason}" for r in lost]


def parse_all(obj: object, line: int) -> tuple[list[Row | DroppedRow], str, list[str]]:
    """Like `parse`, but all KTO rows the object stands for are there (two for a pair), each a Row or its DroppedRow."""
    if not isinstance(obj, dict):
        return [DroppedRow("not an object", shorten(obj))], "", []
    changes: list[str] = []
    form, used = _form(obj)
    if form is None:
        return [DroppedRow("wrong columns", ", ".join(map(str, list(obj)[:12])) or "none")], "", []
    if form == "pair":
        return _pair(obj, line, used, changes)
    sharegpt = False
    try:
        label = parse_label(obj.get("label"))
        if form == "prompt/completion/label":
            prompt = read_turns(obj["prompt"], "user", "prompt", changes)
            turns = prompt + read_turns(obj["completion"], "assistant", "completion", changes)
            least = len(prompt)
        else:
            value = unpack(obj[used], used)
            sharegpt = isinstance(value, list) and any(isinstance(m, dict) and "from" in m for m in value)
            turns, least = read_turns(value, None, used, changes), 0
        tools = read_tools(obj.get("tools"))
        row = _row(turns, least, label, line, tools, _extra(obj, (used,), changes), obj, changes)
    except DroppedRow as e:
        row = e
    return [row], form + (" (ShareGPT)" if sharegpt else ""), list(dict.fromkeys(changes))


def _form(obj: dict) -> tuple[str | None, str]:
    """Name of the shape, and the column of the messages ("" for none).

    A table of several shapes has all columns in every row: those without a value count only if no shape has its values.
    """
    for there in ({c for c, value in obj.items() if value not in (None, "")}, obj.keys()):
        if "chosen" in there and "rejected" in there:
            return "pair", next((c for c in ("prompt", "conversations", "messages") if obj.get(c) is not None), "")
        if "prompt" in there and "completion" in there:
            return "prompt/completion/label", ""
        for column in ("conversations", "messages"):
            if column in there:
                return f"{column}/label", column
    return None, ""


# --- rows -------------------------------------------------------------------------------------------------------------


def _row(turns, least, label, line, tools, extra, obj, changes) -> Row:
    """A row of a whole conversation; the completion is the last assistant turn at or after ``least``."""
    last = next((i for i in range(len(turns) - 1, least - 1, -1) if turns[i]["role"] == "assistant"), None)
    if last is None:
        raise DroppedRow("no assistant turn")
    if last < len(turns) - 1:
        changes.append("turns after the last assistant turn left out")
    completion, prompt = turns[last], turns[:last]
    if not (completion["content"] or "").strip() and "tool_calls" not in completion:
        raise DroppedRow("empty completion")
    system = obj.get("system")
    if isinstance(system, str) and not any(m["role"] == "system" for m in prompt):
        extra = {k: v for k, v in extra.items() if k != "system"}
        if system.strip():
            prompt = [{"role": "system", "content": system}, *prompt]
            changes.append("system column put before the prompt")
    if not prompt:
        prompt = [{"role": "user", "content": ""}]
        changes.append("no prompt: an empty user turn put before the completion")
    return Row(prompt, [completion], label, line, tools, extra)


def _extra(obj: dict, used: tuple[str, ...], changes: list[str], pair: bool = False) -> dict:
    """The other columns. One whose name means something in our saved forms is renamed, so that it survives them."""
    if pair:
        taken = {"chosen", "rejected", "tools", *used}
    elif used == ("",):
        taken = {"prompt", "completion", "label", "tools"}
    else:
        taken = {"label", "tools", *used}
    extra = {}
    for key, value in obj.items():
        if key in taken:
            continue
        if key in COLUMNS:
            if value in (None, ""):
                continue
            renamed = f"original_{key}"
            while renamed in obj:
                renamed += "_"
            changes.append(f"column {key} renamed to {renamed}")
            key = renamed
        extra[key] = value
    return extra


def _pair(obj: dict, line: int, used: str, changes: list[str]):
    """The two rows of a chosen/rejected pair, each a Row or its DroppedRow."""
    form = "prompt/chosen/rejected" if used else "chosen/rejected"
    sides = [obj["chosen"], obj["rejected"]]
    if any(_is_sharegpt(v) for v in (*sides, obj.get(used))):
        form += " (ShareGPT)"
    try:
        base = read_turns(_maybe_messages(obj[used], used), "user", used, changes) if used else []
        tools = read_tools(obj.get("tools"))
    except DroppedRow as e:
        return [e, e], form, changes
    if not used and all(isinstance(s, str) for s in sides):
        sides = _without_prompt(*sides, changes)
    extra = _extra(obj, (used,), changes, pair=True)
    rows: list[Row | DroppedRow] = []
    for column, value, label in (("chosen", sides[0], True), ("rejected", sides[1], False)):
        try:
            turns, least = _join(base, read_turns(value, "assistant", column, changes))
            rows.append(_row(turns, least, label, line, tools, extra, obj, changes))
        except DroppedRow as e:
            rows.append(e)
    return rows, form, list(dict.fromkeys(changes))


def _maybe_messages(value: object, column: str) -> object:
    return value if column == "prompt" else unpack(value, column)


def _is_sharegpt(value: object) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and "from" in first


def _join(base: list[dict], side: list[dict]) -> tuple[list[dict], int]:
    """Prompt and answer as one conversation, and how many turns of it cannot be the completion.

    Many sets repeat the prompt in ``chosen``: what overlaps is taken once.
    """
    n = len(base)
    if n and any(side[i : i + n] == base for i in range(len(side) - n + 1)):
        return side, 0
    k = next((k for k in range(min(n, len(side)), 0, -1) if base[-k:] == side[:k]), 0)
    return base + side[k:], n


def _without_prompt(chosen: str, rejected: str, changes: list[str]) -> list:
    """Sides of a pair of strings that have their prompt in them: hh-rlhf's turns, or else their common beginning."""
    if all(_HH_TURN.match(s) for s in (chosen, rejected)):
        changes.append("Human:/Assistant: text read as turns")
        return [_hh(chosen), _hh(rejected)]
    n = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), -1)
    cut = max(chosen.rfind(" ", 0, n), chosen.rfind("\n", 0, n)) + 1 if n > 0 else 0  # at a word's beginning
    prompt = chosen[:cut].strip()
    if not prompt:
        return [chosen, rejected]
    changes.append("prompt taken from the common beginning of chosen and rejected")
    asked = {"role": "user", "content": prompt}
    return [[asked, {"role": "assistant", "content": s[cut:].lstrip()}] for s in (chosen, rejected)]


def _hh(text: str) -> list[dict]:
    parts = _HH_TURN.split(text)[1:]
    return [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


# --- saved forms ------------------------------------------------------------------------------------------------------


def to_trl(row: Row) -> dict:
    """TRL's conversational unpaired preference row: prompt, completion, label (tools, extra columns)."""
    return {"prompt": row.prompt, "completion": row.completion, **_rest(row)}


def to_chatml(row: Row) -> dict:
    """conversations (prompt and completion), label (tools, extra columns)."""
    return {"conversations": row.prompt + row.completion, **_rest(row)}


def _rest(row: Row) -> dict:
    tools = {"tools": row.tools} if row.tools else {}
    return {"label": row.label, **tools, **row.extra}
