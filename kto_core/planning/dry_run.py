"""What a run would do, without loading weights: settings, the rows' fate, steps, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kto_core.errors import DataError, HardwareError, KTOError
from kto_core.hardware.gpus import Device, imagined
from kto_core.jobs import Progress, no_progress

if TYPE_CHECKING:
    from kto_core.config.run_config import RunConfig
    from kto_core.engine.packing.sample import Sample


def dry_run(config: RunConfig, progress: Progress = no_progress, *, for_gpu: float | None = None) -> dict[str, Any]:
    """The contract of ``train --dry-run --json``: ``config``, ``data``, ``steps``, ``memory``.

    Rows are encoded with the model's tokenizer, so ``data`` has lengths, ``truncated`` and ``too_long``; ``steps``
    counts the rows that would be trained on. ``problem``: why the run would be refused on this machine; "" if not.
    ``rate``: what the learning rate will be (`rate.RatePlan`). ``engine``: its ``name``, and ``why`` where auto chose.
    ``adapter``: the ``share`` of the linear weights that a fresh one adapts, None where unknown; ``says`` it.

    Args:
        for_gpu: GiB of a card that is not in this machine, to plan for; None: for this machine.

    Raises:
        DataError, ModelError: as the run itself would.
    """
    from kto_core.config.resolving import as_trl
    from kto_core.data import dataset
    from kto_core.data.rendering.style import Style
    from kto_core.models.facts import model_facts
    from kto_core.models.load import load_tokenizer

    from . import checks, rate
    from .training_data import NO_DATA, plan_data

    if not config.data:
        raise DataError(NO_DATA)
    cards = None if for_gpu is None else [imagined(for_gpu)] * config.num_gpus
    problem = checks.refusal(config, cards=cards)
    try:
        tokenizer = load_tokenizer(config.model)
    except KTOError:
        if problem:  # what the run would say first
            raise HardwareError(problem) from None
        raise
    loaded = dataset.load(config.data, config.data_split, **config.reading, progress=progress)
    report = dataset.check(loaded, tokenizer, config.max_length, style=Style.of(config), progress=progress)
    problem = problem or checks.refusal(config, model_facts(config.model), cards)
    engine, refused = _engine(config)
    adapter, unfit = _adapter(config, engine["name"])
    found = {"config": as_trl(config), "data": report.to_dict(), "problem": problem or refused or unfit}
    found |= {"engine": engine, "adapter": adapter}
    if report.problem:  # the caller says so; there is nothing to plan
        return {**found, "steps": 0, "memory": _memory(config, [], cards), "rate": rate.plan(config, 0).to_dict()}
    data = plan_data(config, tokenizer, progress)
    steps = config.steps(len(data.train))
    return {
        **found,
        "steps": steps,
        "rate": rate.plan(config, steps).to_dict(),
        "memory": _memory(config, data.lengths, cards, data.packed(config)),
        "train_rows": len(data.train),
        "test_rows": len(data.test),
    }


def _engine(config: RunConfig) -> tuple[dict[str, str], str]:
    """The engine's name, and why where auto chose it; and why it cannot train the model, "" if it can."""
    from kto_core.models.facts import tokenizer_folder

    from .choices import choose_engine

    try:
        name, why = choose_engine(config, tokenizer_folder(config.model))
    except KTOError as e:
        return {"name": config.engine, "why": ""}, str(e)
    return {"name": name, "why": why}, ""


def _adapter(config: RunConfig, engine: str) -> tuple[dict[str, Any], str]:
    """What the adapter reaches; and why the model cannot be loaded or adapted, "" if it can, as far as can be told
    without weights."""
    from kto_core.models.facts import tokenizer_folder
    from kto_core.models.load import without_weights
    from kto_core.models.model_fit import reach

    nothing: dict[str, Any] = {"share": None, "says": ""}
    if engine == "unsloth":  # it builds and adapts models in its own way
        return nothing, ""
    folder = tokenizer_folder(config.model)
    try:
        model = without_weights(config, folder)
    except KTOError as e:
        return nothing, str(e)
    if config.adapter:
        return nothing, ""
    found = reach(model)
    return {"share": round(found.share, 4), "says": found.sentence}, ""


def _memory(
    config: RunConfig, lengths: list[int], cards: list[Device] | None, packed: Sample | None = None
) -> dict[str, Any]:
    from . import memory

    return memory.plan(config, lengths, packed=packed, device=cards[0] if cards else None).to_dict()
