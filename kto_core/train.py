"""RunConfig -> a trained adapter in a run folder. `train` is one function: in a thread of the app, or in a child.

What happens is told through the run's events (`kto_core.events`); the run ends with a terminal status, written last.
This module knows nothing of threads, processes or who watches; `kto_core.run` does.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import alive, checkpoints, memory_plan, model_info, out_of_memory, ranks
from .dry_run import dry_run  # noqa: F401 - a door of this module
from .errors import Cancelled, ConfigError, DataError, HardwareError, KTOError, NotServed
from .events import EventLog, read
from .train_choices import choose_engine, precompute_pays, use_checkpointing, use_sharding, used
from .train_data import Planned, plan_data, write_dataset_json

if TYPE_CHECKING:
    from .config import RunConfig
    from .stopping import StopWatch


def train(config: RunConfig, run_dir: Path, *, end_on_second_stop: bool = False) -> None:
    """Train and save the adapter into ``run_dir/adapter``; resumes from the newest whole checkpoint if there is one.

    Errors end in the run's events (state ``failed``), with the traceback of a bug in ``run_dir/train.log``.

    Args:
        config: a valid configuration.
        run_dir: the run's folder; made if need be.
        end_on_second_stop: this process exists for the run only, so a second stop may end it.

    Raises:
        BusyError: the run is being trained already.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    if ranks.rank():  # a helper of several GPUs: the main process tells and decides
        _train_helper(config, run_dir)
        return
    ranks.end_with_others(run_dir)
    with alive.holding(run_dir):
        events = EventLog(run_dir / "events.jsonl")
        state, message = _guarded(config, run_dir, events, end_on_second_stop)
        with contextlib.suppress(OSError):
            (run_dir / "stop").unlink(missing_ok=True)
            events.status(state, message=message)


def _guarded(config: RunConfig, run_dir: Path, events: EventLog, end_on_second_stop: bool) -> tuple[str, str]:
    """Run `_train`; whatever happens becomes the terminal state and its message."""
    events.status("preparing", message="Starting.")
    from .train_logs import captured

    with captured(events, run_dir / "train.log") as log:
        try:
            from .hardware import claim
            from .stopping import StopNow, Stopped, StopWatch, end_process

            def end_now() -> None:
                try:
                    events.status("stopped", message="Stopped at once; the last checkpoint is the newest saved state.")
                finally:  # also on a full disk
                    end_process()

            with (
                StopWatch(run_dir, events, end_now if end_on_second_stop else None) as watch,
                claim("train", run_dir.name),
            ):
                return _train(config, run_dir, events, watch)
        except Exception as e:
            kept = traceback.format_exc()
            error = e if isinstance(e, KTOError) else _understood(e)
            second = error is None or isinstance(error, Stopped | StopNow | Cancelled | ranks.LostError)
            if second and (first := ranks.first_error(run_dir)):  # why nobody answers, or the launcher ended us
                error = KTOError(first)
            elif isinstance(e, Stopped | StopNow | Cancelled):
                return "stopped", str(e)
            if error is None:
                log.error("unexpected\n%s", kept)
                message = f"Unexpected {type(e).__name__}: {str(e)[:300]}. Please report it; train.log has the details."
            else:
                log.info("failed\n%s", kept)
                message = str(error)
            with contextlib.suppress(OSError):  # a full disk has no room for its own message
                events.append("error", message=message, type=type(e).__name__)
            return "failed", message
        finally:
            give_back()


def _train_helper(config: RunConfig, run_dir: Path) -> None:
    """Ranks above 0: the same steps, into a log of their own that nobody shows. How the run ended is not theirs to say.

    Raises:
        KTOError: what went wrong, for the main process to tell.
    """
    from .stopping import Follower

    ranks.end_with_main(run_dir)
    events = EventLog(run_dir / f"rank-{ranks.rank()}.log")
    try:
        with Follower(run_dir, events) as watch:
            _train(config, run_dir, events, watch)
    except Cancelled:  # as all processes
        return
    except Exception as e:
        traceback.print_exc()  # into worker.log
        if isinstance(e, KTOError):
            raise
        text = f"Unexpected {type(e).__name__} on GPU {ranks.rank()}: {str(e)[:300]}."
        raise _understood(e) or KTOError(f"{text} Please report it; worker.log has the details.") from e


def _understood(e: Exception) -> KTOError | None:
    """Errors of libraries that mean something to the user."""
    if out_of_memory.is_out_of_memory(e):
        return out_of_memory.error()
    if ranks.lost(e):
        return ranks.LostError(
            "A process of this run ended without a word; often the machine's memory was full. worker.log has what is "
            "known of it. Close other programs, then resume."
        )
    if isinstance(e, MemoryError):
        return HardwareError("The machine ran out of memory. Close other programs, or lower batch size or max_length.")
    from .trainer import no_space

    if no_space(e):
        from .errors import DiskError

        return DiskError("The disk is full. Free some space and resume; the checkpoints that are there are whole.")
    return None


# ---- the phases -----------------------------------------------------------------------------------------------------


@dataclass
class _Progress:
    """``progress(fraction, text)`` of long preparations, as status events: a new text at once, numbers every second."""

    events: EventLog
    last: float = 0.0
    head: str = ""

    def __call__(self, fraction: float | None, text: str) -> None:
        head = text.split(":")[0]
        if head != self.head or time.monotonic() - self.last > 1:
            self.head, self.last = head, time.monotonic()
            share = {} if fraction is None else {"fraction": round(fraction, 3)}
            self.events.status("preparing", message=text, **share)


def _train(config: RunConfig, run_dir: Path, events: EventLog, watch: StopWatch) -> tuple[str, str]:
    """All phases. Returns the terminal state and its message; raises what goes wrong."""
    from . import model as models
    from . import train_checks
    from .dry_run import planned_steps

    progress = _Progress(events)
    watch.check()
    train_checks.check_libraries(config)
    progress(None, f"Reading {config.data or 'the data'}…")
    if not config.data:
        raise DataError("No data is chosen. Name a file or a Hub data set with --data.")
    train_checks.check_size(config)
    if config.model != model_info.DEMO:  # the demo model may not be made yet, and needs no check
        train_checks.check_hardware(config, model_info.model_facts(config.model))
    model_info.local_folder(config.model, progress, watch.asked)
    facts = model_info.model_facts(config.model)
    train_checks.check_hardware(config, facts)
    tokenizer = models.load_tokenizer(config.model)
    data = plan_data(config, tokenizer, progress, watch)
    watch.check()

    root = run_dir / "checkpoints"
    root.mkdir(exist_ok=True)
    main = ranks.rank() == 0
    if main:
        checkpoints.clean(run_dir)
        checkpoints.clean(root)
    checkpoint, skipped = checkpoints.newest_whole(root)
    for sentence in skipped:
        events.log(sentence, "warning")
    if main:
        write_dataset_json(data, config, run_dir, resuming=checkpoint is not None)
    for sentence in [*data.remarks, data.summary]:
        events.log(sentence)
    train_checks.check_disk(config, facts, run_dir, planned_steps(config, len(data.train_rows)))

    started = time.monotonic()
    advice = partial(memory_plan.helps_most, config, data.lengths)
    with out_of_memory.explained(lambda: out_of_memory.error(max(data.lengths), advice())):
        trainer = _build(config, run_dir, data, tokenizer, events, watch, progress, advice)
        earlier = any(e["kind"] == "metric" for e in read(events.path)[0])
        _connect(trainer, config, data, events, watch, checkpoint, earlier)
        watch.check()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return _finish(trainer, config, run_dir, tokenizer, events, watch, time.monotonic() - started)


def _build(config, run_dir, data: Planned, tokenizer, events, watch, progress, advice):
    """The trainer: engine, base model, adapter, arguments. ``advice()``: what helps most where memory is short.

    ``auto`` takes TRL's step also where the packed engine finds out only with the model in hand that it does not serve.
    """
    from .model import free_memory

    engine = choose_engine(config, events)
    build = partial(_build_with, config=config, run_dir=run_dir, data=data, tokenizer=tokenizer, events=events,
                    watch=watch, progress=progress, advice=advice)  # fmt: skip
    try:
        return build(engine)
    except NotServed as e:
        if config.engine != "auto":
            raise
        reason = str(e).removesuffix("Choose engine `trl`.").strip()
    use_sharding(config, data, "trl", events)  # refuses what TRL's step cannot do
    free_memory()
    events.log(f"Training with TRL's own step. {reason}")
    return build("trl")


def _build_with(engine: str, config, run_dir, data: Planned, tokenizer, events, watch, progress, advice):
    from . import model as models
    from . import trainer as trainers

    precompute = precompute_pays(config, len(data.train_rows), engine)
    args = trainers.arguments(
        config,
        run_dir / "checkpoints",
        precompute=precompute,
        checkpointing=use_checkpointing(config, data, events),
        evaluate=bool(data.test),
    )
    if config.report_to == "wandb":
        os.environ["WANDB_PROJECT"] = config.wandb_project

    keywords: dict = {}
    if engine == "unsloth":
        from .unsloth_model import load_unsloth

        progress(None, f"Loading {config.model} with Unsloth…")
        model = load_unsloth(config)
        from trl import KTOTrainer as base_class  # Unsloth has put its own there
    else:
        if engine == "packed":
            from .engine import PackedKTOTrainer as base_class

            keywords = {"kl_group": config.kl_group, "progress": progress, "cancel": watch.cancel}
            if config.gradient_checkpointing != "auto":  # all layers or none
                keywords["checkpoint_layers"] = sys.maxsize if config.gradient_checkpointing else 0
        else:
            from trl import KTOTrainer as base_class
        load = partial(models.load_base, config, for_training=True, progress=progress, cancel=watch.asked)
        if use_sharding(config, data, engine, events):
            from .engine.sharding import load_divided

            model = load_divided(partial(load, in_main_memory=True), models.training_device())
        else:
            model = load()
        watch.check()
        if config.adapter:
            model = models.load_adapter(model, config.adapter, trainable=True)
        else:
            keywords["peft_config"] = models.lora_config(config)

    done = 0

    def reference_progress(rows: int) -> None:
        nonlocal done
        done += rows
        share = done / max(1, len(data.train_rows) + len(data.test))
        progress(min(1.0, share), f"Scoring the reference model: {min(1.0, share):.0%}")

    progress(None, "Building the trainer…")
    kl, batch = config.loss_type != "apo_zero_unpaired", config.per_device_train_batch_size
    encoded = partial(trainers.encoded_dataset, batch=batch, kl=kl, keys=engine == "packed")
    with _clear_errors(config):
        trainer = trainers.studio_class(base_class)(
            model=model,
            args=args,
            train_dataset=encoded(data.train, data.labels),
            eval_dataset=encoded(data.test, data.test_labels) if data.test else None,
            processing_class=tokenizer,
            studio={
                "watch": watch,
                "reference_progress": reference_progress,
                "fresh_adapter": not config.adapter,
                "base": model_info.public_name(config.model),
                "makes_room": engine == "trl",
                "advice": advice,
            },
            **keywords,
        )
    events.append("used", **used(config, engine, args.optim.value))
    return trainer


@contextlib.contextmanager
def _clear_errors(config: RunConfig):
    """PEFT's complaint about targets that the model does not have, as the user's mistake it is."""
    try:
        yield
    except ValueError as e:
        if "arget modules" not in str(e) and "target_modules" not in str(e):
            raise
        raise ConfigError(f"target_modules: {config.model} has none of {config.target_modules}. Try all-linear.") from e


def _connect(trainer, config: RunConfig, data: Planned, events, watch, checkpoint, earlier: bool) -> None:
    """Our callback, and nothing that prints."""
    from transformers import PrinterCallback

    from .callbacks import run_callback

    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * trainer.args.world_size
    desirable = sum(data.labels) / len(data.labels)
    facts = {
        "learning_rate": config.learning_rate,
        "batch": batch,
        "micro_batch": config.per_device_train_batch_size,
        "labels": data.labels,
        "mean_tokens": sum(data.lengths) / len(data.lengths),
        "mean_weight": desirable * config.desirable_weight + (1 - desirable) * config.undesirable_weight,
        # 0 where steps were made and lost: they come again, and their old metrics go
        "resumed_from": checkpoints.step_of(checkpoint) if checkpoint else (0 if earlier else None),
    }
    restore = (lambda: trainer.restore_meters(checkpoint)) if checkpoint else None
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(run_callback(events, watch, facts, restore=restore))


def _finish(trainer, config, run_dir: Path, tokenizer, events, watch, seconds: float) -> tuple[str, str]:
    """Evaluate once more, save the adapter, say how it went."""
    from .trainer import save_adapter

    step, total = trainer.state.global_step, trainer.state.max_steps
    stopped = watch.asked.is_set() and step < total
    logged = trainer.state.log_history
    if (
        trainer.eval_dataset is not None
        and not stopped
        and not any("eval_loss" in m and m["step"] == step for m in logged)
    ):
        events.status("training", message="Evaluating on the held-out rows.")
        trainer.evaluate()
    if trainer.is_world_process_zero():
        part = run_dir / "adapter.part"
        shutil.rmtree(part, ignore_errors=True)  # of a killed writer
        base = model_info.public_name(config.model)
        save_adapter(trainer.accelerator.unwrap_model(trainer.model), tokenizer, part, base)
        checkpoints.seal(part)
        checkpoints.put(part, run_dir / "adapter")
    if stopped:
        return "stopped", f"Stopped after step {step:,} of {total:,}; checkpoint and adapter are saved."
    return "finished", f"Finished: {step:,} steps in {_duration(seconds)}; the adapter is saved."


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def give_back() -> None:
    """After a training, good or bad: no cached memory, no open W&B run, no state of libraries for the next one."""

    from .model import free_memory

    if (wandb := sys.modules.get("wandb")) is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
    if (optimizers := sys.modules.get("bitsandbytes.optim")) is not None:
        # transformers registers the embedding with this one of its kind, which would keep it for ever
        optimizers.GlobalOptimManager.get_instance().initialize()
    free_memory()


def dataset_facts(run_dir: Path) -> dict:
    """The run's dataset.json, or {} before it is written."""
    try:
        return json.loads((Path(run_dir) / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
