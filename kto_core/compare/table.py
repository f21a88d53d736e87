"""Rows of facts sorted, filtered, and as CSV. Pure."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kto_core.config.sharing import text

from .facts import Facts

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that a spreadsheet would compute


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes:
        value: what it is sorted by; None comes last, whichever way.
        lower: whether the first press of its head puts the smallest first.
    """

    name: str
    title: str
    value: Callable[[Facts], str | float | None]
    lower: bool = True


def _words(value: str) -> str | None:
    return value.casefold() or None


COLUMNS = {
    c.name: c
    for c in (
        Column("name", "Run", lambda f: _words(f.title)),
        Column("state", "State", lambda f: _words(f.state)),
        Column("data", "Dataset", lambda f: _words(f.data)),
        Column("preset", "Preset", lambda f: _words(f.preset)),
        Column("model", "Model", lambda f: _words(f.model)),
        Column("changed", "Changed settings", lambda f: _words(changes(f))),
        Column("rate", "Learning rate", lambda f: f.rate, lower=False),
        Column("loss", "Loss", lambda f: f.loss),
        Column("eval_loss", "Validation loss", lambda f: f.eval_loss),
        Column("margin", "Margin", lambda f: f.margin, lower=False),
        Column("verdict", "Verdict", lambda f: _words(f.verdict)),
        Column("seconds", "Time", lambda f: f.seconds, lower=False),
        Column("memory", "Memory", lambda f: f.memory, lower=False),
        Column("tags", "Tags", lambda f: _words(" ".join(f.tags))),
        Column("note", "Note", lambda f: _words(f.note)),
        Column("started", "Started", lambda f: f.started, lower=False),
    )
}
NEWEST = "started"


def changes(facts: Facts) -> str:
    """``beta 0.2, r 32``: the settings that no preset decided."""
    return ", ".join(f"{name} {value}" for name, value in facts.changed)


def ordered(rows: Iterable[Facts], by: str = NEWEST, down: bool | None = None) -> list[Facts]:
    """Sorted; rows that are equal stay as they are.

    Args:
        by: of `COLUMNS`; another one is `NEWEST`. down: the largest first; None: as the column likes it.
    """
    column = COLUMNS.get(by) or COLUMNS[NEWEST]
    rows, down = list(rows), not column.lower if down is None else down
    there = [r for r in rows if column.value(r) is not None]
    there.sort(key=column.value, reverse=down)  # type: ignore[arg-type]  # texts or numbers, never both
    return there + [r for r in rows if column.value(r) is None]


def filtered(rows: Iterable[Facts], words: str = "", tag: str = "", state: str = "") -> list[Facts]:
    """Those whose texts have each of the words, in any case, and that tag and state, where they are asked for."""
    wanted = words.casefold().split()
    return [
        r
        for r in rows
        if (not tag or tag in r.tags) and (not state or r.state == state) and all(w in _all(r) for w in wanted)
    ]


def _all(r: Facts) -> str:
    texts = (r.id, r.name, r.state, r.data, r.preset, r.model, changes(r), r.verdict, *r.tags, r.note, r.problem)
    return " ".join(texts).casefold()


def tags(rows: Iterable[Facts]) -> list[str]:
    """All that are in use, in the order of the alphabet."""
    return sorted({tag for r in rows for tag in r.tags}, key=str.casefold)


# ---- CSV ------------------------------------------------------------------------------------------------------------

HEAD = ("id", "name", "state", "step", "total_steps", "data", "preset", "model", "changed", "learning_rate", "loss",
        "eval_loss", "margin", "margin_low", "margin_high", "verdict", "seconds", "memory_gib", "tags", "note",
        "started", "problem")  # fmt: skip


def as_csv(rows: Sequence[Facts]) -> str:
    """One line a run, the head first. No cell is a formula for a spreadsheet: see `cell`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEAD)
    for r in rows:
        low, high = r.interval or (None, None)
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(r.started)) if r.started else ""
        values = (r.id, r.name, r.state, r.step, r.total_steps or None, r.data, r.preset, r.model, changes(r), r.rate,
                  r.loss, r.eval_loss, r.margin, low, high, r.verdict, r.seconds and round(r.seconds, 1), r.memory,
                  " ".join(r.tags), r.note, started, r.problem)  # fmt: skip
        writer.writerow(map(cell, values))
    return out.getvalue()


def cell(value: object) -> str:
    """A value as a cell; a text that a spreadsheet would compute begins with an apostrophe."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value)
    said = value if isinstance(value, str) else text(value)
    guarded = f"'{said}" if said.startswith(FORMULA) else said
    return guarded.replace("\r\n", "\n").replace("\r", "\n")
