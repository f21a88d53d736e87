"""Votes and edits become KTO rows, in a file that the Data tab reads, written by the code of the chat's thumbs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from kto_core import paths
from kto_core.data import feedback
from kto_core.data.feedback import Rated
from kto_core.errors import DataError

from .entries import Answer, Pair
from .session import Session
from .sides import KEYS, Side


def file_name(session: Session) -> str:
    """In the data folder."""
    return f"vote-{session.id}.jsonl"


def rows(session: Session) -> list[Rated]:
    """What the votes say, a row for each answer that somebody judged.

    The preferred answer is desirable, the other undesirable; if both are bad, both are undesirable; no difference gives
    none. An edited answer gives the original as undesirable and the edit as desirable, whatever the vote was. Answers
    without text give no row.
    """
    found: dict[str, Rated] = {}
    for pair in session.refresh().pairs():
        for one in _of(session, pair):
            if one.messages[-1]["content"].strip():
                found[repr(one.messages)] = one  # a text that both said, or that an edit repeats: the last word counts
    return list(found.values())


def _of(session: Session, pair: Pair) -> Iterator[Rated]:
    s = session.settings

    def rated(answer: Answer, label: bool, key: str, what: str, at: float) -> Rated:
        side: Side = getattr(s, key)
        sampling: dict[str, Any] = {**s.sampling, "seed": pair.seed}
        notes = feedback.about(what, model=side.model, adapter=side.adapter, sampling=sampling, at=at)
        return Rated([*pair.prompt, answer.message()], label, notes)

    for key in KEYS:
        if pair.winner or pair.choice == "bad":
            yield rated(pair.answers[key], key == pair.winner, key, "vote", pair.voted)
    for key in KEYS:
        if text := pair.edits.get(key, ""):
            at = pair.voted or pair.t
            yield rated(pair.answers[key], False, key, "edit", at)
            yield rated(Answer(text), True, key, "edit", at)


def write(session: Session, path: str | os.PathLike[str] | None = None) -> tuple[str, int, int]:
    """Write the rows into a file: (its path, desirable rows, undesirable rows). Rows that are in it stay; the same
    answers get their new label.

    Args:
        path: default `file_name` in the data folder.

    Raises:
        DataError: nobody has voted yet, or all votes say that there is no difference. DiskError.
    """
    found = rows(session)
    if not found:
        raise DataError("No vote and no edit makes a row yet. Prefer an answer, or edit one.")
    where = os.fspath(path) if path is not None else str(paths.data_dir() / file_name(session))
    feedback.add_all(where, found)
    good = sum(one.label for one in found)
    return where, good, len(found) - good


def reference(side: Side) -> str:
    """What is trained, and what the reference model is then (`RunConfig.adapter`)."""
    return (
        f"Training continues from the adapter of {side.name}. A frozen copy of that adapter, not the base model, is "
        f"the reference: rewards, KL and verdict say how far the new run moves from {side.name}."
    )
