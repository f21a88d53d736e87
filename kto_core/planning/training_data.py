"""Rows -> what is trained, in which order: encoded, split by prompt, spread so that batches are label-mixed.

The order is decided here, once, from the configuration and the data; a resumed run gets the same.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kto_core.data.splitting import FEWEST
from kto_core.errors import DataError
from kto_core.files import write_whole
from kto_core.jobs import Progress, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kto_core.config.run_config import RunConfig
    from kto_core.data.records.rows import Row
    from kto_core.data.rendering.template import Encoded
    from kto_core.engine.packing.sample import Sample
    from kto_core.runs.stopping import StopWatch

NO_DATA = "No dataset is selected. Add --data with a file or the Hub id of a dataset."

NONE_HELD = (
    "No rows are held out: a tenth of {rows:,} rows is less than {few} good and {few} bad questions. `evaluate RUN "
    "--data FILE` judges the run on other rows."
)


@dataclass
class Planned:
    """The rows of a run. ``train``/``test`` are `template.Encoded`, in order, beside their `rows.Row`s and labels."""

    train: list[Encoded]
    train_rows: list[Row]
    labels: list[bool]
    test: list[Encoded]
    test_rows: list[Row]
    test_labels: list[bool]
    report: dict[str, Any]  # Report.to_dict()
    source: str
    sha256: str  # of the source
    truncated: int
    too_long: int
    remarks: list[str]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each training row."""
        return [len(e.prompt_ids) + len(e.completion_ids) for e in self.train]

    def packed(self, config: RunConfig) -> Sample:
        """What the optimizer batches pack into, for the memory plan."""
        from kto_core.engine.packing.sample import sample

        return sample(
            [(e.prompt_ids, e.completion_ids) for e in self.train],
            self.labels,
            config.effective_batch_size,
            seed=config.seed,
            steps=config.steps(len(self.train)),
            world=config.num_gpus,
        )

    @property
    def summary(self) -> str:
        """How many rows of which label train, and how long they are."""
        good, held = sum(self.labels), f", {len(self.test):,} for validation" if self.test else ""
        return (
            f"Training on {len(self.labels):,} rows: {good:,} good, {len(self.labels) - good:,} bad{held}. The "
            f"longest has {max(self.lengths):,} tokens."
        )

    @property
    def order_sha256(self) -> str:
        """Of the token ids in their order: what a resumed run must find again."""
        digest = hashlib.sha256()
        for encoded, label in zip(self.train, self.labels, strict=True):
            digest.update(repr((list(encoded.prompt_ids), list(encoded.completion_ids), label)).encode())
        return digest.hexdigest()


def plan_data(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress = no_progress,
    watch: StopWatch | None = None,
    began: float | None = None,
    cancel: threading.Event | None = None,
) -> Planned:
    """Load, encode, split and spread.

    Args:
        began: when the run began, in seconds since 1970: the date that a chat template writes. None: now.

    Raises:
        DataError: unreadable, no valid row, one label only, or fewer rows than a micro-batch.
        Cancelled: the watch saw a stop, or ``cancel`` was set.
    """
    from kto_core.data import dataset
    from kto_core.data.as_seen import Seen
    from kto_core.data.rendering import template
    from kto_core.data.rendering.style import Style

    cancel = watch.asked if watch else cancel
    loaded = dataset.load(config.data, config.data_split, **config.reading, progress=progress, cancel=cancel)
    rows = list(loaded.rows)  # parsed once; each keeps its identity from here on
    style = Style.of(config, began)
    found = list(template.encode_iter(rows, tokenizer, config.max_length, progress, cancel, style))
    encoded = {id(row): e for row, e in zip(rows, found, strict=True) if e.trained}
    truncated = sum(e.fate == "truncated" for e in found)
    too_long = sum(e.fate == "too_long" for e in found)
    seen = Seen(style.train_thoughts)
    for row, e in zip(rows, found, strict=True):
        seen.count(row.line, e.changes, e.refused, e.thought)
    rows = [row for row in rows if id(row) in encoded]
    remarks: list[str] = []
    if too_long:
        remarks.append(f"{too_long:,} rows are dropped because they exceed max_length {config.max_length}.")
    if truncated:
        remarks.append(f"{truncated:,} prompts are truncated from the left to fit {config.max_length} tokens.")
    remarks += [f"{sentence}." for sentence in seen.sentences()]
    if template.writes_date(tokenizer):
        day = datetime.date.fromtimestamp(time.time() if began is None else began)
        remarks.append(
            f"The model's chat template writes the date into every prompt: {day}, the day this run began. Reference "
            "log-probs of runs that began on another day cannot be used."
        )
    everything = rows
    test: list[Row] = []
    if config.test_size:
        kept, held = dataset.split_rows(rows, config.test_size, config.seed, config.split_by)
        rows, test = list(kept), list(held)
        if not test:
            remarks.append(NONE_HELD.format(rows=len(rows), few=FEWEST))
    require_both_labels([row.label for row in everything], config, too_long)
    require_both_labels([row.label for row in rows], config, too_long)
    if len(rows) < 2 * config.num_gpus:
        raise DataError(f"Only {len(rows)} rows of {config.data} can be trained on, which is too few. Add rows.")
    rows = list(dataset.spread(rows, config.per_device_train_batch_size, config.seed))
    return Planned(
        train=[encoded[id(row)] for row in rows],
        train_rows=rows,
        labels=[row.label for row in rows],
        test=[encoded[id(row)] for row in test] if len(test) > 1 else [],
        test_rows=test if len(test) > 1 else [],
        test_labels=[row.label for row in test] if len(test) > 1 else [],
        report=loaded.report.to_dict() | seen.to_dict(),
        source=loaded.source,
        sha256=loaded.sha256,
        truncated=truncated,
        too_long=too_long,
        remarks=remarks,
    )


def require_both_labels(labels: list[bool], config: RunConfig, too_long: int) -> None:
    """KTO learns from the contrast. Raises DataError when one side, or both, is missing."""
    if all(labels) or not any(labels):
        only = "there are none" if not labels else "all are " + ("good" if labels[0] else "bad")
        cut = f" ({too_long:,} exceed max_length {config.max_length})" if too_long else ""
        raise DataError(
            f"KTO needs good and bad rows. Of the {len(labels):,} rows of {config.data} that can be trained on, "
            f"{only}{cut}. Add rows with the other label, or raise max_length."
        )


def write_dataset_json(data: Planned, config: RunConfig, run_dir: Path, *, resuming: bool) -> None:
    """Write dataset.json: where the rows come from, their fate, how many are trained on.

    Raises:
        DataError: ``resuming``, and the rows are not those that the run began with.
    """
    path = run_dir / "dataset.json"
    order = data.order_sha256
    if resuming:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = {}
        if isinstance(before, dict) and before.get("order_sha256", order) != order:
            raise DataError(
                f"{config.data} has changed since this run started (its rows or the model's chat template), so the "
                "run cannot be resumed. Restore the original data, or start a new run."
            )
    tokens = data.lengths
    facts = {
        "source": data.source,
        "split": config.data_split,
        "sha256": data.sha256,
        "order_sha256": order,
        "report": data.report,
        "max_length": config.max_length,
        "truncated": data.truncated,
        "too_long": data.too_long,
        "train": _counts(data.labels) | {"tokens": sum(tokens), "longest": max(tokens)},
        "test": _counts(data.test_labels),
    }
    write_whole(path, json.dumps(facts, ensure_ascii=False, indent=1, default=str), sync=True)


def _counts(labels: list[bool]) -> dict[str, Any]:
    return {"rows": len(labels), "desirable": sum(labels), "undesirable": len(labels) - sum(labels)}
