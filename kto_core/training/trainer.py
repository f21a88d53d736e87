"""TRL's KTOTrainer on exactly our token ids, with fp32 adapters and checkpoints that are whole or not there.

`studio_class` puts the same few changes on TRL's trainer, on the packed engine's and on Unsloth's patched one:

- the data are ours (`encoded_dataset`), already in the order they are trained in; nothing is tokenized again;
- adapters stay in fp32 (TRL casts them to bf16 with a quantized base, where small steps round to nothing);
- no second ``ref`` adapter for a fresh LoRA (the base is the reference), and none in any save;
- saves are atomic and carry what a resumed run needs to log the same metrics (half-averaged ones included);
- a loss that is not finite ends the run.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kto_core import files, reporting
from kto_core.errors import DiskError
from kto_core.hardware import out_of_memory
from kto_core.models.tokenizer import save_tokenizer
from kto_core.runs import checkpoints
from kto_core.runs.stopping import AT_ONCE, StopNow, StopWatch

from .callbacks import not_finite
from .trl_retry import MicroBatches

if TYPE_CHECKING:
    from kto_core.config.run_config import RunConfig

METERS = "meters.json"  # in a checkpoint: metrics gathered since the last log


def encoded_dataset(encoded: list, labels: list[bool], batch: int, *, kl: bool, keys: bool = False):
    """datasets.Dataset with TRL's columns from `template.Encoded` rows, in the given order.

    Args:
        batch: rows of a micro-batch. The KL completion of a row is its predecessor's, the first one's the last's of
            the same micro-batch, which is TRL's pairing; a micro-batch of one row takes the row's before it, where TRL
            would take the row's own (a KL equal to its reward: no signal).
        kl: False for losses without a KL term.
        keys: with ``prompt_key``, by which the packed engine knows rows of the same prompt although it was cut.
    """
    from datasets import Dataset

    from kto_core.engine.packing.groups import Ragged

    columns = {
        "prompt_ids": [list(e.prompt_ids) for e in encoded],
        "completion_ids": [list(e.completion_ids) for e in encoded],
        "label": [bool(label) for label in labels],
    }
    if keys:
        columns["prompt_key"] = Ragged.of([e.whole_prompt or e.prompt_ids for e in encoded]).keys()
    if kl:
        columns["KL_completion_ids"] = [list(encoded[i].completion_ids) for i in kl_partners(len(encoded), batch)]
    return Dataset.from_dict(columns)


def kl_partners(rows: int, batch: int) -> list[int]:
    """For each row, the index of the row whose completion is its mismatched one."""
    partners = []
    for start in range(0, rows, batch):
        size = min(batch, rows - start)
        partners += [start + (i - 1) % size for i in range(size)]
        if size == 1 and rows > 1:
            partners[-1] = start - 1
    return partners


def studio_class(base: type) -> type:
    """``base`` (a KTOTrainer) with this project's changes."""
    return type("Studio" + base.__name__, (_Studio, base), {})


@dataclass(frozen=True)
class Surroundings:
    """What a trainer knows of the run around it.

    Attributes:
        base: the base model's public name. fresh_adapter: the adapter is a new one.
        makes_room: more is recomputed after running out of memory: TRL's own step.
        reference_progress: is told how many rows TRL has scored. advice: what helps where memory is short.
    """

    watch: StopWatch
    base: str
    fresh_adapter: bool
    makes_room: bool
    reference_progress: Callable[[int], None]
    advice: Callable[[], str]


class _Studio:
    """Mixin before a KTOTrainer."""

    def __init__(self, *args, studio: Surroundings, **kwargs):
        from kto_core.engine.layers import dropout

        self.studio = studio
        self._batches = MicroBatches(self) if studio.makes_room else None
        dropout.switch_off(kwargs["model"])  # before TRL scores the reference
        super().__init__(*args, **kwargs)
        if studio.fresh_adapter and "ref" in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter("ref")  # a copy of nothing: with adapters off the base is the same reference
        for name, parameter in self.model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data = parameter.data.float()

    # -- data: as planned --

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def _send_telemetry(self) -> None:
        """Nothing is reported to anybody."""

    def create_model_card(self, *args, **kwargs) -> None:
        """The export writes the card, with the numbers of the run."""

    # -- the step --

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # resumed at its end: the loop would train one step more
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        if self.studio.watch.now.is_set():
            raise StopNow(AT_ONCE)
        compute = super().training_step
        loss = self._batches.run(compute, *args, **kwargs) if self._batches else compute(*args, **kwargs)
        if not loss.isfinite().all():
            raise not_finite(self.state.global_step + 1)
        return loss

    def forget_batches(self) -> None:
        """What was computed so far is of no step of the run."""
        self._batches = MicroBatches(self) if self.studio.makes_room else None

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """The schedule, with a warm-up that begins above 0: a step at rate 0 would change nothing."""
        fresh = self.lr_scheduler is None
        schedule = super().create_scheduler(num_training_steps, optimizer)
        if fresh and (warmup := self.args.get_warmup_steps(num_training_steps)):
            lambdas = schedule.lr_lambdas  # a constant schedule has no warm-up, whatever its share
            schedule.lr_lambdas = [warming(fn, warmup) if fn(0) == 0 else fn for fn in lambdas]
            for group, fn in zip(schedule.optimizer.param_groups, schedule.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * fn(0)
            schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]
        return schedule

    def no_room(self, longest: int):
        return out_of_memory.error(longest, self.studio.advice())

    def _precompute_ref_logps(self, *args, **kwargs):
        with _quiet():
            return super()._precompute_ref_logps(*args, **kwargs)

    def compute_ref_log_probs(self, model, inputs):
        self.studio.watch.check()
        self.studio.reference_progress(len(inputs["label"]))
        return super().compute_ref_log_probs(model, inputs)

    def prediction_step(self, *args, **kwargs):
        if self.studio.watch.now.is_set():
            raise StopNow(AT_ONCE)
        return super().prediction_step(*args, **kwargs)

    # -- saving and resuming --

    def _save(self, output_dir=None, state_dict=None) -> None:
        save_adapter(self.model, self.processing_class, Path(output_dir or self.args.output_dir), self.studio.base)

    def _save_checkpoint(self, model, trial) -> None:
        """Into ``checkpoint-N`` below a ``.part`` folder, sealed, then renamed."""
        root, main = Path(self.args.output_dir), self.is_world_process_zero()
        work, name = root / "saving.part", f"checkpoint-{self.state.global_step}"
        if main:
            shutil.rmtree(work, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        meters = self._meters()  # of all processes
        limit, self.args.save_total_limit, self.args.output_dir = self.args.save_total_limit, None, str(work)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if main:
                (work / name / METERS).write_text(json.dumps(meters))
                files.seal(work / name, sync=True)
                files.move_into_place(work / name, root / name, sync=True)
                checkpoints.rotate(root, limit)
        except Exception as e:  # torch and safetensors report a full disk with errors of their own
            if not no_space(e):
                raise
            free = shutil.disk_usage(root).free
            raise DiskError(
                f"The disk is full ({free / 2**20:.0f} MiB free): checkpoint {self.state.global_step} was not saved. "
                "Earlier checkpoints are complete. Free up disk space, then resume."
            ) from e
        finally:
            self.args.save_total_limit, self.args.output_dir = limit, str(root)
            if main:
                shutil.rmtree(work, ignore_errors=True)

    def _meters(self) -> dict:
        # TRL logs the mean of the processes' losses: each goes on with the mean of what they had
        loss = self.accelerator.gather(self._tr_loss.reshape(1)).mean()
        return {
            "metrics": {k: list(v) for k, v in self._metrics["train"].items()},
            "tokens": self._total_train_tokens,
            "loss": loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
        }

    def restore_meters(self, checkpoint: Path) -> None:
        """Go on with the averages that were begun before ``checkpoint`` was saved (called when training begins)."""
        meters = json.loads((checkpoint / METERS).read_text())
        self._metrics["train"] = defaultdict(list, meters["metrics"])
        self._total_train_tokens = meters["tokens"]
        self._tr_loss += meters["loss"]
        self._total_loss_scalar = meters["total_loss"]
        self._globalstep_last_logged = meters["last_logged"]


def warming(schedule: Callable[[int], float], steps: int) -> Callable[[int], float]:
    """``schedule`` (step -> share of the peak rate) whose first ``steps`` rise evenly to it and leave out 0."""
    return lambda step: (step + 1) / (steps + 1) if step < steps else schedule(step)


def save_adapter(model, tokenizer, folder: Path, base: str) -> None:
    """The trained adapter (never the reference's copy) and the tokenizer into ``folder``.

    Args:
        base: the base model's public name, which the adapter's configuration will carry.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # save_embedding_layers: "auto" asks the Hub whether the vocabulary grew; it cannot here
    model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
    config = folder / "adapter_config.json"
    values = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
    config.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    save_tokenizer(tokenizer, folder)


@contextlib.contextmanager
def _quiet():
    """No bars in the app's terminal: progress is in the run's events."""
    import datasets

    before, shown = os.environ.get("TQDM_DISABLE"), datasets.utils.are_progress_bars_disabled()
    os.environ["TQDM_DISABLE"] = "1"
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        os.environ.pop("TQDM_DISABLE") if before is None else os.environ.update(TQDM_DISABLE=before)
        if not shown:
            datasets.enable_progress_bars()


def no_space(e: BaseException) -> bool:
    """Whether an error of any library means that the disk is full."""
    text = str(e)
    full = getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left" in text or "file write failed" in text or "unexpected pos" in text


def arguments(
    config: RunConfig, folder: Path, *, rate: float, precompute: bool, checkpointing: dict | None, evaluate: bool
):
    """TRL's KTOConfig for a run.

    Args:
        folder: where checkpoints go.
        rate: the peak learning rate.
        precompute: score the reference before training.
        checkpointing: gradient checkpointing's keywords, or None for none.
        evaluate: there are held-out rows.
    """
    import torch
    from trl import KTOConfig

    from kto_core.models.load import training_dtype

    gpu = torch.cuda.is_available()
    dtype = training_dtype(config)
    args = KTOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=rate,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        max_length=None,  # rows are cut where they are encoded; the collator would cut answers
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        loss_type=config.loss_type,
        router_aux_loss_coef=0.0,  # routers are frozen: it would only bend the adapters, and the loss that is shown
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_ratio,  # below 1 it is a share of all steps
        optim=optimizer(config, gpu),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        precompute_ref_log_probs=precompute,
        gradient_checkpointing=checkpointing is not None,
        gradient_checkpointing_kwargs=checkpointing,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16 and gpu,
        use_cpu=not gpu,
        logging_strategy="steps",
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # it would hide what should end the run
        eval_strategy="steps" if evaluate else "no",
        eval_steps=config.eval_steps if evaluate else None,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        run_name=config.run_name or folder.parent.name,
        remove_unused_columns=False,
        dataloader_pin_memory=gpu,
        disable_tqdm=True,
        **reporting.arguments(config),
    )
    if "LOCAL_RANK" not in os.environ:
        args._n_gpu = min(1, args.n_gpu)  # one process uses one card, however many there are
    if not gpu:  # several processes would have cpu:0, a place that torch.load does not know when they resume
        args._setup_devices = torch.device("cpu")
    return args


def optimizer(config: RunConfig, gpu: bool) -> str:
    """8-bit and fused optimizers need a GPU; on a CPU their plain form computes the same."""
    return config.optim if gpu else "adamw_torch"
