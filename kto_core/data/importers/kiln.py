"""Kiln: task runs, each with its output's rating and, if it was repaired, the better output."""

from __future__ import annotations

from collections.abc import Iterator

from kto_core.data.records.rows import DroppedRow, shorten
from kto_core.errors import DataError

from .common import Importer, Item, Record, Turn, as_answer, asked, at, corrected, number, record, text_at, turns

_THUMBS = ("pass_fail", "pass_fail_critical")  # 1 passes; 0 and −1 (critical) fail


def _records(obj: Record) -> Iterator[Item]:
    if obj.get("model_type", "task_run") != "task_run":
        raise DataError(
            f"This is Kiln's file of a {shorten(obj['model_type'], 30)}, which has no answers. Use the files named "
            "task_run.kiln, one a line in one JSONL file."
        )
    if obj.get("v", 1) != 1:
        raise DataError(
            f"This is a Kiln run of version {shorten(obj['v'], 20)}; version 1 is known. Convert it to rows."
        )
    prompt = asked(obj.get("input"))
    trace = turns(obj.get("trace"))
    if trace and trace[-1]["role"] == "assistant":
        prompt = trace[:-1]  # with the system prompt
    if not prompt:
        raise DroppedRow("no prompt")
    about = {
        "comment": obj.get("repair_instructions"),
        "model": at(obj, "output", "source", "properties", "model_name"),
        "tags": obj.get("tags"),
    }
    answer: Turn = {"role": "assistant", "content": text_at(obj, "output", "output")}
    if thought := text_at(obj, "intermediate_outputs", "reasoning"):
        answer["reasoning_content"] = thought
    rating = at(obj, "output", "rating")
    points, kind = number(at(rating, "value")), at(rating, "type")
    if points is None:
        yield DroppedRow("no label")
    elif kind in _THUMBS or kind == "five_star":
        yield record(prompt, [answer], points == 1 if kind in _THUMBS else points, **about)
    else:
        yield DroppedRow("label not understood", f"rating of type {shorten(kind, 30)}")
    if better := text_at(obj, "repaired_output", "output"):
        yield corrected(prompt, as_answer(better), **about)


def _knows(obj: Record) -> bool:
    kind = obj.get("model_type")
    if kind in ("task_run", "task", "project", "eval", "finetune", "prompt") and "v" in obj:
        return True
    return "input" in obj and isinstance(at(obj, "output", "output"), str) and (
        "rating" in obj["output"] or "repaired_output" in obj
    )  # fmt: skip


RUNS = Importer("Kiln", _knows, _records)
