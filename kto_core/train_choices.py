"""What ``auto`` means for a training: which engine, whether the reference is scored first, how much is recomputed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import ranks
from .errors import ConfigError, ModelError
from .events import EventLog
from .libraries import transformers_ready

if TYPE_CHECKING:
    from .config import RunConfig
    from .train_data import Planned


def choose_engine(config: RunConfig, events: EventLog) -> str:
    """``packed``, ``trl`` or ``unsloth``. ``auto`` is packed where it serves the model, else trl with a sentence why.

    Raises:
        ModelError: packed was asked for and does not serve this model.
    """
    if config.engine in ("trl", "unsloth"):
        return config.engine
    transformers_ready()
    from transformers import AutoConfig

    from .model_info import local_folder

    try:
        from .engine import available

        hf_config = AutoConfig.from_pretrained(local_folder(config.model), trust_remote_code=False)
        ok, reason = available(hf_config, config.max_length)
    except ImportError as e:
        ok, reason = False, f"it cannot be loaded ({e})."
    if ok:
        events.log("Engine: packed.")
        return "packed"
    if config.engine == "packed":
        raise ModelError(f"The packed engine cannot train {config.model}: {reason} Choose engine `auto` or `trl`.")
    events.log(f"Training with TRL's own step; the packed engine is not used: {reason}")
    return "trl"


def used(config: RunConfig, engine: str, optim: str) -> dict:
    """What the run works with where the configuration does not say it: kept in its events, for the model card."""
    from .model_files import adapter_origin

    facts: dict = {"engine": engine, "optim": optim}
    facts["kl_group"] = config.kl_group if engine == "packed" else "microbatch"  # the others have no wider one
    return facts | ({"began_from": adapter_origin(config.adapter)} if config.adapter else {})


def use_sharding(config: RunConfig, data: Planned, engine: str, events: EventLog) -> bool:
    """Whether the frozen weights are divided over the processes: as configured; ``auto`` where one GPU does not hold
    them. The same for all processes.

    Raises:
        ConfigError: it was asked for, and the engine cannot.
    """
    from . import hardware

    if not ranks.several() or config.shard is False:
        return False
    if engine != "packed":
        if config.shard is True:
            raise ConfigError(
                "shard: only the packed engine divides the weights, and it does not serve this model. Set shard to "
                "auto, or choose another model."
            )
        return False
    divided = config.shard is True
    if not divided:
        from accelerate.utils import gather_object  # each has planned for its own card

        divided = any(gather_object([hardware.plan(config, data.lengths, packed=data.packed(config)).sharded]))
    if divided:
        events.log(f"The frozen weights are divided over {ranks.world()} processes.")
    return divided


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


def use_checkpointing(config: RunConfig, data: Planned, events: EventLog) -> dict | None:
    """Gradient checkpointing's keywords, or None for none: as configured; ``auto`` as far as the memory plan says."""
    from . import hardware

    if config.gradient_checkpointing != "auto":
        return {"use_reentrant": False} if config.gradient_checkpointing else None
    plan = hardware.plan(config, data.lengths, packed=data.packed(config))
    if plan.verdict in ("tight", "does not fit"):
        need = f"about {plan.predicted_gib:.1f} of {plan.available_gib:.1f} GiB"
        events.log(f"The memory plan says: {plan.verdict}, {need}. {plan.advice}".strip(), "warning")
    if plan.verdict == "cpu" or not plan.checkpoint_layers:
        return None
    return {"use_reentrant": False, "every_n_layers": max(1, plan.layers // plan.checkpoint_layers)}
