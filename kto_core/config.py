"""RunConfig: everything that decides a run. A value's default, help text and valid range live in its Field only.

The way of a value: the default in its Field ◀ presets/NAME.yaml ◀ overrides (command line, user interface). `resolve`
walks it, remembers the origin of every value and reports all problems at once. Field names are TRL's, PEFT's and
bitsandbytes' own where they have one.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from . import config_checks, paths
from .errors import ConfigError

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _field(default, help: str, *flags: str, group: str = "Training", **limits):
    """A Field with its help text and short flags; its long flag is its name with dashes."""
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return Field(description=help, json_schema_extra={"flags": list(flags), "group": group}, **factory, **limits)


def _names(value):
    """Lists as people type them: "q_proj, k_proj"; "all-linear" stays a word."""
    if isinstance(value, str) and value.strip() != "all-linear":
        return [v for v in re.split(r"[,\s]+", value.strip().strip("[]")) if v]
    return value.strip() if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_names)]
AutoOrBool = Literal["auto"] | bool


class RunConfig(BaseModel):
    """One run, complete and valid. Immutable: `resolve` makes one, ``model_copy(update=…)`` copies without a check.

    Raises:
        ConfigError: values that do not fit together. (`resolve` also turns pydantic's own errors into ConfigErrors.)
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=True)

    # what
    preset: str = _field(
        "", "Settings to start from: demo, 3b, 7b, 13b, 20b, or a YAML file.", "--model-size", group="Model and data"
    )
    model: str = _field(
        "demo", "Hub id or folder of the model to train, or demo for the embedded one.", group="Model and data",
        min_length=1,
    )  # fmt: skip
    alternatives: Names = _field([], "Other models this preset is meant for; a choice, not a setting.", group="Hidden")
    adapter: str = _field(
        "", "Folder of a LoRA adapter to go on from; a frozen copy of it is the reference. Empty: a new adapter.",
        group="Model and data",
    )  # fmt: skip
    data: str = _field(
        "", "JSONL, JSON, CSV or Parquet file, or the Hub id of a data set.", "--local-file", "--dataset-name",
        group="Model and data",
    )  # fmt: skip
    data_split: str = _field("train", "Split of a Hub data set.", group="Model and data", min_length=1)
    test_size: float = _field(
        0.0, "Share of the prompts held out to measure rewards on; 0 trains on all.", group="Model and data",
        ge=0, le=0.5,
    )  # fmt: skip
    output_dir: str = _field("", "Folder of the run. Empty: runs/<id>.", group="Model and data")
    run_name: str = _field(
        "", "A name to know the run by.", group="Model and data", pattern=r"^[^/\\\x00-\x1f]{0,100}$"
    )

    # KTO
    beta: float = _field(
        0.1, "How closely the model is held to the reference; larger is closer. Instruct models: 0.1 to 0.5.",
        group="KTO", gt=0, le=10,
    )  # fmt: skip
    desirable_weight: float = _field(
        1.0, "Weight of the desirable rows' loss. Change one of the two weights, not both.", group="KTO", gt=0, le=100
    )
    undesirable_weight: float = _field(
        1.0, "Weight of the undesirable rows' loss. Change one of the two weights, not both.", group="KTO", gt=0, le=100
    )
    loss_type: Literal["kto", "apo_zero_unpaired"] = _field(
        "kto", "kto, or apo_zero_unpaired, which has no KL reference point.", group="KTO"
    )
    kl_group: Literal["batch", "microbatch"] = _field(
        "batch", "Rows the KL is estimated on: all of an optimizer step, or one micro-batch as TRL does.",
        group="KTO",
    )  # fmt: skip
    precompute_ref_log_probs: AutoOrBool = _field(
        "auto", "Score the reference model once before training. auto: when it pays.", group="KTO"
    )

    # optimization
    per_device_train_batch_size: int = _field(4, "Rows of one micro-batch on one GPU.", "--batch-size", ge=1, le=1024)
    gradient_accumulation_steps: int = _field(
        8, "Micro-batches added up before the weights change.", "--gradient-accumulation", ge=1, le=4096
    )
    learning_rate: float = _field(5e-7, "Step size at its peak.", gt=0, le=0.1)
    num_train_epochs: float = _field(1.0, "Times every row is seen.", "--num-epochs", gt=0, le=1000)
    max_steps: int = _field(-1, "Optimizer steps; -1: as many as the epochs make.", ge=-1)
    max_length: int = _field(
        2048, "Longest row in tokens; longer prompts are cut from the left, answers never.", "--max-seq-length", ge=16,
        le=1_048_576,
    )  # fmt: skip
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = _field(
        "cosine", "How the learning rate falls after the warm-up."
    )
    warmup_ratio: float = _field(0.1, "Share of the steps in which the learning rate rises to its peak.", ge=0, lt=1)
    optim: Literal["adamw_8bit", "paged_adamw_8bit", "adamw_torch", "adamw_torch_fused"] = _field(
        "adamw_8bit", "Optimizer. The 8-bit ones keep their state in a quarter of the memory."
    )
    weight_decay: float = _field(0.0, "Decay of the adapter's weights.", ge=0, le=1)
    max_grad_norm: float = _field(1.0, "Gradients longer than this are scaled down; 0 never.", ge=0, le=1000)
    seed: int = _field(3407, "Decides the order of rows, the adapter's start and the split.", ge=0, le=2**32 - 1)

    # LoRA
    r: int = _field(64, "LoRA rank: more can learn more and needs more memory.", group="LoRA", ge=1, le=1024)
    lora_alpha: int = _field(128, "LoRA scale; the adapter counts alpha / r.", group="LoRA", ge=1, le=8192)
    lora_dropout: float = _field(0.0, "Dropout inside the adapter.", group="LoRA", ge=0, lt=1)
    target_modules: Literal["all-linear"] | Names = _field(
        TARGETS, "Layers that get an adapter, separated by commas, or all-linear.", group="LoRA", min_length=1
    )

    # precision and memory
    load_in_4bit: bool = _field(True, "Hold the frozen weights in 4 bits.", group="Memory and speed")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = _field("nf4", "The 4-bit number format.", group="Memory and speed")
    bnb_4bit_use_double_quant: bool = _field(
        True, "Quantize the quantization constants as well.", group="Memory and speed"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _field(
        "auto", "Number format of activations. auto: bfloat16 where the card has it, float32 on a CPU.",
        group="Memory and speed",
    )  # fmt: skip
    gradient_checkpointing: AutoOrBool = _field(
        "auto", "Compute activations twice to save memory. auto: in as many layers as memory asks for.",
        group="Memory and speed",
    )  # fmt: skip
    engine: Literal["auto", "packed", "unsloth", "trl"] = _field(
        "auto", "Who computes the steps. auto: packed where it serves the model, else trl.", group="Memory and speed"
    )
    worker: Literal["thread", "process"] = _field(
        "thread", "Where training runs: inside the app, or in a process that outlives it.", group="Memory and speed"
    )
    num_gpus: int = _field(1, "GPUs to train on.", group="Memory and speed", ge=1, le=64)
    shard: AutoOrBool = _field(
        "auto", "Divide the frozen weights over the GPUs instead of holding all on each (packed engine). auto: when "
        "one GPU does not hold them.", group="Memory and speed",
    )  # fmt: skip

    # what is written
    logging_steps: int = _field(1, "Steps between two points of the curves.", group="Logging and checkpoints", ge=1)
    eval_steps: int = _field(
        50, "Steps between two evaluations on the held-out rows, if any.", group="Logging and checkpoints", ge=1
    )
    save_steps: int = _field(50, "Steps between two checkpoints.", group="Logging and checkpoints", ge=1)
    save_total_limit: int = _field(
        2, "Checkpoints kept; older ones are deleted.", group="Logging and checkpoints", ge=1
    )
    report_to: Literal["none", "wandb"] = _field(
        "none", "Also log to Weights & Biases.", "--wandb", group="Logging and checkpoints"
    )
    wandb_project: str = _field(
        "kto-studio", "Project at Weights & Biases.", group="Logging and checkpoints", min_length=1
    )

    @property
    def effective_batch_size(self) -> int:
        """Rows of one optimizer step, over all GPUs: the KL group of ``kl_group: batch``."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_gpus

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> RunConfig:
        if self.needs_process and "worker" not in self.model_fields_set:
            object.__setattr__(self, "worker", "process")
        context = info.context or {}
        if problems := config_checks.cross(self, context.get("bad", set()), model=context.get("model", True)):
            raise ConfigError(problems)
        return self

    @property
    def needs_process(self) -> bool:
        """Unsloth must be imported before everything else, several GPUs need a process each: no thread can do that."""
        return self.engine == "unsloth" or self.num_gpus > 1


@dataclass
class Resolved:
    """A valid configuration and where each of its values comes from."""

    config: RunConfig
    origins: dict[str, str]  # "default" | "preset 7b" | "command line" | "user interface" | "because of num_gpus"


# ---- presets --------------------------------------------------------------------------------------------------------


def presets() -> dict[str, dict]:
    """The shipped presets, smallest first: name -> its YAML's values, ``description`` among them."""

    def size(path: Path) -> float:
        found = re.match(r"[\d.]+", path.stem)
        return float(found.group()) if found else 0.0

    return {p.stem: _read_yaml(p) for p in sorted(paths.PRESETS.glob("*.yaml"), key=size)}


def default_preset() -> str:
    """``7b`` where there is a GPU, else ``demo``."""
    from .hardware import devices

    return "7b" if devices() else "demo"


def _preset_values(preset: str) -> tuple[str, dict]:
    """(name, values without the description) of a shipped preset or of a YAML file, a run's config.yaml included."""
    path = paths.PRESETS / f"{preset}.yaml"
    if re.fullmatch(r"[\w.-]+", preset) and path.is_file():
        name, values = preset, _read_yaml(path)
    elif preset.endswith((".yaml", ".yml")):
        name, values = preset, _read_yaml(Path(preset).expanduser())
        values.pop("preset", None)
    else:
        names = list(presets())
        near = config_checks.nearest(preset, names)
        names = ", ".join(names)
        raise ConfigError(f"preset: there is no preset {preset!r}.{near} Choose one of {names}, or a YAML file.")
    return name, {k: v for k, v in values.items() if k not in ("description", "origins")}


def _read_yaml(path: Path) -> dict:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"The settings file {path} cannot be read: {e.strerror}. Check its name.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"The settings file {path} is no valid YAML ({' '.join(str(e).split())}). Mend it.") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise ConfigError(f"The settings file {path} must hold lines of the form `name: value`.")
    return values


# ---- resolving ------------------------------------------------------------------------------------------------------


def resolve(preset: str | None = None, overrides: dict | None = None, origin: str = "command line") -> Resolved:
    """Defaults, then the preset, then the overrides; every value with its origin.

    Args:
        preset: a shipped preset's name or a YAML file; None or "" takes `default_preset`.
        overrides: field -> value, as text where it was typed; None means "not given". A value that changes nothing
            keeps the origin it had.
        origin: who gave the overrides.

    Raises:
        ConfigError: ``problems`` has all of them, each naming its field and what is valid.
    """
    name, values = _preset_values((preset or "").strip() or default_preset())
    given = {k: v.strip() if isinstance(v, str) else v for k, v in (overrides or {}).items() if v is not None}
    given.pop("preset", None)
    base, problems = _check({**values, "preset": name}, source=f" (preset {name})")
    config, more = _check({**values, "preset": name, **given})
    problems = more or (problems if base is None and not given else [])
    if problems:
        raise ConfigError(problems)

    origins = {f: f"preset {name}" if f in values or f == "preset" else "default" for f in RunConfig.model_fields}
    for field in given:
        if base is None or getattr(config, field) != getattr(base, field):
            origins[field] = origin
    if config.needs_process and "worker" not in {**values, **given}:
        origins["worker"] = "because of num_gpus" if config.num_gpus > 1 else "because of engine"
    return Resolved(config, origins)


def _check(values: dict, source: str = "", *, model: bool = True) -> tuple[RunConfig | None, list[str]]:
    """(config, []) or (None, all problems). Fields that are wrong in themselves are left out of the cross-checks."""
    bad: set[str] = set()
    problems: list[str] = []
    while True:
        try:
            config = RunConfig.model_validate({k: v for k, v in values.items() if k not in bad},
                                              context={"bad": bad, "model": model})  # fmt: skip
        except ValidationError as e:
            found = config_checks.explain(e, values, RunConfig.model_fields)
            problems += [p + source for p in found.values()]
            bad |= found.keys()
            continue
        except ConfigError as e:
            return None, problems + [p + source for p in e.problems]
        return (None, problems) if problems else (config, [])


# ---- a run's config.yaml --------------------------------------------------------------------------------------------


def save_config(resolved: Resolved, path: str | os.PathLike) -> None:
    """Write config.yaml: every value with its origin beside it, whole or not at all.

    The file is also a preset: ``--preset runs/ID/config.yaml`` trains with the same settings.
    """
    import yaml

    path = Path(path)
    lines = ["# The settings of this run; behind each value where it comes from."]
    for name, value in resolved.config.model_dump().items():
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
        text = text.removesuffix("...\n").rstrip("\n")  # the mark behind a document that is one word
        lines.append(f"{name}: {text}  # {resolved.origins.get(name, 'default')}")
    lines += ["", yaml.safe_dump({"origins": resolved.origins}, sort_keys=False, allow_unicode=True, width=10_000)]
    part = path.with_name(path.name + ".part")
    part.write_text("\n".join(lines), encoding="utf-8")
    os.replace(part, path)


def load_config(path: str | os.PathLike) -> Resolved:
    """Read what `save_config` wrote.

    Raises:
        ConfigError: the file cannot be read, or its values are not valid.
    """
    values = _read_yaml(Path(path))
    origins = values.pop("origins", {})
    config, problems = _check(values, f" ({path})", model=False)  # the model may have moved since; the run is as it was
    if config is None:
        raise ConfigError(problems)
    return Resolved(config, {f: str(origins.get(f, "default")) for f in RunConfig.model_fields})


def as_trl(config: RunConfig) -> dict:
    """The values under TRL's, PEFT's and bitsandbytes' names, as ``--dry-run --json`` shows them. JSON types only.

    Our fields carry those names already; ``warmup_steps`` repeats ``warmup_ratio``: transformers 5 takes a share there.
    """
    values = config.model_dump(mode="json", exclude={"alternatives"})
    return {**values, "warmup_steps": config.warmup_ratio, "effective_batch_size": config.effective_batch_size}


def cli_fields() -> list[config_checks.Control]:
    """What the command line and the interface build their controls from: one for each field, help text and range."""
    return [config_checks.control(name, info) for name, info in RunConfig.model_fields.items()]


def remarks(config: RunConfig) -> list[str]:
    """Sentences about settings that are valid but rarely meant."""
    return config_checks.remarks(config)
