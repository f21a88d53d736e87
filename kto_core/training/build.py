"""Model, rows and trainer of a run, built for its engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kto_core import reporting
from kto_core.engine.reference import PHASE
from kto_core.errors import Cancelled, NotServed
from kto_core.health.about import About
from kto_core.health.watching import HealthWatch
from kto_core.models import facts as model_info
from kto_core.planning.choices import Decision, decide, decide_for_trl, used
from kto_core.planning.rate import by_rule
from kto_core.runs import checkpoints, ranks
from kto_core.runs.events import RunState

from .context import RunContext


@dataclass(frozen=True)
class Built:
    """A run's trainer; ``used``: what it works with. ``datasets``: makes its data sets of encoded rows and labels."""

    trainer: Any
    engine: str
    used: dict[str, Any]
    datasets: Callable


def build_trainer(run: RunContext) -> Built:
    """The trainer: engine, base model, adapter, arguments.

    ``auto`` takes TRL's step also where the packed engine finds out only with the model in hand that it does not serve.
    """
    from kto_core.models.load import free_memory

    decision = decide(run.config, run.data)
    _say(run, decision)
    try:
        return {"packed": _build_packed, "trl": _build_trl, "unsloth": _build_unsloth}[decision.engine](run, decision)
    except NotServed as e:
        if run.config.engine != "auto":
            raise
        reason = str(e).removesuffix("Choose engine `trl`.").strip()
    decision = decide_for_trl(run.config, run.data, decision, reason)
    free_memory()
    _say(run, decision)
    return _build_trl(run, decision)


def first_rate(run: RunContext) -> float:
    """The peak learning rate that a trainer is built with: where it is to be found, the rule's until it is."""
    config = run.config
    if isinstance(config.learning_rate, float):
        return config.learning_rate
    return by_rule(config, config.steps(len(run.data.train)))


def _say(run: RunContext, decision: Decision) -> None:
    for text, level in decision.sentences:
        run.events.log(text, level)


def _build_packed(run: RunContext, decision: Decision) -> Built:
    from kto_core.engine import PackedKTOTrainer

    config, args = run.config, _arguments(run, decision)
    keywords = {"kl_group": config.kl_group, "progress": run.progress, "cancel": run.watch.cancel}
    if config.gradient_checkpointing != "auto":  # all layers or none
        keywords["checkpoint_layers"] = "all" if config.gradient_checkpointing else 0
    model, peft_config = _load(run, decision)
    return _trainer(run, decision, PackedKTOTrainer, args, model, peft_config=peft_config, **keywords)


def _build_trl(run: RunContext, decision: Decision) -> Built:
    from trl import KTOTrainer

    args = _arguments(run, decision)
    model, peft_config = _load(run, decision)
    return _trainer(run, decision, KTOTrainer, args, model, peft_config=peft_config)


def _build_unsloth(run: RunContext, decision: Decision) -> Built:
    from kto_core.models.unsloth_load import load_unsloth

    args = _arguments(run, decision)
    run.progress(None, f"Loading {run.config.model} with Unsloth…")
    model = load_unsloth(run.config)
    from trl import KTOTrainer  # Unsloth has put its own there

    return _trainer(run, decision, KTOTrainer, args, model)


def _load(run: RunContext, decision: Decision) -> tuple:
    """The base model with the adapter it begins from and None, or without one and the new adapter's configuration."""
    from kto_core.models import load as models

    config, watch = run.config, run.watch
    load = partial(models.load_base, config, for_training=True, progress=run.progress, cancel=watch.asked)
    if decision.sharding:
        from kto_core.engine.layers.sharding import load_divided

        model = load_divided(partial(load, in_main_memory=True), models.training_device())
    else:
        model = load()
    watch.check()
    if config.adapter:
        return models.load_adapter(model, config.adapter, trainable=True), None
    return model, models.lora_config(config, model)


def _arguments(run: RunContext, decision: Decision):
    """TRL's KTOConfig for the run."""
    from .trainer import arguments

    return arguments(
        run.config,
        run.run_dir / "checkpoints",
        rate=first_rate(run),
        precompute=decision.precompute,
        checkpointing=decision.checkpointing,
        evaluate=bool(run.data.test),
    )


def _trainer(run: RunContext, decision: Decision, base_class: type, args, model, **keywords) -> Built:
    """A trainer of this class over the run's rows."""
    from kto_core.models.load import clear_errors
    from kto_core.models.model_fit import reach

    from . import trainer as trainers

    config, data = run.config, run.data
    run.progress(None, "Building the trainer…")
    kl, batch = config.loss_type != "apo_zero_unpaired", config.per_device_train_batch_size
    encoded = partial(trainers.encoded_dataset, batch=batch, kl=kl, keys=decision.engine == "packed")
    with clear_errors(config):
        trainer = trainers.studio_class(base_class)(
            model=model,
            args=args,
            train_dataset=encoded(data.train, data.labels),
            eval_dataset=encoded(data.test, data.test_labels) if data.test else None,
            processing_class=run.tokenizer,
            studio=trainers.Surroundings(
                watch=run.watch,
                base=model_info.public_name(config.model),
                fresh_adapter=not config.adapter,
                makes_room=decision.engine == "trl",
                reference_progress=_reference_progress(run),
                advice=run.advice,
            ),
            **keywords,
        )
    run.events.log(reach(trainer.model).sentence)
    facts = used(config, decision.engine, args.optim.value)
    run.events.append("used", **facts)
    return Built(trainer, decision.engine, facts, encoded)


def _reference_progress(run: RunContext) -> Callable[[int], None]:
    """Counts the rows whose reference TRL has scored."""
    done, total = 0, max(1, len(run.data.train_rows) + len(run.data.test))

    def scored(rows: int) -> None:
        nonlocal done
        done += rows
        share = min(1.0, done / total)
        run.progress(share, f"{PHASE}: {share:.0%}")

    return scored


def connect_callback(trainer, run: RunContext, checkpoint: Path | None, before: RunState) -> None:
    """Our callback, and nothing that prints. ``before``: what the events said before this start."""
    from transformers import PrinterCallback

    from .callbacks import RunFacts, run_callback

    config, data = run.config, run.data
    facts = RunFacts(
        batch=config.per_device_train_batch_size * config.gradient_accumulation_steps * trainer.args.world_size,
        mean_tokens=sum(data.lengths) / len(data.lengths),
        beta=config.beta,
        # 0 where steps were made and lost: they come again, and their old metrics go
        resumed_from=checkpoints.step_of(checkpoint) if checkpoint else (0 if before.metrics.total else None),
    )
    good = sum(data.labels)
    counts = {"desirable": good, "undesirable": len(data.labels) - good}
    about = About.of(config, {"train": counts, "report": data.report}, trainer.args.learning_rate)
    health = HealthWatch(about, before)
    restore = (lambda: trainer.restore_meters(checkpoint)) if checkpoint else None
    trainer.remove_callback(PrinterCallback)
    reporting.into(trainer, run.run_dir)
    trainer.add_callback(run_callback(run.events, run.watch, facts, health, restore=restore))


def find_rate(built: Built, run: RunContext, earlier: dict[str, Any]) -> float:
    """The peak learning rate of the run: as configured, by the rule, or found by trials.

    Args:
        earlier: what the steps that the run goes on from were made with.

    Raises:
        Stopped, Cancelled: a stop was asked for meanwhile.
    """
    from kto_core.runs.stopping import Stopped

    from .callbacks import agreed
    from .rate.finding import Finder

    def check() -> None:
        if not agreed(run.watch.look(), built.trainer.args):
            return
        if ranks.rank() == 0:
            raise Stopped("Stopped before the first step.")
        raise Cancelled("Stopped before the first step.")  # how the run ended is not a helper's to say

    known = earlier.get("learning_rate")
    finder = Finder(run.config, run.run_dir, run.events, run.data, built.engine, run.progress, check, built.datasets)
    return finder.find(built.trainer, known if isinstance(known, float) else None)
