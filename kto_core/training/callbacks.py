"""What happens beside the training steps: metrics to the event log, an answer to a stop, what the numbers mean."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from kto_core.errors import NotFinite
from kto_core.health.about import Finding
from kto_core.health.watching import HealthWatch
from kto_core.runs.events import EventLog
from kto_core.runs.stopping import AT_ONCE, StopNow, StopWatch

SUMMARY = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss")
LOGGED = 1000  # entries of trainer_state.json, written whole with each checkpoint (10,000: 0.4 s); events have them all


def run_callback(*args, **kwargs):
    """A `RunCallback` that transformers' Trainer accepts."""
    from transformers import TrainerCallback

    return type("RunCallback", (RunCallback, TrainerCallback), {})(*args, **kwargs)


@dataclass(frozen=True)
class RunFacts:
    """What the callback knows of a run.

    Attributes:
        batch: rows of a step. mean_tokens: of a row. resumed_from: step, or None.
    """

    batch: int
    mean_tokens: float
    beta: float = 0.1
    resumed_from: int | None = None


class RunCallback:
    """Metrics, status and checkpoints of one training as events; stops it when asked.

    Args:
        events: the run's log (of the main process only).
        watch: the stop file's watcher.
        facts: of the run.
        health: looks at what is logged.
        restore: called when training begins, to go on with averages that were begun before a checkpoint.
    """

    def __init__(
        self,
        events: EventLog,
        watch: StopWatch,
        facts: RunFacts,
        health: HealthWatch,
        restore: Callable[[], None] | None = None,
    ):
        self.events, self.watch, self.facts, self.health, self.restore = events, watch, facts, health, restore
        self.movement = Movement(facts.beta, health.about.higher())

    def on_train_begin(self, args, state, control, **_):
        if self.restore:
            self.restore()
        self.first_step, self.start = state.global_step, time.monotonic()
        self.last_step, self.last_time, self.last_tokens = state.global_step, self.start, None
        fields = {"total_steps": state.max_steps, "message": f"Training: {state.max_steps:,} steps."}
        if self.facts.resumed_from is not None:
            fields["resumed_from"] = state.global_step
        if state.global_step:
            fields["message"] = f"Resuming after step {state.global_step:,} of {state.max_steps:,}."
        if not self.watch.asked.is_set():
            self.health.look(self.events.status("training", **fields))

    def on_substep_end(self, args, state, control, **_):
        if self.watch.now.is_set():
            raise StopNow("Stopped immediately. The step in progress was not saved.")

    def on_step_end(self, args, state, control, **_):
        if self.watch.now.is_set():
            raise StopNow(AT_ONCE)
        if agreed(self.watch.look(), args):
            self.watch.asked.set()  # in every process: what comes after the last step depends on it
            control.should_save = control.should_training_stop = True  # an evaluation that is due is still made

    def on_save(self, args, state, control, **_):
        self.events.append("checkpoint", step=state.global_step, path=f"checkpoints/checkpoint-{state.global_step}")

    def on_log(self, args, state, control, logs=None, lr_scheduler=None, **_):
        del state.log_history[:-LOGGED]
        logs = dict(logs or {})
        if not logs or any(k in logs for k in SUMMARY) or not state.is_world_process_zero:
            return
        for name in ("loss", "eval_loss"):
            if name in logs and not math.isfinite(float(logs[name])):
                raise not_finite(state.global_step)
        values = {k: _plain(v) for k, v in logs.items()}
        if "loss" in logs:
            values |= self._speed(state, logs)
            if self.facts.resumed_from is None and (schedule := getattr(lr_scheduler, "lr_lambdas", None)):
                for text, level in self.movement.look(state.global_step, state.max_steps, logs, schedule[0]):
                    self.events.log(text, level)
                    if level == "warning":
                        self.health.said.add("little")
        self._say(self.health.look(self.events.metric(state.global_step, **values)))

    def on_train_end(self, args, state, control, **_):
        if state.is_world_process_zero:
            self._say(self.health.look(last=True))

    def _say(self, found: list[Finding]) -> None:
        for finding in found:
            self.events.log(f"Health after step {self.health.state.step:,}: {finding.text}", finding.level)

    def _speed(self, state, logs: dict) -> dict:
        """tokens and examples a second since the last log, seconds left, GiB reserved on the GPU."""
        now = time.monotonic()
        steps, seconds = state.global_step - self.last_step, max(now - self.last_time, 1e-9)
        examples = steps * self.facts.batch
        tokens, before = logs.get("num_tokens"), self.last_tokens
        counted = tokens is not None and before is not None
        done = tokens - before if counted else examples * self.facts.mean_tokens
        self.last_step, self.last_time, self.last_tokens = state.global_step, now, tokens
        a_step = (now - self.start) / max(1, state.global_step - self.first_step)
        out = {
            "examples_per_second": round(examples / seconds, 4),
            "tokens_per_second": round(done / seconds, 2),
            "eta": round(a_step * (state.max_steps - state.global_step), 1),
        }
        memory = gpu_memory()
        return out | ({"gpu_memory": memory} if memory is not None else {})


def agreed(stop: bool, args) -> bool:
    """Whether any process wants to stop: with several GPUs all must end after the same step, or they wait for ever."""
    if args.world_size == 1:
        return stop
    import torch

    wish = torch.tensor(int(stop), device=args.device)
    torch.distributed.all_reduce(wish, op=torch.distributed.ReduceOp.MAX)
    return bool(wish.item())


def gpu_memory() -> float | None:
    """GiB that this process has reserved on its GPU, or None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return round(torch.cuda.memory_reserved() / 2**30, 3)


def not_finite(step: int) -> NotFinite:
    """The error of a loss that is no number. Nothing was changed before the first step's loss: the rate is not why."""
    if step <= 1:
        return NotFinite(
            "The loss was NaN at the first step, before anything was changed, so it is not the learning rate. Fetch "
            "the model's weights again or choose another model; with dtype float16, choose bfloat16 or float32."
        )
    return NotFinite(
        f"The loss became NaN at step {step}. Lower the learning rate, raise beta, or use dtype bfloat16 or float32 "
        "instead of float16. Checkpoints before this step are kept."
    )


class Movement:
    """After the first steps: how far an answer's log-prob will move in all, if it goes on as it began. Said once."""

    STEPS = 3
    LITTLE = 0.5  # nats an answer, of which nobody sees anything

    def __init__(self, beta: float, advice: str = "Raise learning_rate, or set it to auto"):
        self.beta, self.advice, self.said, self.last, self.noise = beta, advice, False, 0, 0.0

    def look(self, step: int, total: int, logs: dict, schedule: Callable[[int], float]) -> list[tuple[str, str]]:
        """The sentence and its level when it is time for it.

        Args:
            logs: means over the steps since the last call. schedule: step -> share of the peak rate.
        """
        window, self.last = range(self.last, step), step
        rewards = [abs(logs[n]) for n in ("rewards/chosen", "rewards/rejected") if isinstance(logs.get(n), int | float)]
        if self.said or not rewards:
            return []
        moved = sum(rewards) / len(rewards) / self.beta
        if step == 1:  # nothing was changed yet: what differs is rounding
            self.noise = moved
        if step < self.STEPS:
            return []
        self.said = True
        before = sum(sum(schedule(i) for i in range(s)) for s in window) / len(window)
        some = range(0, total, max(1, total // 1000))
        whole = sum(schedule(i) for i in some) * total / len(some)
        rounding = moved <= 2 * self.noise
        end = moved * whole / before if before > 0 else math.inf  # within rounding: at most
        if rounding and end >= self.LITTLE:
            return [(f"After {step} steps no answer has moved by more than rounding does ({moved:.2g} nats).", "info")]
        far = "more than 100" if end > 100 else f"about {end:.2g}"
        text = f"After {step} steps an answer has moved by {moved:.2g} nats. After {total:,} it will be {far}"
        if end >= self.LITTLE:
            return [(f"{text}, or less where it levels off.", "info")]
        return [(f"{text}, which is almost nothing. {self.advice}.", "warning")]


def _plain(value):
    """Numbers as JSON has them: a 0-d tensor becomes a float."""
    return value.item() if hasattr(value, "item") else value
