"""RunConfig: everything that decides a run. A value's default, help text and valid range live in its Field only.

Field names are TRL's, PEFT's and bitsandbytes' own where they have one. What makes a configuration valid beyond its
types is here, too: every sentence starts with the field's name and says what is valid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Set
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from kto_core.errors import ConfigError

from . import column_map
from .thresholds import disorder

OUTPUT_LAYERS = ("lm_head", "embed_tokens", "embed_out", "wte")


def _field(default: Any, help: str, *flags: str, group: str = "Training", **limits: Any) -> Any:
    """A Field with its help text and short flags; its long flag is its name with dashes."""
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return Field(description=help, json_schema_extra={"flags": list(flags), "group": group}, **factory, **limits)


def _names(value: object) -> object:
    """Lists as people type them: "q_proj, k_proj"; "all-linear" stays a word."""
    if isinstance(value, str) and value.strip() != "all-linear":
        return [v for v in re.split(r"[,\s]+", value.strip().strip("[]")) if v]
    return value.strip() if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_names)]
Threshold = Annotated[float, Field(allow_inf_nan=False)] | None
AutoOrBool = Literal["auto"] | bool
TestSize = Literal["auto"] | Annotated[float, Field(ge=0, le=0.5)]
Rate = Literal["auto", "rule"] | Annotated[float, Field(gt=0, le=0.1)]
EARLIER_RATE = 5e-7  # of the tool that this one follows


class RunConfig(BaseModel):
    """One run, complete and valid. Immutable: `resolve` makes one, ``model_copy(update=…)`` copies without a check.

    Raises:
        ConfigError: values that do not fit together. (`resolve` also turns pydantic's own errors into ConfigErrors.)
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=True)

    # what
    preset: str = _field(
        "", "Preset to start from: demo, 3b, 4b, 7b, 8b, 13b, 14b, 20b, 27b, 30b-a3b, or a YAML file.", "--model-size",
        group="Model and data",
    )  # fmt: skip
    model: str = _field(
        "demo", "Hub id or folder of the model to train, or demo for the built-in model.", group="Model and data",
        min_length=1,
    )  # fmt: skip
    alternatives: Names = _field(
        [], "Other models this preset works for. Offered in the model list; not a setting.", group="Hidden"
    )
    adapter: str = _field(
        "", 
            "Folder of a LoRA adapter to continue from; a frozen copy of it becomes the reference model. Empty: a "
            "new adapter.",
        group="Model and data",
    )  # fmt: skip
    data: str = _field(
        "", "JSONL, JSON, CSV or Parquet file, or the Hub id of a dataset.", "--local-file", "--dataset-name",
        group="Model and data",
    )  # fmt: skip
    data_split: str = _field("train", "Split of a Hub dataset.", group="Model and data", min_length=1)
    map: str = _field(
        "", 
            "Which column of the dataset is which, for example prompt=question,completion=answer,label=rating. "
            "Columns that are not named are recognized.",
        group="Model and data",
    )  # fmt: skip
    good_from: Threshold = _field(
        None, "Labels on a scale: rows rated this or higher are good.", group="Model and data"
    )
    bad_to: Threshold = _field(
        None, "Labels on a scale: rows rated this or lower are bad. Rows between the two thresholds are left out.",
        group="Model and data",
    )  # fmt: skip
    thinking: Literal["rows", "off", "on"] = _field(
        "rows",
        "Thoughts of reasoning models. rows: as each row has them; off: thoughts of the trained answers are left out; "
        "on: every prompt asks for a thought.",
        group="Model and data",
    )
    train_thoughts: bool = _field(
        True, "Train on an answer's thought too. Without it, only the answer after the thought is trained.",
        group="Model and data",
    )  # fmt: skip
    test_size: TestSize = _field(
        "auto",
        "Fraction of the questions held out of training, for validation and the verdict. auto: a tenth, at most 500 "
        "rows. 0: none.",
        group="Model and data",
    )
    split_by: Literal["question", "prompt"] = _field("question", "What may not lie on both sides of the split.",
                                                     group="Hidden")  # fmt: skip
    verdict: bool = _field(
        True, "When training ends, say whether the run is better, with the rows that were held out.",
        group="Model and data",
    )  # fmt: skip
    output_dir: str = _field("", "Output folder of the run. Empty: runs/<id>.", group="Model and data")
    run_name: str = _field("", "A name for the run.", group="Model and data", pattern=r"^[^/\\\x00-\x1f]{0,100}$")

    # KTO
    beta: float = _field(
        0.1, "How close the model stays to the reference model; higher is closer. Instruct models: 0.1 to 0.5.",
        group="KTO", gt=0, le=10,
    )  # fmt: skip
    desirable_weight: float = _field(
        1.0, "Loss weight of the good rows. Change only one of the two weights.", group="KTO", gt=0, le=100
    )
    undesirable_weight: float = _field(
        1.0, "Loss weight of the bad rows. Change only one of the two weights.", group="KTO", gt=0, le=100
    )
    loss_type: Literal["kto", "apo_zero_unpaired"] = _field(
        "kto", "Loss function: kto, or apo_zero_unpaired, which has no KL term.", group="KTO"
    )
    kl_group: Literal["batch", "microbatch"] = _field(
        "batch", "Rows the KL term is estimated on: the whole optimizer batch, or each micro-batch as in TRL.",
        group="KTO",
    )  # fmt: skip
    precompute_ref_log_probs: AutoOrBool = _field(
        "auto", "Compute the reference log-probs once, before training. auto: when it saves time.", group="KTO"
    )

    # optimization
    per_device_train_batch_size: int = _field(4, "Rows per micro-batch on each GPU.", "--batch-size", ge=1, le=1024)
    gradient_accumulation_steps: int = _field(
        8, "Micro-batches per optimizer step.", "--gradient-accumulation", ge=1, le=4096
    )
    learning_rate: Rate = _field(
        "auto",
        "Peak learning rate. auto: found by short trials. rule: computed from steps, alpha and model size.",
    )
    num_train_epochs: float = _field(1.0, "Number of passes over the dataset.", "--num-epochs", gt=0, le=1000)
    max_steps: int = _field(-1, "Maximum number of optimizer steps. -1: set by the number of epochs.", ge=-1)
    max_length: int = _field(
        2048, "Maximum row length in tokens. Longer prompts are truncated from the left; answers never are.",
        "--max-seq-length", ge=16, le=1_048_576,
    )  # fmt: skip
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = _field(
        "cosine", "Learning rate schedule after warmup."
    )
    warmup_ratio: float = _field(0.1, "Fraction of the steps used for learning rate warmup.", ge=0, lt=1)
    optim: Literal["adamw_8bit", "paged_adamw_8bit", "adamw_torch", "adamw_torch_fused"] = _field(
        "adamw_8bit", "Optimizer. The 8-bit optimizers need a quarter of the memory for their state."
    )
    weight_decay: float = _field(0.0, "Weight decay of the adapter.", ge=0, le=1)
    max_grad_norm: float = _field(1.0, "Clip the gradient norm to this value. 0: no clipping.", ge=0, le=1000)
    seed: int = _field(
        3407,
        "Random seed for the row order, the adapter's initialization and the validation split.",
        ge=0,
        le=2**32 - 1,
    )

    # LoRA
    r: int = _field(64, "LoRA rank. A higher rank can learn more and needs more memory.", group="LoRA", ge=1, le=1024)
    lora_alpha: int = _field(128, "LoRA scaling: the adapter is multiplied by alpha / r.", group="LoRA", ge=1, le=8192)
    lora_dropout: float = _field(0.0, "No effect: dropout is off with every engine.", group="LoRA", ge=0, lt=1)
    target_modules: Literal["all-linear"] | Names = _field(
        "all-linear",
        "Modules that get a LoRA adapter, separated by commas. all-linear: all linear layers of the language model.",
        group="LoRA", min_length=1,
    )  # fmt: skip

    # precision and memory
    load_in_4bit: bool = _field(True, "Load the base model's weights in 4-bit.", group="Memory and speed")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = _field("nf4", "4-bit data type.", group="Memory and speed")
    bnb_4bit_use_double_quant: bool = _field(
        True, "Quantize the quantization constants as well.", group="Memory and speed"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _field(
        "auto", "Precision of the computation. auto: bfloat16 if the GPU supports it, float32 on a CPU.",
        group="Memory and speed",
    )  # fmt: skip
    gradient_checkpointing: AutoOrBool = _field(
        "auto", "Recompute activations in the backward pass to save memory. auto: only in as many layers as needed.",
        group="Memory and speed",
    )  # fmt: skip
    engine: Literal["auto", "packed", "unsloth", "trl"] = _field(
        "auto", "Training engine. auto: packed if it supports the model, otherwise trl.", group="Memory and speed"
    )
    worker: Literal["thread", "process"] = _field(
        "thread",
        "Where training runs: inside the app, or in a separate process that keeps running when the app closes.",
        group="Memory and speed",
    )
    num_gpus: int = _field(1, "Number of GPUs to train on.", group="Memory and speed", ge=1, le=64)
    shard: AutoOrBool = _field(
        "auto", 
            "Shard the base model's weights across the GPUs instead of copying them to each (packed engine only). "
            "auto: when they do not fit on one GPU.", group="Memory and speed",
    )  # fmt: skip

    # what is written
    logging_steps: int = _field(1, "Number of steps between logged metrics.", group="Logging and checkpoints", ge=1)
    eval_steps: int = _field(
        50,
        "Number of steps between evaluations on the validation rows, if there are any.",
        group="Logging and checkpoints",
        ge=1,
    )
    save_steps: int = _field(50, "Number of steps between checkpoints.", group="Logging and checkpoints", ge=1)
    save_total_limit: int = _field(
        2, "Number of checkpoints to keep. Older ones are deleted.", group="Logging and checkpoints", ge=1
    )
    report_to: Literal["none", "wandb", "tensorboard", "trackio"] = _field(
        "none", "Also log to Weights & Biases, TensorBoard (files in the run's folder) or Trackio (on this machine).",
        "--wandb", group="Logging and checkpoints",
    )  # fmt: skip
    wandb_project: str = _field(
        "kto-studio", "Weights & Biases or Trackio project.", group="Logging and checkpoints", min_length=1
    )

    @property
    def effective_batch_size(self) -> int:
        """Rows of one optimizer step, over all GPUs: the KL group of ``kl_group: batch``."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_gpus

    @property
    def cuts_scale(self) -> bool:
        """Whether labels are numbers on a scale, cut by thresholds."""
        return self.good_from is not None or self.bad_to is not None

    @property
    def reading(self) -> dict[str, Any]:
        """How the data set's rows are read: keywords of `kto_core.data.dataset.load`."""
        return {"good_from": self.good_from, "bad_to": self.bad_to, "columns": self.map}

    def steps(self, rows: int) -> int:
        """Optimizer steps of a run over ``rows`` training rows, counted as transformers' Trainer counts them."""
        if self.max_steps > 0:
            return self.max_steps
        micro = math.ceil(rows / (self.per_device_train_batch_size * self.num_gpus))
        per_epoch = max(1, math.ceil(micro / self.gradient_accumulation_steps))
        return math.ceil(self.num_train_epochs * per_epoch)

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> RunConfig:
        if self.needs_process and "worker" not in self.model_fields_set:
            object.__setattr__(self, "worker", "process")
        if problems := cross(self, (info.context or {}).get("bad", set())):
            raise ConfigError(problems)
        return self

    @property
    def needs_process(self) -> bool:
        """Unsloth must be imported before everything else, several GPUs need a process each: no thread can do that."""
        return self.engine == "unsloth" or self.num_gpus > 1


# ---- cross-checks ---------------------------------------------------------------------------------------------------


def cross(c: RunConfig, bad: Set[str] = frozenset()) -> list[str]:
    """All problems between fields.

    Args:
        bad: fields that are wrong in themselves; checks that touch one are left out.

    Returns:
        One sentence each; empty if all fits.
    """
    problems = []

    def wrong(fields: tuple[str, ...], is_wrong: bool, sentence: str) -> None:
        if is_wrong and bad.isdisjoint(fields):
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
        "per_device_train_batch_size: must be at least 2 with kl_group microbatch, because the KL term needs a "
        "second row. Raise it, or set kl_group to batch.",
    )
    wrong(
        ("per_device_train_batch_size", "engine", "loss_type"),
        lone and c.kl_group == "batch" and c.engine in ("trl", "unsloth"),
        f"per_device_train_batch_size: must be at least 2 with engine {c.engine}, which estimates the KL term within "
        "a micro-batch. Raise it, or set engine to packed.",
    )
    targets = [c.target_modules] if isinstance(c.target_modules, str) else c.target_modules
    outputs = sorted({t for t in targets if t.rpartition(".")[2] in OUTPUT_LAYERS})
    wrong(
        ("target_modules",),
        bool(outputs),
        f"target_modules: {', '.join(outputs)} cannot be trained with KTO. Use attention and MLP projections, for "
        "example q_proj, v_proj, down_proj, or all-linear.",
    )
    wrong(
        ("target_modules",),
        isinstance(c.target_modules, list) and "all-linear" in targets,
        "target_modules: all-linear cannot be combined with other names.",
    )
    disordered = disorder(c.good_from, c.bad_to)
    wrong(("good_from", "bad_to"), bool(disordered), disordered)
    wrong(("map",), bool(mapped := column_map.wrong(c.map)), mapped)
    wrong(("max_steps",), c.max_steps == 0, "max_steps: must be -1 (set by the number of epochs) or at least 1, not 0.")
    wrong(
        ("worker", "engine", "num_gpus"),
        c.needs_process and c.worker == "thread",
        "worker: must be process with "
        + (f"num_gpus {c.num_gpus}" if c.num_gpus > 1 else "engine unsloth, which must be imported first")
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
        f"shard: must be auto or false with engine {c.engine}, which cannot shard weights. Set shard to auto, or "
        "engine to packed.",
    )
    wrong(
        ("engine", "kl_group"),
        c.engine == "packed" and c.precompute_ref_log_probs is False,
        "precompute_ref_log_probs: must be auto or true with engine packed, which always computes the reference "
        "log-probs first.",
    )
    return problems
