"""What ``auto`` means for a training: which engine, whether the reference is scored first, how much is recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kto_core.errors import ConfigError, ModelError
from kto_core.guards.libraries import transformers_ready
from kto_core.runs import ranks

from . import memory
from .memory import MemoryPlan

if TYPE_CHECKING:
    from kto_core.config.run_config import RunConfig

    from .training_data import Planned


@dataclass(frozen=True)
class Decision:
    """What the settings of a run become on this machine.

    Attributes:
        engine: "packed", "trl" or "unsloth".
        precompute: the reference is scored before the training, by TRL.
        checkpointing: gradient checkpointing's keywords, or None for none.
        sharding: the frozen weights are divided over the processes.
        plan: of the memory, where one of these depends on it.
        sentences: (text, level) of what the log is to say.
    """

    engine: str
    precompute: bool
    checkpointing: dict[str, Any] | None
    sharding: bool
    plan: MemoryPlan | None
    sentences: tuple[tuple[str, str], ...]


def decide(config: RunConfig, data: Planned) -> Decision:
    """All that ``auto`` leaves open, decided together; the same for all processes.

    Raises:
        ModelError: the packed engine was asked for and does not serve this model.
        ConfigError: sharding was asked for, and the engine cannot.
    """
    engine, sentence = choose_engine(config)
    plan = None
    if config.gradient_checkpointing == "auto" or _may_shard(config, engine):
        plan = memory.plan(config, data.lengths, packed=data.packed(config))
    sentences = [(sentence, "info")] if sentence else []
    if config.gradient_checkpointing == "auto" and plan is not None and plan.verdict in ("tight", "does not fit"):
        need = f"about {plan.predicted_gib:.1f} of {plan.available_gib:.1f} GiB"
        sentences.append((f"Memory plan: {plan.verdict}, {need}. {plan.advice}".strip(), "warning"))
    if sharding := use_sharding(config, engine, plan):
        sentences.append((f"The base model's weights are sharded across {ranks.world()} processes.", "info"))
    rows = len(data.train_rows)
    return Decision(engine, precompute_pays(config, rows, engine), use_checkpointing(config, plan), sharding, plan,
                    tuple(sentences))  # fmt: skip


def decide_for_trl(config: RunConfig, data: Planned, first: Decision, reason: str) -> Decision:
    """The same for TRL's step, where the packed engine finds out only with the model in hand that it does not serve it.

    Raises:
        ConfigError: sharding was asked for.
    """
    sharding = use_sharding(config, "trl", first.plan)
    precompute = precompute_pays(config, len(data.train_rows), "trl")
    said = ((f"Using TRL's training step instead. {reason}", "info"),)
    return Decision("trl", precompute, first.checkpointing, sharding, first.plan, said)


def choose_engine(config: RunConfig, folder: Path | None = None) -> tuple[str, str]:
    """``packed``, ``trl`` or ``unsloth``, and a sentence where ``auto`` chose it. ``auto`` is packed where it serves
    the model, else trl.

    Args:
        folder: with the model's config.json; None: the folder with its weights.

    Raises:
        ModelError: packed was asked for and does not serve this model.
    """
    if config.engine in ("trl", "unsloth"):
        return config.engine, ""
    transformers_ready()
    from transformers import AutoConfig

    from kto_core.models.facts import local_folder

    try:
        from kto_core.engine.support import available

        hf_config = AutoConfig.from_pretrained(folder or local_folder(config.model), trust_remote_code=False)
        ok, reason = available(hf_config, config.max_length)
    except ImportError as e:
        ok, reason = False, f"it could not be loaded ({e})."
    if ok:
        return "packed", "Training engine: packed."
    if config.engine == "packed":
        raise ModelError(f"The packed engine cannot train {config.model}: {reason} Choose engine `auto` or `trl`.")
    return "trl", f"Training engine: trl. The packed engine is not used: {reason}"


def used(config: RunConfig, engine: str, optim: str) -> dict[str, Any]:
    """What the run works with where the configuration does not say it: kept in its events, for the model card."""
    from kto_core.runs.lineage import adapter_origin

    facts: dict[str, Any] = {"engine": engine, "optim": optim}
    facts["kl_group"] = config.kl_group if engine == "packed" else "microbatch"  # the others have no wider one
    return facts | ({"began_from": adapter_origin(config.adapter)} if config.adapter else {})


def _may_shard(config: RunConfig, engine: str) -> bool:
    return ranks.several() and config.shard == "auto" and engine == "packed"


def use_sharding(config: RunConfig, engine: str, plan: MemoryPlan | None) -> bool:
    """Whether the frozen weights are divided over the processes: as configured; ``auto`` where one GPU does not hold
    them. The same for all processes.

    Raises:
        ConfigError: it was asked for, and TRL's step cannot.
    """
    if not ranks.several() or config.shard is False or engine == "unsloth":
        return False
    if engine != "packed":
        if config.shard is True:
            raise ConfigError(
                "shard: only the packed engine can shard weights, and it does not support this model. Set shard to "
                "auto, or choose another model."
            )
        return False
    if config.shard is True:
        return True
    assert plan is not None, "`decide` makes one where this is open"
    from accelerate.utils import gather_object  # each has planned for its own card

    return any(gather_object([plan.sharded]))


def precompute_pays(config: RunConfig, rows: int, engine: str) -> bool:
    """Scoring the reference once costs one pass over the rows; without it every epoch pays one."""
    if engine == "packed":  # it keeps a cache of its own
        return False
    if ranks.several():  # TRL hands the scores on in a file, whose name each process draws for rows in memory
        return False
    if config.precompute_ref_log_probs != "auto":
        return config.precompute_ref_log_probs
    seen = config.num_train_epochs
    if config.max_steps > 0:
        seen = config.max_steps * config.effective_batch_size / max(1, rows)
    return seen > 1


def use_checkpointing(config: RunConfig, plan: MemoryPlan | None) -> dict[str, Any] | None:
    """Gradient checkpointing's keywords, or None for none: as configured; ``auto`` as far as the memory plan says."""
    if config.gradient_checkpointing != "auto":
        return {"use_reentrant": False} if config.gradient_checkpointing else None
    assert plan is not None, "`decide` makes one where this is open"
    if plan.verdict == "cpu" or not plan.checkpoint_layers:
        return None
    return {"use_reentrant": False, "every_n_layers": max(1, plan.layers // plan.checkpoint_layers)}
