"""Where the prompts of a vote come from: typed, a file, or the rows that a run held out."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable
from pathlib import Path

from kto_core.data.records.rows import Row
from kto_core.data.splitting import question
from kto_core.errors import Cancelled, DataError, KTOError
from kto_core.guards import bounded
from kto_core.jobs import Progress, check_cancel, no_progress

from .entries import ROLES, Messages
from .sides import Side, find_run

LINES = (".txt", ".md", "")  # endings of files that have one prompt a line
LONGEST = 20_000  # characters of a typed prompt


def typed(text: str) -> list[Messages]:
    """One prompt a line; blank lines are none.

    Raises:
        DataError: there is no prompt, or one is too long.
    """
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise DataError("There is no prompt. Type one in each line.")
    if (longest := max(map(len, found))) > LONGEST:
        raise DataError(f"A prompt may have {LONGEST:,} characters; one has {longest:,}. Shorten it.")
    return [[{"role": "user", "content": line}] for line in found]


def of_file(
    path: str, seed: int, progress: Progress = no_progress, cancel: threading.Event | None = None
) -> list[Messages]:
    """The prompts of a file, shuffled: one in each line of a text file, else of the rows of a data file.

    Raises:
        DataError: it cannot be read, or has no prompt that can be asked.
    """
    if Path(path).suffix.lower() in LINES and bounded.is_file(path):
        try:
            found = typed(bounded.read_text(path))
        except (OSError, bounded.Unreadable) as e:
            raise DataError(f"{path} cannot be read: {e}.") from e
        return shuffled(found, seed)
    from kto_core.data import dataset

    loaded = dataset.load(path, progress=progress, cancel=cancel)
    return of_rows(loaded.rows, seed, Path(path).name, cancel)


def of_rows(rows: Iterable[Row], seed: int, source: str, cancel: threading.Event | None = None) -> list[Messages]:
    """The different prompts of rows, shuffled. Those with tools are left out: their answers are no text.

    Raises:
        DataError: none can be asked.
    """
    found = []
    for row in rows:
        check_cancel(cancel)
        if not row.tools and _askable(row.prompt):
            found.append([{"role": m["role"], "content": m["content"]} for m in row.prompt])
    if not found:
        raise DataError(f"{source} has no prompt that ends with a user message and needs no tools. Choose another.")
    return shuffled(found, seed)


def of_held_out(
    a: Side, b: Side, seed: int, progress: Progress = no_progress, cancel: threading.Event | None = None
) -> tuple[list[Messages], list[str]]:
    """The prompts of the rows that ``a`` held out and neither run was trained on, shuffled, and remarks.

    Raises:
        DataError: ``a`` held out none, they cannot be read again, or ``b`` was trained on all of them.
    """
    from kto_core.models.load import load_tokenizer
    from kto_core.verdict import held_out

    run, remarks = find_run(a.folder), []
    config = run.config().config
    tokenizer = load_tokenizer(config.model, progress, cancel)
    rows = held_out.find(run, config, tokenizer, progress=progress, cancel=cancel).rows
    if b.run:
        other = find_run(b.folder)
        try:
            config = other.config().config
            trained = held_out.questions_trained_on(other, config, tokenizer, other.state().started, progress, cancel)
            rows = [row for row in rows if question(row) not in trained]
        except Cancelled:
            raise
        except KTOError as e:
            remarks.append(f"Whether {b.name} was trained on some of these prompts is not known: {e}")
        if not rows:
            raise DataError(f"{b.name} was trained on all prompts that {a.name} held out. Give prompts from a file.")
    return of_rows(rows, seed, f"What {a.name} held out", cancel), remarks


def shuffled(prompts: list[Messages], seed: int) -> list[Messages]:
    """Each prompt once, in a random order that the seed fixes."""
    once = list({repr(p): p for p in prompts}.values())
    random.Random(seed).shuffle(once)
    return once


def _askable(prompt: list) -> bool:
    return (
        bool(prompt)
        and prompt[-1].get("role") == "user"
        and all(
            m.get("role") in ROLES and isinstance(m.get("content"), str) and not m.get("tool_calls") for m in prompt
        )
    )
