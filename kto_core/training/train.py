"""RunConfig -> a trained adapter in a run folder. `train` is one function: in a thread of the app, or in a child.

What happens is told through the run's events (`runs.events`); the run ends with a terminal status, written last.
This module knows nothing of threads, processes or who watches; `kto_core.training.start` does.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from kto_core import files, reporting
from kto_core.config.remarks import remarks
from kto_core.errors import Cancelled, DataError, HardwareError, KTOError
from kto_core.hardware import out_of_memory
from kto_core.jobs import duration
from kto_core.models import facts as model_info
from kto_core.models.adapter_gate import require_adapter
from kto_core.planning.training_data import NO_DATA, Planned, plan_data, write_dataset_json
from kto_core.runs import checkpoints, locks, ranks
from kto_core.runs.events import EventLog, state_of

from . import verdict
from .build import build_trainer, connect_callback, find_rate
from .context import RunContext, StatusProgress

if TYPE_CHECKING:
    from kto_core.config.run_config import RunConfig
    from kto_core.runs.stopping import StopWatch


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
    with locks.holding(run_dir):
        events = EventLog(run_dir / "events.jsonl")
        last = _guarded(config, run_dir, events, end_on_second_stop)
        with contextlib.suppress(OSError):
            (run_dir / "stop").unlink(missing_ok=True)
            events.status(**last)


def _guarded(config: RunConfig, run_dir: Path, events: EventLog, end_on_second_stop: bool) -> dict:
    """Run `_train`; whatever happens becomes the terminal status event: its fields."""
    events.begin()
    from .logs import captured

    with captured(events, run_dir / "train.log") as log:
        try:
            from kto_core.hardware.gpu_owner import claim
            from kto_core.runs.stopping import AT_ONCE, StopNow, Stopped, StopWatch, end_process

            def end_now() -> None:
                try:
                    events.status("stopped", message=AT_ONCE)
                finally:  # also on a full disk
                    end_process()

            with StopWatch(run_dir, events, end_now if end_on_second_stop else None) as watch:
                with claim("train", run_dir.name):
                    last, data = _train(config, run_dir, events, watch)
                if last["state"] == "finished":
                    give_back()  # the trainer's model
                    with contextlib.suppress(OSError):  # a full disk; the adapter is saved
                        verdict.judge(config, run_dir, events, watch, data)
                return last
        except Exception as e:
            kept = traceback.format_exc()
            error = e if isinstance(e, KTOError) else _understood(e)
            second = error is None or isinstance(error, Stopped | StopNow | Cancelled | ranks.LostError)
            if second and (first := ranks.first_error(run_dir)):  # why nobody answers, or the launcher ended us
                error = KTOError(first)
            elif isinstance(e, Stopped | StopNow | Cancelled):
                return {"state": "stopped", "message": str(e)}
            if error is None:
                log.error("unexpected\n%s", kept)
                message = f"Unexpected {type(e).__name__}: {str(e)[:300]}. Please report it, with train.log."
            else:
                log.info("failed\n%s", kept)
                message = str(error)
            with contextlib.suppress(OSError):  # a full disk has no room for its own message
                events.append("error", message=message, type=type(e).__name__)
            return {"state": "failed", "message": message}
        finally:
            give_back()


def _train_helper(config: RunConfig, run_dir: Path) -> None:
    """Ranks above 0: the same steps, into a log of their own that nobody shows. How the run ended is not theirs to say.

    Raises:
        KTOError: what went wrong, for the main process to tell.
    """
    from kto_core.runs.stopping import Follower

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
        raise _understood(e) or KTOError(f"{text} Please report it, with worker.log.") from e


def _understood(e: Exception) -> KTOError | None:
    """Errors of libraries that mean something to the user."""
    if out_of_memory.is_out_of_memory(e):
        return out_of_memory.error()
    if ranks.lost(e):
        return ranks.LostError(
            "A training process ended without an error message. The machine probably ran out of memory; see "
            "worker.log. Close other programs, then resume."
        )
    if isinstance(e, MemoryError):
        return HardwareError(
            "The machine ran out of memory. Close other programs, or lower the batch size or max_length."
        )
    from .trainer import no_space

    if no_space(e):
        from kto_core.errors import DiskError

        return DiskError("The disk is full. Free up disk space, then resume. Existing checkpoints are complete.")
    return None


# ---- the phases -----------------------------------------------------------------------------------------------------


def _train(config: RunConfig, run_dir: Path, events: EventLog, watch: StopWatch) -> tuple[dict, Planned]:
    """All phases up to the saved adapter; raises what goes wrong.

    Returns the fields of the terminal status event, and the run's rows.
    """
    from kto_core.models import load as models
    from kto_core.planning import checks

    progress = StatusProgress(events, "preparing")
    watch.check()
    checks.check_libraries(config)
    progress(None, f"Reading {config.data or 'the data'}…")
    if not config.data:
        raise DataError(NO_DATA)
    checks.check_size(config)
    if config.model != model_info.DEMO:  # the demo model may not be made yet, and needs no check
        checks.check_hardware(config, model_info.model_facts(config.model))
    model_info.local_folder(config.model, progress, watch.asked)
    facts = model_info.model_facts(config.model)
    checks.check_hardware(config, facts)
    if config.adapter:
        require_adapter(Path(config.adapter), config.model)
    tokenizer = models.load_tokenizer(config.model, progress, watch.asked)
    began = state_of(run_dir / "events.jsonl").started  # a run that resumes tomorrow keeps its date
    data = plan_data(config, tokenizer, progress, watch, began)
    watch.check()

    root = run_dir / "checkpoints"
    root.mkdir(exist_ok=True)
    main = ranks.rank() == 0
    if main:
        files.clean(run_dir)
        files.clean(root)
    checkpoint, skipped = checkpoints.newest_whole(root)
    for sentence in skipped:
        events.log(sentence, "warning")
    if main:
        write_dataset_json(data, config, run_dir, resuming=checkpoint is not None)
    for sentence in [*remarks(config), *data.remarks, data.summary]:
        events.log(sentence)
    checks.check_disk(config, facts, run_dir, config.steps(len(data.train_rows)))

    run = RunContext(config, run_dir, events, watch, progress, data, tokenizer)
    with out_of_memory.explained(lambda: out_of_memory.error(max(data.lengths), run.advice())):
        before, built = state_of(events.path), build_trainer(run)
        trainer = built.trainer
        trainer.args.learning_rate = rate = find_rate(built, run, before.used if checkpoint else {})
        events.append("used", **built.used, learning_rate=rate)
        connect_callback(trainer, run, checkpoint, before)
        watch.check()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return _finish(trainer, run), data


def _finish(trainer, run: RunContext) -> dict:
    """Evaluate once more, save the adapter, say how it went."""
    from .trainer import save_adapter

    step, total = trainer.state.global_step, trainer.state.max_steps
    stopped = run.watch.asked.is_set() and step < total
    logged = trainer.state.log_history
    if (
        trainer.eval_dataset is not None
        and not stopped
        and not any("eval_loss" in m and m["step"] == step for m in logged)
    ):
        run.events.status("training", message="Evaluating on the validation rows.")
        trainer.evaluate()
    if trainer.is_world_process_zero():
        part = run.run_dir / "adapter.part"
        shutil.rmtree(part, ignore_errors=True)  # of a killed writer
        base = model_info.public_name(run.config.model)
        save_adapter(trainer.accelerator.unwrap_model(trainer.model), run.tokenizer, part, base)
        files.seal(part, sync=True)
        files.move_into_place(part, run.run_dir / "adapter", sync=True)
    seconds = round(state_of(run.events.path).worked(), 3)  # over stops and resumes, as the page says it
    if stopped:
        message = f"Stopped after step {step:,} of {total:,}. The checkpoint and the adapter are saved."
        return {"state": "stopped", "message": message, "seconds": seconds}
    message = f"Finished: {step:,} steps in {duration(seconds)}; the adapter is saved."
    return {"state": "finished", "message": message, "seconds": seconds}


def give_back() -> None:
    """After a training, good or bad: no cached memory, no open run of a tracker, no state of libraries for the next."""

    from kto_core.models.load import free_memory

    reporting.finish()
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
    if (optimizers := sys.modules.get("bitsandbytes.optim")) is not None:
        # transformers registers the embedding with this one of its kind, which would keep it for ever
        optimizers.GlobalOptimManager.get_instance().initialize()
    free_memory()
