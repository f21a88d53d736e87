"""The learning rate of a run, as configured, by the rule, or found by trials; kept in the run's folder."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kto_core.errors import DiskError
from kto_core.jobs import Progress, duration
from kto_core.planning import rate as rules
from kto_core.runs import rates

from . import choosing
from . import rows as trial_rows

if TYPE_CHECKING:
    from kto_core.config.run_config import RunConfig
    from kto_core.planning.training_data import Planned
    from kto_core.runs.events import EventLog
    from kto_core.runs.rates import Found

PHASE = "Finding the rate"  # how the progress begins
LATE = 1.5  # times what the trials may take, after which none is begun
DECIDES = {"learning_rate", "model", "adapter", "test_size", "beta", "desirable_weight", "undesirable_weight",
           "loss_type", "kl_group", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
           "max_steps", "max_length", "lr_scheduler_type", "optim", "weight_decay", "max_grad_norm", "seed", "r",
           "lora_alpha", "lora_dropout", "target_modules", "load_in_4bit", "dtype", "num_gpus"}  # fmt: skip


@dataclass(frozen=True)
class Finder:
    """What finding a rate needs of a run.

    Attributes:
        engine: the trainer's: "packed", "trl" or "unsloth".
        check: raises, in all processes of a run together, where a stop was asked for.
        datasets: makes a trainer's data set of encoded rows and their labels.
    """

    config: RunConfig
    run_dir: Path
    events: EventLog
    data: Planned
    engine: str
    progress: Progress
    check: Callable[[], None]
    datasets: Callable

    def find(self, trainer, earlier: float | None = None) -> float:
        """The peak learning rate to train with.

        Args:
            trainer: has not trained yet; is afterwards as it was.
            earlier: the rate of the steps that the run goes on from, where that is known.

        Raises:
            Stopped, Cancelled: from ``check``; what was tried is kept.
            DiskError: the result cannot be written.
        """
        configured, steps = self.config.learning_rate, self.config.steps(len(self.data.train))
        if isinstance(configured, float):
            return configured
        rule = rules.by_rule(self.config, steps)
        key = self._key()
        kept = _agreed(trainer, rates.read(self.run_dir))
        known = kept if kept is not None and kept.key == key else None
        if known is not None and known.rate is not None:
            self.events.log(f"Learning rate {rules.short(known.rate)}, as it was found for this run.")
            return known.rate
        if earlier is not None:
            self.events.log(f"Learning rate {rules.short(earlier)}, as in the steps before.")
            return earlier
        begun = known or rates.Found(rule=rule, key=key)
        started = time.monotonic()
        found = begun if configured == "rule" else self._try(trainer, begun, steps)
        if found.rate is None:
            found = replace(found, rate=rule, by="rule", reason=found.reason or "The rule was asked for.")
        self._write(trainer, found)
        assert found.rate is not None
        took = f" Finding it took {duration(time.monotonic() - started)}." if found.trials else ""
        by = " by the rule" if found.by == "rule" else ""
        self.events.log(f"Learning rate {rules.short(found.rate)}{by}. {found.reason}{took}")
        return found.rate

    # ---- trials ----

    def _try(self, trainer, found: Found, steps: int) -> Found:
        """With all trials and the rate; without a rate, and with a reason, where nothing can be tried."""
        import torch

        gpu = torch.cuda.is_available()
        if self.engine == "unsloth":
            return replace(found, reason="Rates are not tried with Unsloth's trainer.")
        if self.engine == "trl" and trainer.accelerator.num_processes > 1:
            return replace(found, reason="Rates are not tried with TRL's trainer in several processes.")
        if steps < trial_rows.LEAST_STEPS:
            return replace(found, reason="The run has too few steps to try rates.")
        packed = self.engine == "packed"
        rows = trial_rows.PackedRows(trainer) if packed else trial_rows.TrlRows(trainer, len(self.data.train))
        most = min(max(s for _, s in choosing.SIZES), steps)
        chosen = trial_rows.choose(self.config, self.data, rows.groups, most, gpu)
        if chosen is None:
            return replace(found, reason="There are too few rows to try rates on.")
        self.check()
        source = (self.data.test, self.data.test_labels) if chosen.held else (self.data.train, self.data.labels)
        judges = [source[0][i] for i in chosen.judges], [source[1][i] for i in chosen.judges]
        rows.prepare(self.datasets(*judges))
        found = replace(found, rows=len(chosen.judges), rest=self._rest(judges[1]))
        return self._trials(trainer, rows, found, chosen, gpu, steps)

    def _trials(self, trainer, rows, found: Found, chosen, gpu: bool, run_steps: int) -> Found:
        from .trials import Trials

        trials, tried = Trials(trainer, rows, self.check), rules.around(found.rule)
        started, latest = time.monotonic(), math.inf
        with trials.session():
            made = 0
            if not found.steps:  # how long does a step take?
                self.progress(0.0, f"{PHASE}: timing a step")
                trials.begin(found.rule)
                seconds = _agreed(trainer, min(trials.step(0), trials.step(1)))
                made, batch = 2, len(rows.groups[0])
                size, allowed = choosing.size(seconds, found.rows / batch, run_steps, chosen.steps, gpu)
                if size is None:
                    much = f"Trying rates would take longer than the {duration(allowed)} that they may take."
                    return replace(found, reason=much)
                found, latest = replace(found, steps=size.steps, most=size.rates), LATE * allowed
                tried = choosing.nearest(tried, size.rates)
                span = f"{rules.short(tried[0])} to {rules.short(tried[-1])}"
                self.events.log(
                    f"{PHASE}: at most {size.rates} rates from {span}, {size.steps} steps each, "
                    f"judged on {found.rows} rows that are not trained on. About {duration(size.seconds)}."
                )
            tried = choosing.nearest(tried, found.most)
            while (rate := choosing.next_rate(found.trials, tried, found.rest)) is not None:
                number = len(found.trials)
                if not made:
                    trials.begin(rate)
                for step in range(made, found.steps):
                    self.progress(min(1.0, (number + step / found.steps) / found.most),
                                  f"{PHASE}: {number + 1} of {found.most}")  # fmt: skip
                    trials.step(step)
                found, made = found.with_trial(trials.judged()), 0
                self._write(trainer, found)
                if _agreed(trainer, time.monotonic() - started > latest):  # later steps may have longer rows
                    self.events.log(f"{PHASE}: the steps take longer than expected, so no more rates are tried.")
                    break
        rate, by, reason = choosing.choose(found.trials, found.rest, found.rule)
        if by == "trials":
            rate, why = choosing.for_run(rate, found.steps)
            reason = f"{reason} {why}".strip()
        return replace(found, rate=rules.rounded(rate), by=by, reason=reason)

    def _rest(self, labels: list[bool]) -> float:
        """The loss of rows before any step: half of their mean weight."""
        c = self.config
        return sum(0.5 * (c.desirable_weight if label else c.undesirable_weight) for label in labels) / len(labels)

    def _key(self) -> str:
        values = self.config.model_dump(mode="json", include=DECIDES)
        text = json.dumps([values, self.data.order_sha256, self.engine], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _write(self, trainer, found: Found) -> None:
        if not trainer.is_world_process_zero():
            return
        try:
            rates.write(self.run_dir, found)
        except OSError as e:
            raise DiskError.of(self.run_dir / rates.FILE, e) from e


def _agreed(trainer, value):
    """What the main process says, in all processes of a run: they must do the same."""
    if trainer.accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]
