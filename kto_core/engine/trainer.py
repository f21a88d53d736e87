"""PackedKTOTrainer: TRL's KTOTrainer to its surroundings, with the packed step inside.

It takes KTOTrainer's arguments, runs in transformers' Trainer loop (callbacks, checkpoints, resume) and logs TRL's
metric names. One batch of the loop is one optimizer batch, ``per_device_train_batch_size *
gradient_accumulation_steps`` rows a process, so steps, epochs and save_steps count as before.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from transformers import set_seed
from trl import KTOConfig, KTOTrainer

from kto_core.engine.layers import dropout
from kto_core.engine.packing.batches import GroupLoader, Planner, longest, planned_pairs
from kto_core.engine.packing.groups import TokenRows
from kto_core.engine.packing.passes import OFFLOADED
from kto_core.errors import DataError, HardwareError, ModelError
from kto_core.jobs import Progress, no_progress
from kto_core.models.load import keep_weights_trainable

from . import limits
from .adapters import Reference, broadcast_values, check_adapter, trainable
from .evaluation import Evaluation
from .probe import check_head_and_attention, not_served_on_error
from .reference import ReferenceCache, ReferenceScores, scorer_key
from .step import Engine
from .training_step import TrainingStep

logger = logging.getLogger(__name__)


class PackedKTOTrainer(TrainingStep, Evaluation, KTOTrainer):
    """Args, beyond `trl.KTOTrainer`'s:

        kl_group: "batch" takes z0 over the whole optimizer batch, reshuffles every epoch, spreads the labels and never
            pairs a row with its own prompt; "microbatch" keeps TRL's order, pairs and z0 of each micro-batch.
        token_budget: packed tokens of one pass; None: what fits into free memory.
        checkpoint_layers: decoder layers recomputed in the backward, or "all"; None: as few as the memory allows, on
            a CPU none.
        reference_cache: keep reference log-probs on disk. cache_dir: where; default `paths.cache_dir()`.
        progress, cancel: for scoring the reference, which is done at the start of `train`.

    ``train_dataset`` and ``eval_dataset`` have the columns ``prompt_ids``, ``completion_ids`` and ``label``; other
    columns are not looked at. Dropout is switched off.

    Raises:
        DataError: a data set of one row, an empty prompt or completion, a row longer than ``token_budget``.
        ModelError: no LoRA adapter, an adapter on lm_head, or an architecture the packed pass does not reproduce.
    """

    def __init__(
        self,
        model,
        ref_model=None,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        peft_config=None,
        *,
        kl_group: str = "batch",
        token_budget: int | None = None,
        checkpoint_layers: int | Literal["all"] | None = None,
        reference_cache: bool = True,
        cache_dir=None,
        progress: Progress = no_progress,
        cancel: threading.Event | None = None,
    ):
        args = args if args is not None else KTOConfig("kto-output")
        if ref_model is not None:
            raise ModelError("The packed engine uses the initial policy as the reference model. Do not pass ref_model.")
        if kl_group not in ("batch", "microbatch"):
            raise ValueError(f"kl_group must be 'batch' or 'microbatch', not {kl_group!r}")
        self.kl_group, self.micro_batch = kl_group, args.per_device_train_batch_size
        args = copy.copy(args)
        args.per_device_train_batch_size *= args.gradient_accumulation_steps
        args.gradient_accumulation_steps = 1
        args.gradient_checkpointing = False  # the engine decides layer by layer
        args.remove_unused_columns = False
        set_seed(args.seed)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        check_adapter(model)
        keep_weights_trainable(model)
        for p in trainable(model).values():  # bf16 would round small steps away
            p.data = p.data.float() if p.dtype in (torch.bfloat16, torch.float16) else p.data
        dropout.switch_off(model)

        self.beta, self.loss_type = args.beta, args.loss_type
        self.desirable_weight, self.undesirable_weight = args.desirable_weight, args.undesirable_weight
        self.calculate_KL = args.loss_type != "apo_zero_unpaired"
        self.rows = TokenRows.from_dataset(train_dataset)
        self._planned_eval: dict[str, tuple[Planner, ReferenceScores]] = {}
        self._tokens_in_eval: tuple[int | None, int | None] | None = None

        # KTOTrainer.__init__ would tokenize, pair, pad and add a second adapter: its parent's is the one to call
        super(KTOTrainer, self).__init__(
            model=model,
            args=args,
            data_collator=data_collator or (lambda items: items),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # passes go past any wrapper and gradients are summed here: DDP would keep 4 bytes a parameter for nothing
        self.accelerator.prepare_model = lambda model, *_, **__: model
        broadcast_values(trainable(self.model))
        self.ref_model = None
        self._is_vision_dataset = self._is_vlm = False
        self.maybe_activation_offload_context = contextlib.nullcontext()
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._total_train_tokens = 0
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)

        self._progress, self._cancel = progress, cancel
        world = self.accelerator.num_processes
        self.planner = self._planner(self.rows, args.seed)
        self.reference = Reference(self.model)
        self.engine = Engine(self.model, token_budget)
        if checkpoint_layers == "all":
            checkpoint_layers = len(self.engine.layers)
        self.engine.limits = replace(self.engine.limits, checkpoint_layers=checkpoint_layers or 0)
        with self._autocast():
            check_head_and_attention(self.engine, self.rows.prompt[0])
        self._scorer = scorer_key(self.model, self.reference.key, self._scoring_dtype())
        self._cache = ReferenceCache(cache_dir) if reference_cache else None
        self.reference_scores = self._scores(self.rows)
        self._limits(token_budget, checkpoint_layers)
        self._say_plan(world)

    # ---- the plan ----------------------------------------------------------------------------------------------------

    def _planner(self, rows: TokenRows, seed: int) -> Planner:
        world, kl = self.accelerator.num_processes, self.calculate_KL
        size = self.args.per_device_train_batch_size * world
        if kl and self.kl_group == "batch" and size < 2:
            raise DataError(
                "The KL term needs at least two rows per batch. Raise the batch size or gradient accumulation."
            )
        if kl and len(rows) < 2:
            raise DataError(
                "KTO needs at least two rows, because the KL term is estimated with another row's answer. Add rows."
            )
        micro = self.micro_batch * world if self.kl_group == "microbatch" else None
        return Planner(rows, size, seed, micro, kl)

    def _say_plan(self, world: int) -> None:
        plan = self.planner.epoch(0)
        for count, what in (
            (plan.own, "are paired with their own answer for the KL (too few rows in a micro-batch)"),
            (plan.same_prompt, "are paired with another answer to their own prompt"),
            (plan.identical, "are paired with an answer identical to their own"),
        ):
            if count:
                logger.warning(
                    "%d of %d rows per epoch %s. The KL estimate is slightly biased.", count, len(self.rows), what
                )

    def _limits(self, token_budget, checkpoint_layers) -> None:
        row, engine = longest(self.rows), self.engine
        if token_budget is None or checkpoint_layers is None:
            sample = limits.sample_groups(self.planner, self.accelerator.process_index, self.accelerator.num_processes)
            more = {
                "moments": 2.1 if "8bit" in self.args.optim.value else 8,
                "rows": len(self.rows) / len(self.planner.epoch(0)) / self.accelerator.num_processes,
            }
            with not_served_on_error():
                chosen = limits.choose(engine, sample, self._autocast, checkpoint_layers, row, **more)
            engine.limits = replace(chosen, token_budget=token_budget or chosen.token_budget)
            if engine.limits.offload and row <= engine.limits.token_budget:
                logger.warning(OFFLOADED)
        else:
            scoring = max(row, min(token_budget, limits.SCORING[engine.device.type == "cuda"]))
            engine.limits = replace(engine.limits, scoring_tokens=scoring)
        most = engine.limits.token_budget
        if most is not None and row > most:
            over = int(np.sum(self.rows.prompt.lengths + self.rows.completion.lengths - 1 > most))
            text = f"{over} rows exceed the limit of {most:,} tokens per pass (the longest has {row + 1:,})"
            if token_budget is None:
                raise HardwareError(f"{text}, which is what fits in free memory. Lower max_length.")
            raise DataError(f"{text}. Raise token_budget or lower max_length.")

    def get_train_dataloader(self):
        return GroupLoader(self.planner, self.accelerator.process_index, self.accelerator.num_processes)

    # ---- the reference -----------------------------------------------------------------------------------------------

    def _autocast(self):
        return self.compute_loss_context_manager()

    def _scoring_dtype(self) -> str:
        dtype = self.engine.causal.get_input_embeddings().weight.dtype
        with self._autocast():
            kind = self.engine.device.type
            if torch.is_autocast_enabled(kind):
                dtype = torch.get_autocast_dtype(kind)
        return str(dtype).removeprefix("torch.")

    def _scores(self, rows: TokenRows) -> ReferenceScores:
        def score(prompts, completions, done):
            with self.reference.active(), self._autocast():
                return self.engine.score(prompts, completions, self.engine.limits.scoring_tokens, done)

        share = None
        if self.accelerator.num_processes > 1:
            share = partial(_shared, self.accelerator)
        return ReferenceScores(rows, self._scorer, score, self._cache, share)

    def prepare_reference(self, progress: Progress | None = None, cancel: threading.Event | None = None) -> dict:
        """Score what the planned steps need and the cache does not have. Returns counts (`ReferenceScores.prepare`)."""
        steps = self.args.max_steps
        if steps <= 0:
            steps = int(np.ceil(self.args.num_train_epochs * len(self.planner.epoch(0))))
        counts = self.reference_scores.prepare(
            planned_pairs(self.planner, steps), progress or self._progress, cancel or self._cancel
        )
        for name, dataset in self._eval_sets(self.eval_dataset).items():
            self._prepare_eval(name, dataset)
        return counts

    def train(self, *args, **kwargs):
        self.prepare_reference()  # before a checkpoint is loaded: the adapter is still the reference's
        return super().train(*args, **kwargs)

    def floating_point_ops(self, inputs) -> int:
        return 0  # the batch holds row numbers, which say nothing of the work


def _shared(accelerator, todo: int) -> tuple[slice, object]:
    """The part of a list that this process computes, and a function that joins all processes' dicts and
    tells whether one of them was stopped."""
    from accelerate.utils import gather_object

    size = -(-todo // accelerator.num_processes)
    start = accelerator.process_index * size

    def join(values: dict, stopped: bool) -> tuple[dict, bool]:
        joined, one_stopped = {}, False
        for part, its_stopped in gather_object([(values, stopped)]):
            joined |= part
            one_stopped |= its_stopped
        return joined, one_stopped

    return slice(start, min(todo, start + size)), join
