"""Rows -> what is trained, in which order: encoded, split by prompt, spread so that batches are label-mixed.

The order is decided here, once, from the configuration and the data; a resumed run gets the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DataError
from .jobs import Progress, no_progress

if TYPE_CHECKING:
    from .config import RunConfig
    from .engine.sample import Sample
    from .stopping import StopWatch


@dataclass
class Planned:
    """The rows of a run. ``train``/``test`` are `template.Encoded`, in order, beside their `rows.Row`s and labels."""

    train: list
    train_rows: list
    labels: list[bool]
    test: list
    test_rows: list
    test_labels: list[bool]
    report: dict  # Report.to_dict()
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
        from .dry_run import planned_steps
        from .engine.sample import sample

        return sample(
            [(e.prompt_ids, e.completion_ids) for e in self.train],
            self.labels,
            config.effective_batch_size,
            seed=config.seed,
            steps=planned_steps(config, len(self.train)),
            world=config.num_gpus,
        )

    @property
    def summary(self) -> str:
        """How many rows of which label train, and how long they are."""
        good, held = sum(self.labels), f", {len(self.test):,} held out" if self.test else ""
        return (
            f"{len(self.labels):,} rows train: {good:,} desirable, {len(self.labels) - good:,} undesirable{held}. "
            f"The longest has {max(self.lengths):,} tokens."
        )

    @property
    def order_sha256(self) -> str:
        """Of the token ids in their order: what a resumed run must find again."""
        digest = hashlib.sha256()
        for encoded, label in zip(self.train, self.labels, strict=True):
            digest.update(repr((list(encoded.prompt_ids), list(encoded.completion_ids), label)).encode())
        return digest.hexdigest()


def plan_data(
    config: RunConfig, tokenizer, progress: Progress = no_progress, watch: StopWatch | None = None
) -> Planned:
    """Load, encode, split and spread.

    Raises:
        DataError: unreadable, no valid row, one label only, or fewer rows than a micro-batch.
        Cancelled: the watch saw a stop.
    """
    from . import dataset, template

    cancel = watch.asked if watch else None
    loaded = dataset.load(config.data, config.data_split, progress=progress, cancel=cancel)
    rows = list(loaded.rows)  # parsed once; each keeps its identity from here on
    found = list(template.encode_iter(rows, tokenizer, config.max_length, progress, cancel))
    encoded = {id(row): e for row, e in zip(rows, found, strict=True) if e.fate != "too_long"}
    truncated = sum(e.fate == "truncated" for e in found)
    too_long = len(rows) - len(encoded)
    rows = [row for row in rows if id(row) in encoded]
    remarks = []
    if too_long:
        remarks.append(f"{too_long:,} rows are left out: they do not fit into max_length {config.max_length} whole.")
    if truncated:
        remarks.append(f"{truncated:,} rows had their prompt cut from the left to fit {config.max_length} tokens.")
    everything = rows
    test: list = []
    if config.test_size:
        rows, test = dataset.split_rows(rows, config.test_size, config.seed)
    require_both_labels([row.label for row in everything], config, too_long)
    require_both_labels([row.label for row in rows], config, too_long)
    if len(rows) < 2 * config.num_gpus:
        raise DataError(f"{config.data} leaves {len(rows)} rows to train on, which is too few. Add rows.")
    rows = dataset.spread(rows, config.per_device_train_batch_size, config.seed)
    return Planned(
        train=[encoded[id(row)] for row in rows],
        train_rows=rows,
        labels=[row.label for row in rows],
        test=[encoded[id(row)] for row in test] if len(test) > 1 else [],
        test_rows=test if len(test) > 1 else [],
        test_labels=[row.label for row in test] if len(test) > 1 else [],
        report=loaded.report.to_dict(),
        source=loaded.source,
        sha256=loaded.sha256,
        truncated=truncated,
        too_long=too_long,
        remarks=remarks,
    )


def require_both_labels(labels: list[bool], config: RunConfig, too_long: int) -> None:
    """KTO learns from the contrast. Raises DataError when one side, or both, is missing."""
    if all(labels) or not any(labels):
        only = "there are none" if not labels else "all are " + ("desirable" if labels[0] else "undesirable")
        cut = f" ({too_long:,} do not fit into max_length {config.max_length})" if too_long else ""
        raise DataError(
            f"KTO needs desirable and undesirable rows; of the {len(labels):,} rows of {config.data} that can be "
            f"trained on, {only}{cut}. Add rows of the other kind, or raise max_length."
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
                f"{config.data} is not what this run began with (its rows or the model's template changed), so it "
                "cannot be resumed. Bring the old data back, or start a new run."
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
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(facts, ensure_ascii=False, indent=1, default=str), encoding="utf-8")
    os.replace(part, path)


def _counts(labels: list[bool]) -> dict:
    return {"rows": len(labels), "desirable": sum(labels), "undesirable": len(labels) - sum(labels)}
