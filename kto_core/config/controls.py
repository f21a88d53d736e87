"""A RunConfig's fields as controls, and pydantic's errors about them in sentences for the user.

Every sentence starts with the field's name and says what is valid. Pure.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from kto_core.plain_text import one_line, shown

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic.fields import FieldInfo

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
    choices: tuple[str | bool, ...] | None
    default: object
    description: str  # what it is
    range: str  # what is valid, "" if anything is
    help: str  # both, and the default
    metavar: str
    group: str  # heading to show it under; "Hidden": not to be shown
    minimum: float | None = None
    maximum: float | None = None
    words: tuple[str, ...] = ()  # that may stand in a number's place


# ---- pydantic's errors in our words ---------------------------------------------------------------------------------


def explain(error: ValidationError, values: dict[str, Any], fields: dict[str, FieldInfo]) -> dict[str, str]:
    """field -> one sentence, for each field pydantic refused."""
    found: dict[str, str] = {}
    for e in error.errors():
        name = str(e["loc"][0])
        if name in found:
            continue
        if e["type"] == "extra_forbidden":
            found[name] = f"{one_line(name, 60)}: unknown setting.{nearest(name, fields)}"
        else:
            found[name] = f"{name}: must be {range_text(fields[name])}, not {shown(values.get(name))}."
    return found


def nearest(name: str, names: Collection[str]) -> str:
    """' Did you mean …?' with the nearest of ``names``, or an empty string."""
    key = name[:60].strip().lower().lstrip("-").replace("-", "_")
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
        text = "non-empty text" if words.get("min_length") else "text"
        return text + (", at most 100 characters without slashes" if words.get("pattern") else "")
    noun = "a whole number" if kind is int else "a number"
    if instead := _words(info):
        noun = f"{', '.join(instead)}, or {noun}"
    if low and high and (low[1], high[1]) == ("at least", "at most"):
        return f"{noun} from {low[0]} to {high[0]}"
    if not low and not high:
        return noun
    return f"{noun} " + " and ".join(f"{word} {n}" for n, word in filter(None, (low, high)))


def control(name: str, info: FieldInfo) -> Control:
    """The Control of one field."""
    kind, choices = _kind(info)
    low, high, _ = _limits(info)
    extra = cast("dict[str, Any]", info.json_schema_extra)  # `_field` set it
    default = info.get_default(call_default_factory=True)
    shown = ",".join(default) if isinstance(default, list) else str(default).lower() if choices else default
    text = "" if kind is str and not choices else range_text(info)
    description = info.description or ""
    help = (
        description + (f" Valid: {text}." if text else "") + (f" Default: {shown}." if shown not in ("", None) else "")
    )
    metavar = {int: "N", float: "X", bool: "BOOL", list: "A,B"}.get(kind, name.split("_")[-1].upper())
    words = _words(info)
    long = "--" + name.replace("_", "-")
    return Control(
        name=name,
        flags=(*extra["flags"], long),
        type=kind,
        choices=choices,
        default=default,
        description=description,
        range=text,
        help=help,
        metavar="|".join(str(c).lower() for c in choices) if choices else "|".join([*words, metavar]),
        group=extra["group"],
        minimum=low[0] if low else None,
        maximum=high[0] if high else None,
        words=words,
    )


def _kind(info: FieldInfo) -> tuple[type, tuple[str | bool, ...] | None]:
    """(plain type, choices or None) of a field's annotation."""
    parts = [typing.get_args(p)[0] if typing.get_origin(p) is typing.Annotated else p for p in _parts(info)]
    if any(typing.get_origin(p) is list for p in parts):
        return list, None
    words = tuple(a for p in parts if typing.get_origin(p) is Literal for a in typing.get_args(p))
    if words and bool in parts:
        return str, (*words, True, False)
    if words and float in parts:
        return float, None
    return (str, words) if words else (parts[0], None)


def _parts(info: FieldInfo) -> list[Any]:
    """The members of a field's union; of another annotation itself."""
    union = typing.get_origin(info.annotation) in (types.UnionType, typing.Union)
    return list(typing.get_args(info.annotation)) if union else [info.annotation]


def _words(info: FieldInfo) -> tuple[str, ...]:
    """What may stand in a number's place."""
    kind, choices = _kind(info)
    if kind is not float or choices:
        return ()
    return tuple(a for p in _parts(info) if typing.get_origin(p) is Literal for a in typing.get_args(p))


def _limits(info: FieldInfo) -> tuple[tuple[float, str] | None, tuple[float, str] | None, dict[str, Any]]:
    """((lowest, 'at least' | 'above'), (highest, 'at most' | 'below'), other constraints)."""
    low: tuple[float, str] | None = None
    high: tuple[float, str] | None = None
    other: dict[str, Any] = {}
    inner = [a for p in _parts(info) if typing.get_origin(p) is typing.Annotated for a in typing.get_args(p)[1:]]
    for m in [*info.metadata, *(m for a in inner for m in getattr(a, "metadata", ()))]:
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
