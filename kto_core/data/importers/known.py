"""All importers, and which of them an object is for: found by content, never by a file's name."""

from __future__ import annotations

from collections.abc import Iterator

from kto_core.data.records.rows import DroppedRow

from . import argilla, helicone, kiln, labelstudio, langfuse, langsmith, librechat, openassistant, openwebui
from .common import UNRATED, Importer, Record

IMPORTERS: tuple[Importer, ...] = (
    openwebui.FEEDBACK, openwebui.CHATS, librechat.CHATS, openassistant.TREES, kiln.RUNS, argilla.RECORDS,
    labelstudio.TASKS, helicone.REQUESTS, langsmith.RUNS, langfuse.TRACES,
)  # fmt: skip


def find(obj: object) -> Importer | None:
    """The importer of an object; None for a plain row and for what no importer knows."""
    if not isinstance(obj, dict) or _is_row(obj):
        return None
    return next((i for i in IMPORTERS if i.knows(obj)), None)


def _is_row(obj: Record) -> bool:
    """Whether a record is in our own columns, whatever else it has."""
    if "chosen" in obj and "rejected" in obj:
        return True
    return "label" in obj and ("completion" in obj or "messages" in obj or "conversations" in obj)


def plain(obj: object) -> Iterator[object | DroppedRow]:
    """The plain records of one exported object; an object that no importer knows is given as it is.

    Raises:
        DataError: the version or form of the export is unknown.
    """
    importer = find(obj)
    if importer is None or not isinstance(obj, dict):
        yield obj
        return
    given = False
    try:
        for item in importer.records(obj):
            given = True
            yield item
    except DroppedRow as e:
        yield e
        return
    if not given:
        yield DroppedRow(UNRATED)
