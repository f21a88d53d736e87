"""Argilla: records with their responses, nested (from its JSON) or flat (from its data sets)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kto_core.data.records.rows import DroppedRow

from .common import Importer, Item, Record, as_answer, at, dicts, exchange, is_correction, one, pick, rated

_WORDY = 4  # words; a longer text is no label


def _responses(obj: Record) -> dict[str, list[Any]]:
    """Question -> what people answered."""
    given = obj.get("responses")
    found: dict[str, list[Any]] = {}
    if isinstance(given, dict):  # version 2
        for name, said in given.items():
            found[str(name)] = [r["value"] for r in dicts(said) if r.get("value") is not None]
    for response in dicts(given) if isinstance(given, list) else ():  # version 1
        if response.get("status") != "discarded" and isinstance(values := response.get("values"), dict):
            for name, said in values.items():
                found.setdefault(str(name), []).append(at(said, "value"))
    for name, said in obj.items():
        if name.endswith(".responses") and isinstance(said, list):
            found[name.removesuffix(".responses")] = said
    return {name: said for name, values in found.items() if (said := [v for v in values if v is not None])}


def _records(obj: Record) -> Iterator[Item]:
    if obj.get("status") == "discarded":
        raise DroppedRow("discarded by its annotator")
    fields = obj.get("fields")
    flat = {k: v for k, v in obj.items() if "." not in k and k not in ("id", "status", "_server_id")}
    prompt, answer = exchange(fields if isinstance(fields, dict) else flat)
    verdicts: dict[str, Any] = {}
    comments: list[str] = []
    better: list[str] = []
    for name, values in _responses(obj).items():
        texts = [t for t in values if isinstance(t, str)]
        if texts and is_correction(name):
            better += texts
        elif texts and ("comment" in name.lower() or any(len(t.split()) > _WORDY for t in texts)):
            comments += texts
        elif all(isinstance(v, str | int | float) for v in values):
            verdicts[name] = values
    about = {"comment": "\n".join(comments), "metadata": obj.get("metadata")}
    yield from rated(prompt, answer, lambda: one(pick(verdicts)), map(as_answer, dict.fromkeys(better)), **about)


def _knows(obj: Record) -> bool:
    if isinstance(obj.get("fields"), dict):
        return "responses" in obj or "suggestions" in obj
    return any(isinstance(k, str) and k.endswith(".responses") for k in obj)


RECORDS = Importer("Argilla", _knows, _records)
