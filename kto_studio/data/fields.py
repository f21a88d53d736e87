"""What the Data tab's number fields mean. Nothing that is typed is refused: what is out of range is clamped and said.

A gr.Number with bounds would make Gradio refuse every call that has it among its inputs, also those of other controls.
"""

from __future__ import annotations

from kto_core.config import resolving
from kto_core.data.rendering import template
from kto_core.errors import KTOError
from kto_studio.shared.prose import note

from . import layout
from . import view as data_view

_LENGTH = next(c for c in resolving.cli_fields() if c.name == "max_length")
LEAST, MOST = int(_LENGTH.minimum or 0), int(_LENGTH.maximum or 0)


def clamped(number, least: int, most: int) -> int:
    """A number as it was typed, perhaps none at all, as one that there is."""
    return least if number is None else int(min(max(number, least), most))


def elsewhere(what: str, number, last: int) -> str:
    """That another row or page (from 1) is shown than was asked for; "" where it is the one."""
    shown = clamped(number, 1, last)
    if number is None or int(number) == shown:
        return ""
    which = "the only one" if last == 1 else "the last one" if shown == last else "the first one"
    return note(f"There is no {what} {int(number):,}: this is {what} {shown:,}, {which}.")


def max_length(typed) -> int | None:
    """The max length that counts, in tokens; None: an empty field is no limit."""
    return None if typed is None else clamped(typed, LEAST, MOST)


def about_length(typed) -> str:
    """The line under Max length where what is typed is not what counts; "" where it is."""
    counts = max_length(typed)
    if counts is None or counts == typed:
        return ""
    return note(f"Max length is from {LEAST} to {MOST:,} tokens: {counts:,} counts here.")


def row(found, number, model: str, view: str) -> str:
    """One row of a data set (`jobs.Look`), ``number`` from 1, as messages or as the model sees it."""
    if found.loaded is None or not found.loaded.rows:
        return note("Rows appear here once a dataset is read.")
    last = len(found.loaded.rows)
    one, said = found.loaded.rows[clamped(number, 1, last) - 1], elsewhere("row", number, last)
    if view == layout.MESSAGES:
        return said + data_view.conversation(one)
    if found.tokenizer is None:
        return said + data_view.not_seen(model, found.counting) + data_view.conversation(one)
    try:
        return said + data_view.as_seen(one, template.render(one, found.tokenizer))
    except KTOError as e:
        return said + data_view.problem(str(e)) + data_view.conversation(one)
