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
from functools import partial

import numpy as np
import torch
from transformers import set_seed
from trl import KTOConfig, KTOTrainer
from trl.trainer.utils import disable_dropout_in_model

from .. import out_of_memory
from ..errors import DataError, HardwareError, ModelError
from ..jobs import Progress, no_progress
from ..memory_plan import OFFLOADED
from ..model import keep_weights_trainable
from . import memory, retry
from .adapters import Reference, alike, check_adapter, trainable
from .batches import GroupLoader, Planner, longest, planned_pairs
from .evaluation import Evaluation
from .metrics import apart, record
from .passes import y_tokens
from .plan import TokenRows
from .probe import check_head_and_attention, served
from .reference import ReferenceCache, ReferenceScores, scorer_key
from .step import Engine, Group

logger = logging.getLogger(__name__)
# what policy and reference may differ by at the start (`metrics.apart`): bfloat16 was seen to make 0.05
APART = 0.2


class PackedKTOTrainer(Evaluation, KTOTrainer):
    """Args, beyond `trl.KTOTrainer`'s:

        kl_group: "batch" takes z0 over the whole optimizer batch, reshuffles every epoch, spreads the labels and never
            pairs a row with its own prompt; "microbatch" keeps TRL's order, pairs and z0 of each micro-batch.
        token_budget: packed tokens of one pass; None: what fits into free memory.
        checkpoint_layers: decoder layers recomputed in the backward; None: as few as the memory allows, on a CPU none.
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
        checkpoint_layers: int | None = None,
        reference_cache: bool = True,
        cache_dir=None,
        progress: Progress = no_progress,
        cancel: threading.Event | None = None,
    ):
        args = args if args is not None else KTOConfig("kto-output")
        if ref_model is not None:
            raise ModelError("The packed engine's reference is the policy at the start. Pass no ref_model.")
        if kl_group not in ("batch", "microbatch"):
            raise ValueError(f"kl_group is 'batch' or 'microbatch', not {kl_group!r}")
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
        disable_dropout_in_model(model)

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
        alike(trainable(self.model))
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
        self.engine = Engine(self.model, token_budget, checkpoint_layers or 0)
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
            raise DataError("The KL needs at least two rows a batch. Raise the batch size or gradient accumulation.")
        if kl and len(rows) < 2:
            raise DataError("KTO needs at least two rows: the KL is measured with another row's answer. Add rows.")
        micro = self.micro_batch * world if self.kl_group == "microbatch" else None
        return Planner(rows, size, seed, micro, kl)

    def _say_plan(self, world: int) -> None:
        plan = self.planner.epoch(0)
        for count, what in (
            (plan.own, "are paired with their own answer for the KL (too few rows in a micro-batch)"),
            (plan.same_prompt, "could not be kept off an answer to their own prompt"),
            (plan.identical, "could not be kept off an answer that is identical to their own"),
        ):
            if count:
                logger.warning("%d of %d rows of an epoch %s: the KL is a little off.", count, len(self.rows), what)

    def _limits(self, token_budget, checkpoint_layers) -> None:
        row = longest(self.rows)
        if token_budget is None or checkpoint_layers is None:
            sample = memory.sample_groups(self.planner, self.accelerator.process_index, self.accelerator.num_processes)
            moments = 2.1 if "8bit" in self.args.optim.value else 8
            with served():
                budget, layers = memory.limits(
                    self.engine, sample, self._autocast, checkpoint_layers, row, moments=moments
                )
            self.engine.token_budget = token_budget or budget
            self.engine.checkpoint_layers = layers
            if self.engine.offload and row <= self.engine.token_budget:
                logger.warning(OFFLOADED)
        else:
            self.engine.scoring_tokens = max(row, min(token_budget, memory.SCORING[self.engine.device.type == "cuda"]))
        if self.engine.token_budget is not None and row > self.engine.token_budget:
            over = int(np.sum(self.rows.prompt.lengths + self.rows.completion.lengths - 1 > self.engine.token_budget))
            budget = f"{self.engine.token_budget:,} tokens of one pass"
            text = f"{over} rows are longer than the {budget} (the longest has {row + 1:,})"
            if token_budget is None:
                raise HardwareError(f"{text}, which is what fits into free memory. Lower max_length.")
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
                return self.engine.score(prompts, completions, self.engine.scoring_tokens, done)

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

    # ---- the step ----------------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        return self._step(inputs, backward=True)

    def no_room(self, longest: int) -> HardwareError:
        """What is raised where nothing is left to give. ``longest``: tokens of the longest row."""
        return out_of_memory.error(longest)

    def _make_room(self, rows: TokenRows, inputs: dict, backward: bool) -> None:
        """Tighter limits after running out of memory; the whole batch of this process is then computed again.

        Raises:
            HardwareError: nothing is left to give.
        """
        own, other = inputs["rows"], inputs["partner"]
        batch = int(np.sum(rows.prompt.lengths[own] + rows.completion.lengths[own]))
        batch += sum(y_tokens(int(n)) for n in rows.completion.lengths[other])
        # where layers are divided, the others wait in the middle of a pass and cannot be asked to run it again
        if self.engine.divided or not memory.tighten(self.engine, longest(rows), batch, recompute=backward):
            raise self.no_room(longest(rows) + 1)
        logger.warning(
            "Out of GPU memory; going on with %d recomputed layers%s and %s tokens a pass.",
            self.engine.checkpoint_layers,
            ", their inputs in main memory," if self.engine.offload else "",
            self.engine.token_budget,
        )
        if backward:
            for p in trainable(self.model).values():
                p.grad = None
        torch.cuda.empty_cache()

    def _step(self, inputs: dict, backward: bool, planned=None, mode: str = "train") -> torch.Tensor:
        rows, scores = planned or (self.rows, self.reference_scores)
        several = self.accelerator.num_processes > 1
        sums = retry.Sums(partial(self.accelerator.reduce, reduction="sum")) if several else None

        def attempt():
            if sums is not None:
                sums.again()
            return self._passes(inputs, rows, scores, sums, backward, mode)

        loss, results = retry.until_it_fits(attempt, partial(self._make_room, rows, inputs, backward))
        if several:
            loss = self.accelerator.reduce(loss, reduction="sum")
            if backward:
                self._reduce_gradients()
        self._note(results, mode)
        return loss.detach()

    def _passes(self, inputs: dict, rows, scores, sums, backward: bool, mode: str) -> tuple[torch.Tensor, list]:
        """This process's part of a step: its loss, and a (group, result) of each KL group. ``sums`` is all that it
        asks other processes for."""
        numbers, partner, size = inputs["rows"], inputs["partner"], inputs["size"]
        world = self.accelerator.num_processes
        micro = self.micro_batch if self.kl_group == "microbatch" and mode == "train" else size
        starts = range(0, size, micro * world)  # the same number on every process
        results, loss = [], torch.zeros((), device=self.engine.device)
        for start in starts:
            chunk = slice(start // world, start // world + micro)
            divisor = min(micro * world, size - start) * len(starts)
            if not len(numbers[chunk]):  # fewer rows than processes
                idle = partial(self._idle_z0, sums)
                z0 = self.engine.stand_by(idle, kl=self.calculate_KL, backward=backward, autocast=self._autocast)
                results.append((None, z0))
                continue
            group = self._group(rows, scores, numbers[chunk], partner[chunk])
            with self.engine.using_tree():
                result = self.engine.run(
                    group,
                    beta=self.beta,
                    desirable_weight=self.desirable_weight,
                    undesirable_weight=self.undesirable_weight,
                    loss_type=self.loss_type,
                    rows=divisor,
                    backward=self.accelerator.backward if backward else None,
                    reduce=sums,
                    autocast=self._autocast,
                )
            loss = loss + result.loss
            results.append((group, result))
        return loss, results

    def _group(self, rows: TokenRows, scores: ReferenceScores, numbers, partner) -> Group:
        device = self.engine.device
        own, other = numbers.tolist(), partner.tolist()

        def tensor(values, dtype=torch.float32):
            return torch.as_tensor(values, dtype=dtype, device=device)

        kl = self.calculate_KL
        return Group(
            [rows.prompt[i] for i in own],
            [rows.completion[i] for i in own],
            [rows.completion[i] for i in other] if kl else None,
            tensor(rows.labels[numbers], torch.bool),
            tensor(scores.values(zip(own, own, strict=True)), torch.float64),
            tensor(scores.values(zip(own, other, strict=True)), torch.float64) if kl else None,
        )

    def _idle_z0(self, sums) -> float:
        """Take part in z0 with no rows, so that the other processes do not wait."""
        if not self.calculate_KL:
            return 0.0
        total = sums(torch.zeros(2, dtype=torch.float64, device=self.engine.device)).tolist()
        return max(0.0, total[0] / total[1])

    def _reduce_gradients(self) -> None:
        """Sum over processes; the row losses were divided by the rows of all of them."""
        for p in trainable(self.model).values():
            grad = p.grad if p.grad is not None else torch.zeros_like(p)
            p.grad = self.accelerator.reduce(grad, reduction="sum")

    def _note(self, results: list, mode: str) -> None:
        reduce = partial(self.accelerator.reduce, reduction="sum") if self.accelerator.num_processes > 1 else None
        tokens = record(self._metrics[mode], results, self.beta, self.engine.device, reduce)
        if mode == "train":
            self._total_train_tokens += tokens
            if not self.state.global_step:
                self._say_start(*apart(results))
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _say_start(self, off: float, by_root: float) -> None:
        """Before the first update the policy is the reference: what they differ by, every reward has as an error."""
        if by_root > APART:
            logger.warning(
                "Before the first step the policy's log-probabilities are not the reference's: a row's differ by %.1f, "
                "and its reward begins with this error. Clear the kept reference scores (python -m kto_core cache "
                "--clear) and start again; if this is said again, please report it.",
                off,
            )

    def floating_point_ops(self, inputs) -> int:
        return 0  # the batch holds row numbers, which say nothing of the work


def _shared(accelerator, todo: int) -> tuple[slice, object]:
    """The part of a list that this process computes, and a function that joins all processes' dicts."""
    from accelerate.utils import gather_object

    size = -(-todo // accelerator.num_processes)
    start = accelerator.process_index * size

    def join(values: dict) -> dict:
        joined = {}
        for part in gather_object([values]):
            joined |= part
        return joined

    return slice(start, min(todo, start + size)), join
