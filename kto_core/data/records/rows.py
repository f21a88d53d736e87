"""Any known row shape -> messages and a label; pure, standard library only.

Shapes: ``prompt``/``completion``/``label``; ``conversations`` or ``messages`` + ``label``, or a label for each answer;
``chosen``/``rejected``, with or without a prompt, which give two rows; and the names that other programs give to these
columns (`columns`). Texts are strings, one message or lists of messages, in role/content or ShareGPT's from/value, or
text that was rendered before. The last assistant turn is the completion, everything before it the prompt. This module
knows nothing of files, templates or tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .answers import alternatives
from .columns import COLUMNS, canonical, maybe_question
from .labels import COLUMNS as LABEL_COLUMNS
from .labels import PLAIN, Labels, may_be_many, of_answers, parse_label
from .sides import is_sharegpt, join, own_prompts, read_answer, read_question, say_trajectories, without_question
from .talks import from_pairs
from .turns import DroppedRow, call_name, read_tools, read_turns, shorten, unpack, untrained

__all__ = [
    "COLUMNS", "PLAIN", "WANTED", "DroppedRow", "Labels", "Row", "call_name", "parse", "parse_all", "parse_label",
    "shorten", "to_chatml", "to_trl",
]  # fmt: skip

WANTED = "prompt, completion and label; or conversations (or messages) and label; or chosen and rejected"

MOST_ANSWERS = 1000  # of one record


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

    prompt: list[dict[str, Any]]
    completion: list[dict[str, Any]]
    label: bool
    line: int
    tools: list[dict[str, Any]] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def parse(obj: dict[str, Any], line: int) -> tuple[list[Row], str, list[str]]:
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


def parse_all(obj: object, line: int, labels: Labels = PLAIN) -> tuple[list[Row | DroppedRow], str, list[str]]:
    """Like `parse`, but all KTO rows the object stands for are there (two for a pair), each a Row or its DroppedRow.

    ``labels``: how the labels and columns of its data set are read.
    """
    if not isinstance(obj, dict):
        return [DroppedRow("not an object", shorten(obj))], "", []
    changes: list[str] = []
    try:
        obj, source = canonical(obj, changes, labels.columns)
    except DroppedRow as e:
        return [e], "", []
    form, used = _form(obj)
    if form is None:
        return [DroppedRow("wrong columns", ", ".join(map(str, list(obj)[:12])) or "none")], "", []
    if form == "pair":
        rows, form = _pair(obj, line, used, changes)
    elif used:
        rows, form = _talk(obj, line, used, labels, changes)
    else:
        rows = [_answer(obj, line, labels, changes)]
    return rows, f"{form} from {source}" if source else form, list(dict.fromkeys(changes)) if changes else changes


def _form(obj: dict[str, Any]) -> tuple[str | None, str]:
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


def _answer(obj: dict[str, Any], line: int, labels: Labels, changes: list[str]) -> Row | DroppedRow:
    """The row of a prompt, a completion and a label."""
    try:
        label = labels.of(obj, changes)
        prompt, begun = read_question(obj["prompt"], "prompt", changes)
        side = read_answer(obj["completion"], "completion", begun, changes)
        n = len(prompt)
        turns = prompt + side if len(side) == 1 else join(prompt, side)[0]
        if len(side) > 1 and sum(m["role"] == "assistant" for m in turns[n:]) > 1:
            changes.append("only the last answer is trained")
        tools = read_tools(obj.get("tools"))
        return _row(turns, min(n, len(turns) - 1), label, line, tools, _extra(obj, ("",), changes), obj, changes)
    except DroppedRow as e:
        return e


def _talk(
    obj: dict[str, Any], line: int, used: str, labels: Labels, changes: list[str]
) -> tuple[list[Row | DroppedRow], str]:
    """The row of a whole conversation with a label, or one for each of its labelled answers."""
    form = f"{used}/label"
    try:
        value = unpack(obj[used], used)
        if pairs := from_pairs(value):
            value = pairs
            changes.append("pairs of question and answer read as turns")
        form += " (ShareGPT)" if is_sharegpt(value) else ""
        many = obj.get("label").__class__ is not bool and may_be_many(obj)
        label = not many and labels.of(obj, changes)
        turns = read_turns(value, None, used, changes)
        tools = read_tools(obj.get("tools"))
        extra = _extra(obj, (used,), changes)
        if many:
            answers = of_answers(obj, value, [m["role"] for m in turns], labels)
            return _answers(turns, answers, line, tools, extra, obj, changes), form
        return [_row(turns, 0, label, line, tools, extra, obj, changes)], form
    except DroppedRow as e:
        return [e], form


def _row(
    turns: list[dict[str, Any]],
    least: int,
    label: bool,
    line: int,
    tools: list[dict[str, Any]] | None,
    extra: dict[str, Any],
    obj: dict[str, Any],
    changes: list[str],
) -> Row:
    """A row of a whole conversation; the completion is the last assistant turn at or after ``least``."""
    last = -1
    for i in range(len(turns) - 1, least - 1, -1):
        if turns[i]["role"] == "assistant":
            last = i
            if not untrained(turns[i]):
                break
    if last < 0:
        raise DroppedRow("no assistant turn")
    if untrained(turns[last]):
        raise DroppedRow("every answer has weight 0")
    if last < len(turns) - 1:
        changes.append("turns after the last assistant turn left out")
    completion, prompt = turns[last], turns[:last]
    if not (completion["content"] or "").strip() and "tool_calls" not in completion:
        raise DroppedRow("empty completion")
    if all(m["role"] == "system" for m in prompt) and (found := maybe_question(obj)):
        raise DroppedRow("no prompt column", ", ".join(found))
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


def _answers(
    turns: list[dict[str, Any]],
    answers: dict[int, bool | DroppedRow],
    line: int,
    tools: list[dict[str, Any]] | None,
    extra: dict[str, Any],
    obj: dict[str, Any],
    changes: list[str],
) -> list[Row | DroppedRow]:
    """A row for each labelled answer of a conversation, with all turns before it as the prompt."""
    if not answers:
        return [DroppedRow("no label")]
    changes.append("a row made of each labelled answer")
    answers = {i: label for i, label in answers.items() if not untrained(turns[i])} or answers
    bare = [{k: v for k, v in m.items() if k not in LABEL_COLUMNS} for m in turns]
    rows: list[Row | DroppedRow] = []
    for i, label in answers.items():
        try:
            if isinstance(label, DroppedRow):
                raise label
            rows.append(_row(bare[: i + 1], i, label, line, tools, extra, obj, changes))
        except DroppedRow as e:
            rows.append(e)
    return rows


def _extra(obj: dict[str, Any], used: tuple[str, ...], changes: list[str], pair: bool = False) -> dict[str, Any]:
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


def _pair(obj: dict[str, Any], line: int, used: str, changes: list[str]) -> tuple[list[Row | DroppedRow], str]:
    """The rows of a chosen/rejected pair, one for each answer, each a Row or its DroppedRow."""
    form = "prompt/chosen/rejected" if used else "chosen/rejected"
    answers = [(c, v, c == "chosen") for c in ("chosen", "rejected") for v in alternatives(obj[c])]
    if any(is_sharegpt(v) for v in (*(v for _, v, _ in answers), obj.get(used))):
        form += " (ShareGPT)"
    if len(answers) > MOST_ANSWERS:
        return [DroppedRow(f"more than {MOST_ANSWERS} answers")], form
    try:
        value = obj[used] if used else None
        value = value if used == "prompt" else unpack(value, used)
        base, begun = read_question(value, used, changes) if used else ([], None)
        tools = read_tools(obj.get("tools"))
    except DroppedRow as e:
        return [e] * len(answers), form
    said: Sequence[object] = [v for _, v, _ in answers]
    texts = [v for v in said if isinstance(v, str)]
    if len(texts) == len(said) > 1:
        if base:
            said = without_question(base, said, changes)
        elif not maybe_question(obj):
            said = own_prompts(texts, changes)
    extra = _extra(obj, (used,), changes, pair=True)
    sides: list[tuple[list[dict[str, Any]], int] | DroppedRow] = []
    for value, (column, _, _) in zip(said, answers, strict=True):
        try:
            sides.append(join(base, read_answer(value, column, begun, changes)))
        except DroppedRow as e:
            sides.append(e)
    say_trajectories([s[0] for s in sides if not isinstance(s, DroppedRow)], changes)
    rows: list[Row | DroppedRow] = []
    for side, (_, _, label) in zip(sides, answers, strict=True):
        try:
            if isinstance(side, DroppedRow):
                raise side
            rows.append(_row(*side, label, line, tools, extra, obj, changes))
        except DroppedRow as e:
            rows.append(e)
    return rows, form


# --- saved forms ------------------------------------------------------------------------------------------------------


def to_trl(row: Row) -> dict[str, Any]:
    """TRL's conversational unpaired preference row: prompt, completion, label (tools, extra columns)."""
    return {"prompt": row.prompt, "completion": row.completion, **_rest(row)}


def to_chatml(row: Row) -> dict[str, Any]:
    """conversations (prompt and completion), label (tools, extra columns)."""
    return {"conversations": row.prompt + row.completion, **_rest(row)}


def _rest(row: Row) -> dict[str, Any]:
    tools = {"tools": row.tools} if row.tools else {}
    return {"label": row.label, **tools, **row.extra}
