"""OpenAssistant: message trees, or their messages one by one.

Of the ranked answers to one message the best is desirable and the worst is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kto_core.data.records.rows import DroppedRow, shorten

from .common import Importer, Item, Record, Turn, at, dicts, number, record, text_at

_ROLES = {"prompter": "user", "assistant": "assistant"}


def _usable(m: Record) -> bool:
    return bool(text_at(m, "text").strip()) and not m.get("deleted") and m.get("review_result") is not False


def _records(obj: Record) -> Iterator[Item]:
    if not isinstance(obj.get("prompt"), dict):
        raise DroppedRow("a message of the chat is missing", shorten(obj.get("parent_id")))
    todo: list[tuple[Record, list[Turn]]] = [(obj["prompt"], [])]
    while todo:
        m, before = todo.pop()
        role = _ROLES.get(str(m.get("role")))
        if role is None:
            raise DroppedRow("role not understood", shorten(m.get("role")))
        path = [*before, {"role": role, "content": text_at(m, "text")}]
        replies = [r for r in dicts(m.get("replies")) if _usable(r)]
        todo += [(r, path) for r in reversed(replies)]
        if role == "user":
            yield from _ranked(path, [r for r in replies if number(r.get("rank")) is not None])


def _ranked(path: list[Turn], replies: list[Record]) -> Iterator[Item]:
    ranks = [r["rank"] for r in replies]
    if len(set(ranks)) < 2:
        return
    for r in replies:
        if r["rank"] not in (min(ranks), max(ranks)):
            yield DroppedRow("ranked between the best and the worst", f"rank {r['rank']}")
            continue
        about = {"rank": r["rank"], "quality": at(r, "labels", "quality", "value"), "lang": r.get("lang")}
        answer: Turn = {"role": "assistant", "content": text_at(r, "text")}
        yield record(path, [answer], r["rank"] == min(ranks), **about)


def _knows(obj: Record) -> bool:
    return "message_tree_id" in obj and ("prompt" in obj or "parent_id" in obj)


def _gather(items: Iterable[tuple[int, object]]) -> Iterator[tuple[int, object]]:
    """Messages that stand one by one as the trees that they are of; whole trees pass."""
    roots: list[tuple[int, Record]] = []
    replies: dict[str, list[Record]] = {}
    lost: dict[str, int] = {}  # parents of messages -> the line of one
    for line, obj in items:
        if not isinstance(obj, dict) or isinstance(obj.get("prompt"), dict) or "message_id" not in obj:
            yield line, obj
            continue
        if obj.get("parent_id") is None:
            roots.append((line, obj))
        else:
            parent = str(obj["parent_id"])
            replies.setdefault(parent, []).append(obj)
            lost.setdefault(parent, line)
    todo = [root for _, root in roots]
    while todo:
        m = todo.pop()
        m["replies"] = replies.pop(str(m["message_id"]), [])  # taken out: a circle has no root
        todo += m["replies"]
    for line, root in roots:
        yield line, {"message_tree_id": root.get("message_tree_id"), "prompt": root}
    for parent, left in replies.items():
        for _ in left:
            yield lost[parent], DroppedRow("a message of the chat is missing", shorten(parent))


TREES = Importer("OpenAssistant trees", _knows, _records, _gather)
