"""Helicone: requests with the bodies that were sent and received, and a thumb."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kto_core.data.records.rows import DroppedRow

from .common import Importer, Item, Record, answered, asked, at, number, pick, record, unwrapped


def _body(obj: Record, name: str) -> Any:
    for key in (f"{name}_body", f"{name}Body", name):
        found = unwrapped(obj.get(key))
        if isinstance(found, dict):
            return found.get("body", found)
    return None


def _verdict(obj: Record) -> Any:
    for rating in (obj.get("feedback_rating"), obj.get("feedbackRating"), at(obj, "feedback", "rating")):
        if rating is not None and rating != "":
            return rating
    scores = unwrapped(obj.get("scores"))
    found = {}
    for name, said in scores.items() if isinstance(scores, dict) else ():
        value = at(said, "value") if isinstance(said, dict) else said
        if isinstance(value, bool) or number(value) is not None:
            found[str(name)] = value
    return pick(found)


def _records(obj: Record) -> Iterator[Item]:
    request = _body(obj, "request")
    prompt, answer = asked(request), answered(_body(obj, "response"))
    if not prompt or not answer:
        why = "the bodies are not in this export" if request is None else "request, response"
        raise DroppedRow("no question and answer found", why)
    about = {"model": obj.get("request_model") or at(request, "model"), "tools": at(request, "tools")}
    yield record(prompt, answer, _verdict(obj), **about)


def _knows(obj: Record) -> bool:
    if "request_body" in obj and "response_body" in obj:
        return True
    return "feedback_rating" in obj and any(k in obj for k in ("request_id", "response_id", "request_created_at"))


REQUESTS = Importer("Helicone", _knows, _records)
