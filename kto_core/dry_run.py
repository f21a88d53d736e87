"""What a run would do, without loading weights: settings, the rows' fate, steps, memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .errors import DataError, HardwareError, KTOError
from .jobs import Progress, no_progress

if TYPE_CHECKING:
    from .config import RunConfig


def planned_steps(config: RunConfig, rows: int) -> int:
    """Optimizer steps of a run over ``rows`` training rows, counted as transformers' Trainer counts them."""
    if config.max_steps > 0:
        return config.max_steps
    micro = math.ceil(rows / (config.per_device_train_batch_size * config.num_gpus))
    per_epoch = max(1, math.ceil(micro / config.gradient_accumulation_steps))
    return math.ceil(config.num_train_epochs * per_epoch)


def dry_run(config: RunConfig, progress: Progress = no_progress) -> dict:
    """The contract of ``train --dry-run --json``: ``config``, ``data``, ``steps``, ``memory``.

    Rows are encoded with the model's tokenizer, so ``data`` has lengths, ``truncated`` and ``too_long``; ``steps``
    counts the rows that would be trained on. ``problem``: why the run would be refused on this machine; "" if not.

    Raises:
        DataError, ModelError: as the run itself would.
    """
    from . import dataset, train_checks
    from .config import as_trl
    from .model import load_tokenizer
    from .model_info import model_facts
    from .train_data import plan_data

    if not config.data:
        raise DataError("No data is chosen. Name a file or a Hub data set with --data.")
    problem = train_checks.refusal(config)
    try:
        tokenizer = load_tokenizer(config.model)
    except KTOError:
        if problem:  # what the run would say first
            raise HardwareError(problem) from None
        raise
    loaded = dataset.load(config.data, config.data_split, progress=progress)
    report = dataset.check(loaded, tokenizer, config.max_length, progress=progress)
    problem = problem or train_checks.refusal(config, model_facts(config.model))
    found = {"config": as_trl(config), "data": report.to_dict(), "problem": problem}
    if report.problem:  # the caller says so; there is nothing to plan
        return {**found, "steps": 0, "memory": _memory(config, [])}
    data = plan_data(config, tokenizer, progress)
    return {
        **found,
        "steps": planned_steps(config, len(data.train)),
        "memory": _memory(config, data.lengths, data.packed(config)),
        "train_rows": len(data.train),
        "test_rows": len(data.test),
    }


def _memory(config: RunConfig, lengths: list[int], packed=None) -> dict:
    from . import hardware

    return hardware.plan(config, lengths, packed=packed).to_dict()
