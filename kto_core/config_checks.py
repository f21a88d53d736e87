"""What makes a RunConfig valid beyond its types, in sentences for the user; and its fields as controls.

Every sentence starts with the field's name and says what is valid. Pure: reads at most the model's config.json.
"""

from __future__ import annotations

import difflib
import types
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from . import model_shape

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic.fields import FieldInfo

    from .config import RunConfig

OUTPUT_LAYERS = ("lm_head", "embed_tokens", "embed_out", "wte")
OTHER_NAMES = {  # what people call a field -> its name
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "max_seq_length": "max_length",
    "lora_r": "r",
    "rank": "r",
    "alpha": "lora_alpha",
    "warmup": "warmup_ratio",
    "warmup_steps": "warmup_ratio",
    "optimizer": "optim",
    "scheduler": "lr_scheduler_type",
    "model_name": "model",
    "dataset": "data",
    "dataset_name": "data",
    "local_file": "data",
    "wandb": "report_to",
    "gpus": "num_gpus",
    "fsdp": "shard",
}


@dataclass(frozen=True)
class Control:
    """One field, as a flag or as a widget."""

    name: str
    flags: tuple[str, ...]  # short spellings first, then the long one made of the name
    type: type  # str, int, float, bool or list
    choices: tuple | None
    default: object
    description: str  # what it is
    range: str  # what is valid, "" if anything is
    help: str  # both, and the default
    metavar: str
    group: str  # heading to show it under; "Hidden": not to be shown
    minimum: float | None = None
    maximum: float | None = None


# ---- cross-checks ---------------------------------------------------------------------------------------------------


def cross(c: RunConfig, bad: set[str] = frozenset(), *, model: bool = True) -> list[str]:
    """All problems between fields.

    Args:
        bad: fields that are wrong in themselves; checks that touch one are left out.
        model: compare with the model's own configuration, where it lies on this machine.

    Returns:
        One sentence each; empty if all fits.
    """
    problems = []

    def wrong(fields: tuple[str, ...], is_wrong: bool, sentence: str) -> None:
        if is_wrong and not bad.intersection(fields):
            problems.append(sentence)

    batch, steps = c.per_device_train_batch_size, c.gradient_accumulation_steps
    kto = c.loss_type == "kto"
    too_small = c.effective_batch_size < 2
    wrong(
        ("per_device_train_batch_size", "gradient_accumulation_steps", "num_gpus"),
        too_small,
        f"per_device_train_batch_size: a KTO batch must have at least 2 rows, but {batch} × {steps} "
        f"(gradient_accumulation_steps) × {c.num_gpus} (num_gpus) is {c.effective_batch_size}. Raise one of them.",
    )
    lone = batch < 2 and kto and not too_small
    wrong(
        ("per_device_train_batch_size", "kl_group", "loss_type"),
        lone and c.kl_group == "microbatch",
        "per_device_train_batch_size: must be at least 2 with kl_group microbatch, whose KL needs a second row. "
        "Raise it, or set kl_group to batch.",
    )
    wrong(
        ("per_device_train_batch_size", "engine", "loss_type"),
        lone and c.kl_group == "batch" and c.engine in ("trl", "unsloth"),
        f"per_device_train_batch_size: must be at least 2 with engine {c.engine}, whose KL is taken inside a "
        "micro-batch. Raise it, or set engine to packed.",
    )
    targets = [c.target_modules] if isinstance(c.target_modules, str) else c.target_modules
    outputs = sorted({t for t in targets if t.rpartition(".")[2] in OUTPUT_LAYERS})
    wrong(
        ("target_modules",),
        bool(outputs),
        f"target_modules: {', '.join(outputs)} cannot be adapted with KTO. Valid are attention and FFN projections, "
        "for example q_proj, v_proj, down_proj, or all-linear.",
    )
    wrong(
        ("target_modules",),
        isinstance(c.target_modules, list) and "all-linear" in targets,
        "target_modules: all-linear stands alone, it cannot be one of a list.",
    )
    wrong(("max_steps",), c.max_steps == 0, "max_steps: must be -1 (as the epochs make) or at least 1, not 0.")
    wrong(
        ("worker", "engine", "num_gpus"),
        c.needs_process and c.worker == "thread",
        "worker: must be process with "
        + (f"num_gpus {c.num_gpus}" if c.num_gpus > 1 else "engine unsloth, which has to be imported first")
        + ". Set worker to process.",
    )
    wrong(
        ("engine", "num_gpus"),
        c.engine == "unsloth" and c.num_gpus > 1,
        f"num_gpus: must be 1 with engine unsloth, not {c.num_gpus}. Set engine to auto, or num_gpus to 1.",
    )
    wrong(
        ("shard", "num_gpus"),
        c.shard is True and c.num_gpus == 1,
        "shard: must be auto or false with num_gpus 1. Set shard to auto, or num_gpus to at least 2.",
    )
    wrong(
        ("shard", "engine"),
        c.shard is True and c.engine in ("trl", "unsloth"),
        f"shard: must be auto or false with engine {c.engine}, whose weights cannot be divided. Set shard to auto, or "
        "engine to packed.",
    )
    wrong(
        ("engine", "kl_group"),
        c.engine == "packed" and c.precompute_ref_log_probs is False,
        "precompute_ref_log_probs: must be auto or true with engine packed, which always scores the reference first.",
    )
    if model and not bad.intersection(("model", "max_length")):
        shape = model_shape.find(c.model)
        limit = shape.max_position_embeddings if shape and shape.exact else None
        if limit and c.max_length > limit:
            problems.append(
                f"max_length: must be 16 to {limit} with {c.model}, whose positions end there, not {c.max_length}."
            )
    return problems


def remarks(c: RunConfig) -> list[str]:
    """Sentences about settings that are valid but rarely meant."""
    found = []
    if c.desirable_weight != 1 and c.undesirable_weight != 1:
        found.append(
            f"desirable_weight and undesirable_weight both differ from 1: only their ratio "
            f"({c.desirable_weight / c.undesirable_weight:.3g}) balances the labels. Leave one at 1."
        )
    if c.kl_group == "batch" and c.loss_type == "kto" and c.engine in ("trl", "unsloth"):
        found.append(f"kl_group is batch, but engine {c.engine} takes the KL inside each micro-batch.")
    if c.report_to == "none" and c.wandb_project != "kto-studio":
        found.append("wandb_project has no effect until report_to is wandb.")
    if c.load_in_4bit and c.dtype == "float32":
        found.append("dtype float32 with 4-bit weights is slow on a GPU; auto takes bfloat16 where the card has it.")
    return found


# ---- pydantic's errors in our words ---------------------------------------------------------------------------------


def explain(error: ValidationError, values: dict, fields: dict[str, FieldInfo]) -> dict[str, str]:
    """field -> one sentence, for each field pydantic refused."""
    found: dict[str, str] = {}
    for e in error.errors():
        name = str(e["loc"][0])
        if name in found:
            continue
        if e["type"] == "extra_forbidden":
            found[name] = f"{name}: there is no such setting.{nearest(name, fields)}"
        else:
            found[name] = f"{name}: must be {range_text(fields[name])}, not {values.get(name)!r}."
    return found


def nearest(name: str, names) -> str:
    """' Did you mean …?' with the nearest of ``names``, or an empty string."""
    key = name.strip().lower().lstrip("-").replace("-", "_")
    if key in OTHER_NAMES and OTHER_NAMES[key] in names:
        return f" Did you mean {OTHER_NAMES[key]}?"
    near = difflib.get_close_matches(key, [*names, *(o for o in OTHER_NAMES if OTHER_NAMES[o] in names)], 1, 0.6)
    return f" Did you mean {OTHER_NAMES.get(near[0], near[0])}?" if near else ""


# ---- fields as controls ---------------------------------------------------------------------------------------------


def range_text(info: FieldInfo) -> str:
    """The valid values of a field, as words that follow 'must be'."""
    kind, choices = _kind(info)
    low, high, words = _limits(info)
    if choices:
        return "one of " + ", ".join(str(c).lower() if isinstance(c, bool) else str(c) for c in choices)
    if kind is bool:
        return "true or false"
    if kind is list:
        return "names separated by commas" + (", at least one" if words.get("min_length") else "")
    if kind is str:
        text = "text of at least 1 character" if words.get("min_length") else "text"
        return text + (", at most 100 characters without slashes" if words.get("pattern") else "")
    noun = "a whole number" if kind is int else "a number"
    if low and high and (low[1], high[1]) == ("at least", "at most"):
        return f"{noun} from {low[0]} to {high[0]}"
    return f"{noun} " + " and ".join(f"{word} {n}" for n, word in filter(None, (low, high)))


def control(name: str, info: FieldInfo) -> Control:
    """The Control of one field."""
    kind, choices = _kind(info)
    low, high, _ = _limits(info)
    extra = info.json_schema_extra
    default = info.get_default(call_default_factory=True)
    shown = ",".join(default) if isinstance(default, list) else str(default).lower() if choices else default
    text = "" if kind is str and not choices else range_text(info)
    help = info.description + (f" Valid: {text}." if text else "") + (f" Default: {shown}." if shown != "" else "")
    metavar = {int: "N", float: "X", bool: "BOOL", list: "A,B"}.get(kind, name.split("_")[-1].upper())
    long = "--" + name.replace("_", "-")
    return Control(
        name=name,
        flags=(*extra["flags"], long),
        type=kind,
        choices=choices,
        default=default,
        description=info.description,
        range=text,
        help=help,
        metavar="|".join(str(c).lower() for c in choices) if choices else metavar,
        group=extra["group"],
        minimum=low[0] if low else None,
        maximum=high[0] if high else None,
    )


def _kind(info: FieldInfo) -> tuple[type, tuple | None]:
    """(plain type, choices or None) of a field's annotation."""
    parts = [info.annotation]
    if typing.get_origin(info.annotation) in (types.UnionType, typing.Union):
        parts = list(typing.get_args(info.annotation))
    parts = [typing.get_args(p)[0] if typing.get_origin(p) is typing.Annotated else p for p in parts]
    if any(typing.get_origin(p) is list for p in parts):
        return list, None
    words = tuple(a for p in parts if typing.get_origin(p) is Literal for a in typing.get_args(p))
    if words and bool in parts:
        return str, (*words, True, False)
    return (str, words) if words else (parts[0], None)


def _limits(info: FieldInfo) -> tuple[tuple[float, str] | None, tuple[float, str] | None, dict]:
    """((lowest, 'at least' | 'above'), (highest, 'at most' | 'below'), other constraints)."""
    low = high = None
    other = {}
    for m in info.metadata:
        for key, word in (("ge", "at least"), ("gt", "above")):
            if getattr(m, key, None) is not None:
                low = (getattr(m, key), word)
        for key, word in (("le", "at most"), ("lt", "below")):
            if getattr(m, key, None) is not None:
                high = (getattr(m, key), word)
        for key in ("min_length", "pattern"):
            if getattr(m, key, None) is not None:
                other[key] = getattr(m, key)
    return low, high, other
