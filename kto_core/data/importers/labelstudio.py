"""Label Studio: tasks with annotations (JSON), or one flat object a task (JSON_MIN and CSV)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from kto_core.data.records.rows import DroppedRow, shorten

from .common import (
    Importer,
    Item,
    Record,
    as_answer,
    at,
    dicts,
    exchange,
    is_correction,
    number,
    one,
    pick,
    rated,
    record,
)  # fmt: skip

_SIDE = re.compile(r"(?:answer|response|completion|output|reply|text)s?[ _-]?(1|2|a|b|left|right)", re.IGNORECASE)
_OWN = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement")


class _Said:
    """What annotators said about one task."""

    def __init__(self) -> None:
        self.verdicts: dict[str, list[Any]] = {}
        self.sides: list[str] = []
        self.comments: list[str] = []
        self.better: list[str] = []

    def add(self, name: str, value: Record) -> None:
        """One result: its name, and the value as its control wrote it."""
        for kind in ("choices", "labels"):
            if isinstance(value.get(kind), list) and len(value[kind]) == 1:
                self.verdicts.setdefault(name, []).append(value[kind][0])
        for kind in ("rating", "number"):
            if number(value.get(kind)) is not None:
                self.verdicts.setdefault(name, []).append(value[kind])
        if isinstance(value.get("selected"), str):
            self.sides.append(value["selected"])
        if texts := value.get("text"):
            into = self.better if is_correction(name) else self.comments
            into += [t for t in (texts if isinstance(texts, list) else [texts]) if isinstance(t, str)]


def _task(obj: Record) -> tuple[Record, _Said]:
    said = _Said()
    for annotation in dicts(obj.get("annotations", obj.get("completions"))):
        if not annotation.get("was_cancelled"):
            for result in dicts(annotation.get("result")):
                if isinstance(result.get("value"), dict):
                    said.add(str(result.get("from_name")), result["value"])
    return obj["data"], said


def _flat(obj: Record) -> tuple[Record, _Said]:
    """The flat form does not tell data from results: texts of several words are data, unless a name says otherwise."""
    said, data = _Said(), {}
    for name, value in obj.items():
        if name in _OWN:
            continue
        if isinstance(value, dict) and {"choices", "rating", "selected", "text"} & value.keys():
            said.add(name, value)
        elif number(value) is not None and not isinstance(value, str):
            said.verdicts[name] = [value]
        elif isinstance(value, str) and is_correction(name):
            said.better.append(value)
        elif isinstance(value, str) and "comment" in name.lower():
            said.comments.append(value)
        elif isinstance(value, str) and re.search(
            "label|rating|verdict|quality|feedback|sentiment|choice", name.lower()
        ):
            said.verdicts[name] = [value]
        else:
            data[name] = value
    return data, said


def _records(obj: Record) -> Iterator[Item]:
    data, said = _task(obj) if isinstance(obj.get("data"), dict) else _flat(obj)
    about = {"comment": "\n".join(said.comments)}
    if said.sides:
        yield from _pair(data, one(said.sides), about)
        return
    prompt, answer = exchange(data)
    better = map(as_answer, dict.fromkeys(said.better))
    yield from rated(prompt, answer, lambda: one(pick(said.verdicts)), better, **about)


def _pair(data: Record, selected: str, about: dict[str, Any]) -> Iterator[Item]:
    sides = sorted(k for k in data if isinstance(k, str) and _SIDE.fullmatch(k))
    if len(sides) != 2 or selected not in ("left", "right"):
        raise DroppedRow("the two answers are not found", shorten(", ".join(map(str, data))))
    rest = {k: v for k, v in data.items() if k not in sides}
    for i, side in enumerate(sides):
        prompt, answer = exchange({**rest, "completion": data[side]})
        yield record(prompt, answer, (i == 0) == (selected == "left"), **about)


def _knows(obj: Record) -> bool:
    if isinstance(obj.get("data"), dict):
        first = at(obj, "annotations", 0) or at(obj, "completions", 0)
        return "annotations" in obj or (isinstance(first, dict) and "result" in first)
    return "annotation_id" in obj and ("annotator" in obj or "lead_time" in obj)


TASKS = Importer("Label Studio", _knows, _records)
