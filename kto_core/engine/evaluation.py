"""The evaluation of the packed trainer: KL groups as in training, fixed pairs, passes of a size of its own."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from dataclasses import replace

import torch

from kto_core.engine.packing.batches import GroupLoader, Planner, planned_pairs
from kto_core.engine.packing.groups import TokenRows
from kto_core.errors import DataError

from .limits import Limits
from .reference import ReferenceScores


class Evaluation:
    """Mixin of `trainer.PackedKTOTrainer`."""

    def _eval_sets(self, dataset) -> dict:
        if dataset is None:
            return {}
        return dict(dataset) if isinstance(dataset, dict) else {"": dataset}

    def _prepare_eval(self, name: str, dataset) -> tuple[Planner, ReferenceScores]:
        known = self._planned_eval.get(name)
        if known is None or known[2] is not dataset:
            rows = TokenRows.from_dataset(dataset)
            size = max(2, self.args.per_device_train_batch_size * self.accelerator.num_processes)
            planner = Planner(rows, size, self.args.seed, None, self.calculate_KL)
            scores = self._scores(rows)
            scores.prepare(planned_pairs(planner, len(planner.epoch(0))), self._progress, self._cancel)
            known = self._planned_eval[name] = (planner, scores, dataset)
        return known[:2]

    def judging_batches(self, dataset, size: int) -> list[dict]:
        """Inputs for `prediction_step`: all rows of a data set in KL groups of about ``size`` rows over all processes,
        their reference scored. The pairs are the same each time."""
        rows, world = TokenRows.from_dataset(dataset), self.accelerator.num_processes
        planner = Planner(rows, max(size, 2 * world), self.args.seed, None, self.calculate_KL)
        plan, scores = planner.epoch(0), self._scores(rows)
        scores.prepare(planned_pairs(planner, len(plan)), self._progress, self._cancel)
        part, batches = slice(self.accelerator.process_index, None, world), []
        for own, partner in map(plan.group, range(len(plan))):
            batches.append({"rows": own[part], "partner": partner[part], "size": len(own), "planned": (rows, scores)})
        return batches

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss and TRL's metrics over all rows, each row counted once (KL groups as in training, fixed pairs)."""
        datasets = self._eval_sets(self.eval_dataset if eval_dataset is None else eval_dataset)
        if not datasets:
            raise DataError("There are no rows to evaluate.")
        results: dict[str, float] = {}
        for name, dataset in datasets.items():
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            results |= self._evaluate_one(name, dataset, prefix)
        return results

    def _evaluate_one(self, name: str, dataset, prefix: str) -> dict[str, float]:
        planner, scores = self._prepare_eval(name, dataset)
        started, was_training = time.time(), self.model.training
        self.model.eval()
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        total, kept = 0.0, self._metrics["eval"]
        self._metrics["eval"] = defaultdict(list)
        with self._eval_limits():
            for inputs in GroupLoader(planner, rank, world):
                loss, _, _ = self.prediction_step(self.model, {**inputs, "planned": (planner.rows, scores)}, True)
                total += float(loss) * inputs["size"]
        seconds = time.time() - started
        metrics = {f"{prefix}_loss": total / len(planner.rows), f"{prefix}_runtime": round(seconds, 4)}
        metrics[f"{prefix}_samples_per_second"] = round(len(planner.rows) / max(seconds, 1e-9), 3)
        metrics |= {f"{prefix}_{k}": sum(v) / len(v) for k, v in self._metrics["eval"].items()}
        self._metrics["eval"] = kept
        self.log(dict(metrics))
        self.model.train(was_training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @contextlib.contextmanager
    def _eval_limits(self):
        """Smaller passes that an evaluation needed are the next one's, and not the training's."""
        engine, before = self.engine, self.engine.limits
        tokens = before.token_budget, before.scoring_tokens
        engine.limits = _with_tokens(before, self._tokens_in_eval or tokens)
        try:
            yield
            self._tokens_in_eval = engine.limits.token_budget, engine.limits.scoring_tokens
        finally:
            engine.limits = _with_tokens(engine.limits, tokens)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            loss = self._step(inputs, backward=False, planned=inputs["planned"], mode="eval")
        return loss, None, None


def _with_tokens(limits: Limits, tokens: tuple[int | None, int | None]) -> Limits:
    budget, scoring = tokens
    return replace(limits, token_budget=budget, scoring_tokens=scoring)
