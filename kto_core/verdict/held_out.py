"""Which rows may judge a run: those that it held out, or other ones, and none whose question it was trained on."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kto_core.data.splitting import FEWEST, question
from kto_core.errors import Cancelled, DataError, KTOError, MapError
from kto_core.jobs import Progress, no_progress

if TYPE_CHECKING:
    from kto_core.config.run_config import RunConfig
    from kto_core.data.records.rows import Row
    from kto_core.data.rendering.template import Encoded
    from kto_core.planning.training_data import Planned

VALIDATION = "validation rows of the run"


@dataclass
class HeldOut:
    """Rows that judge, with their tokens and questions.

    Attributes:
        source: where they come from, in words or as it was given.
        trained_on: rows left out because the run trained on their question; None: that is not known.
        too_long: rows left out because of their length. unused: because there was no time for them.
        remarks: sentences that a reader of the result must know.
    """

    source: str
    rows: list[Row]
    encoded: list[Encoded]
    questions: list[str]
    trained_on: int | None
    too_long: int
    remarks: list[str] = field(default_factory=list)
    unused: int = 0

    def within(self, tokens: int, seed: int = 0) -> HeldOut:
        """As many whole questions as have at most so many tokens, in a random order.

        `FEWEST` of each label are taken whatever they cost: with fewer there is no verdict.
        """
        groups: dict[str, list[int]] = {}
        for i, asked in enumerate(self.questions):
            groups.setdefault(asked, []).append(i)
        order = list(groups.values())
        random.Random(seed).shuffle(order)
        kept: list[int] = []
        used, asked_of = 0, {True: 0, False: 0}
        for group in order:
            labels = {bool(self.rows[i].label) for i in group}
            size = sum(len(self.encoded[i].prompt_ids) + len(self.encoded[i].completion_ids) for i in group)
            if used + size > tokens and all(asked_of[label] >= FEWEST for label in labels):
                continue
            kept += group
            used += size
            for label in labels:
                asked_of[label] += 1
        kept.sort()
        return replace(
            self,
            rows=[self.rows[i] for i in kept],
            encoded=[self.encoded[i] for i in kept],
            questions=[self.questions[i] for i in kept],
            unused=len(self.rows) - len(kept),
        )


def find(
    run,
    config: RunConfig,
    tokenizer,
    data: str | None = None,
    split: str = "train",
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
    planned: Planned | None = None,
) -> HeldOut:
    """The rows that judge a run: of ``data``, or without it those that the run held out.

    Args:
        run: a `run.Run`. data, split: in any form that `dataset.load` takes.
        planned: the run's own rows where the caller has them; else they are read again.

    Raises:
        DataError: unreadable, nothing held out, or every question was trained on.
        Cancelled: ``cancel`` was set.
    """
    began = run.state().started
    if data is None:
        planned = planned or _planned(run, config, tokenizer, began, progress, cancel)
        trained = {question(row) for row in planned.train_rows}
        found = _unseen(VALIDATION, planned.test_rows, planned.test, trained)
    else:
        from kto_core.data.rendering import template
        from kto_core.data.rendering.style import Style

        loaded = read(config, data, split, progress, cancel)
        rows = list(loaded.rows)
        style = Style.of(config, began)
        encoded = list(template.encode_iter(rows, tokenizer, config.max_length, progress, cancel, style))
        try:
            known = questions_trained_on(run, config, tokenizer, began, progress, cancel)
        except Cancelled:
            raise
        except KTOError as e:
            known, why = None, str(e)
        found = _unseen(str(data), rows, encoded, known)
        if lost := loaded.report.dropped:
            found.remarks.append("Dropped: " + "; ".join(f"{n:,} {reason}" for reason, n in lost.items()) + ".")
        if known is None:
            found.remarks.append(
                f"Whether the run was trained on some of these questions is not known, because its own rows cannot be "
                f"read: {why}"
            )
    if not found.rows and found.trained_on:
        raise DataError(
            f"The run was trained on the questions of all {found.trained_on:,} rows of {found.source}, so they cannot "
            "tell whether it is better. Give other rows with --data."
        )
    return found


def read(config: RunConfig, data: str, split: str, progress: Progress = no_progress, cancel=None):
    """Held-out data, read as the run's data was where it has the same columns, and a scale."""
    from kto_core.data import dataset

    columns = config.map
    try:
        found = dataset.load(data, split, columns=columns, progress=progress, cancel=cancel)
    except MapError:
        columns = ""
        found = dataset.load(data, split, progress=progress, cancel=cancel)
    if found.report.scale and config.cuts_scale:
        found = dataset.load(data, split, **config.reading | {"columns": columns}, progress=progress, cancel=cancel)
    return found


def _planned(run, config, tokenizer, began, progress, cancel) -> Planned:
    """The run's rows as it split them.

    Raises:
        DataError: it held out none, or they cannot be found again.
    """
    from kto_core.planning.training_data import plan_data

    facts = run.dataset()
    if not config.test_size or not (facts.get("test") or {}).get("rows"):
        raise DataError(
            f"Run {run.id} held out no rows. Give rows that it was not trained on with --data, or train with "
            "more rows or --test-size 0.1."
        )
    try:
        planned = plan_data(config, tokenizer, progress, began=began, cancel=cancel)
    except Cancelled:
        raise
    except KTOError as e:
        raise DataError(f"The rows that run {run.id} held out cannot be read. {e} Or give others with --data.") from e
    if facts.get("order_sha256", planned.order_sha256) != planned.order_sha256:
        raise DataError(
            f"{config.data} has changed since run {run.id} was trained (its rows or the model's chat template), so the "
            "rows that it held out are not known any more. Restore the original data, or give other rows with --data."
        )
    return planned


def questions_trained_on(
    run, config: RunConfig, tokenizer, began, progress: Progress = no_progress, cancel: threading.Event | None = None
) -> set[str]:
    """The questions of all rows that the run was trained on. ``began``: `RunState.started`, for templates with a date.

    Raises:
        DataError: its rows cannot be read any more.
    """
    if config.test_size and (run.dataset().get("test") or {}).get("rows"):
        rows: Iterable[Row] = _planned(run, config, tokenizer, began, progress, cancel).train_rows
    else:
        from kto_core.data import dataset

        rows = dataset.load(config.data, config.data_split, **config.reading, progress=progress, cancel=cancel).rows
    return {question(row) for row in rows}


def _unseen(source: str, rows: Sequence[Row], encoded: Sequence[Encoded], trained: set[str] | None) -> HeldOut:
    asked = [question(row) for row in rows]
    new = [trained is None or q not in trained for q in asked]
    kept = [i for i, e in enumerate(encoded) if new[i] and e.trained]
    return HeldOut(
        source=source,
        rows=[rows[i] for i in kept],
        encoded=[encoded[i] for i in kept],
        questions=[asked[i] for i in kept],
        trained_on=None if trained is None else new.count(False),
        too_long=new.count(True) - len(kept),
    )
