"""One optimizer batch: a packed policy pass, a KL pass on its kept prompt keys and values, z0, loss, backward.

If the batch fits one pass: policy forward (prompts' K/V kept), y' without gradients on those, z0, one backward. If not:
first z0 for the whole batch without gradients, then pass by pass, each row's loss divided by the rows of the batch.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.utils.checkpoint

from kto_core.engine.layers import attention, lean, recurrent, sharding
from kto_core.engine.layers.loss import Head, sequence_sums, token_logps
from kto_core.engine.packing import tree
from kto_core.engine.packing.passes import y_tokens
from kto_core.errors import Cancelled
from kto_core.hardware.out_of_memory import is_out_of_memory
from kto_core.models.language.part import decoder_of

from .group import Group, Objective, Result, Work
from .limits import Limits


class Engine:
    """Runs tree passes of one model.

    Args:
        model: a causal LM or a PeftModel over one.
        token_budget, checkpoint_layers: of its ``limits`` at first; ``scoring_tokens`` is the same as ``token_budget``.
    """

    def __init__(self, model, token_budget: int | None = None, checkpoint_layers: int = 0):
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.model = model
        self.causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.decoder = decoder_of(self.causal)
        self.device = self.causal.get_input_embeddings().weight.device
        self.divided = sharding.is_divided(self.decoder)
        self.layers = [m for m in self.decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
        self.limits = Limits(token_budget, token_budget, checkpoint_layers)
        self._configs = attention.configs(model)
        self.lean = lean.lean_forwards(self.decoder)
        self.recurrent = recurrent.recurrent_forwards(self.layers)

    @property
    def limits(self) -> Limits:
        """How batches are cut now. Those that are set recompute at most as many layers as there are."""
        return self._limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._limits = replace(limits, checkpoint_layers=min(limits.checkpoint_layers, len(self.layers)))
        for i, layer in enumerate(self.layers):
            layer.gradient_checkpointing = i < self._limits.checkpoint_layers
            layer._gradient_checkpointing_func = self._recomputed

    def _recomputed(self, layer: Callable, *inputs):
        """Run a layer that is computed again in the backward."""
        waiting = contextlib.nullcontext()
        if self.limits.offload:  # catches what the checkpoint saves, its inputs; inside, its own hooks come first
            waiting = torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda")
        with waiting:  # there is no dropout to repeat
            return torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)

    @contextlib.contextmanager
    def using_tree(self):
        """Inside, the model attends along the tree, its states go along it, and its leaner layers run."""
        with attention.use_tree(self._configs), lean.use(self.lean), lean.use(self.recurrent):
            yield

    def forward(self, ids: np.ndarray, positions: np.ndarray, run: attention.Pass) -> torch.Tensor:
        """Hidden states after the final norm, ``[T, hidden]``."""
        ids, positions = (torch.as_tensor(a, device=self.device)[None] for a in (ids, positions))
        out = self.decoder(input_ids=ids, position_ids=positions, use_cache=False, kto_tree=run)
        return out.last_hidden_state[0]

    # Divided layers are gathered by all processes together, so each runs as many passes as the one that has most.

    def together(self, *numbers: int) -> list[int]:
        """Of each number the largest that a process has, where layers are divided; else the own ones."""
        return sharding.largest(list(numbers), self.device) if self.divided else list(numbers)

    def _along(self, backward: bool = False) -> torch.Tensor:
        """A pass of one token that changes nothing, for a process that has no rows left."""
        t = tree.build([np.zeros(1, np.int32)], [np.zeros(1, np.int32)])
        hidden = self.forward(t.ids, t.positions, attention.Pass(t.segments, self.device))
        if backward:
            hidden.backward(torch.zeros_like(hidden))
        return hidden

    def stand_by(self, z0: Callable, *, kl: bool, backward: bool, autocast: Callable = contextlib.nullcontext):
        """Take part in `run` with no rows at all. ``z0()`` takes part in the sum of z0; its value is returned."""
        (count,), value = self.together(0), None
        with self.using_tree(), torch.set_grad_enabled(backward):
            if kl and count > 1:
                with autocast():
                    self.score([], [])
                value = z0()
            for _ in range(count):
                with autocast():
                    hidden = self._along()
                    if kl and count == 1:
                        with torch.no_grad():
                            self._along()
                        value = z0()
                if backward:
                    hidden.backward(torch.zeros_like(hidden))
        return z0() if value is None else value

    def _tensor(self, array) -> torch.Tensor:
        return torch.as_tensor(array, device=self.device)

    @torch.no_grad()
    def score(self, prompts, completions, budget: int | None = None, done: Callable | None = None) -> np.ndarray:
        """Sequence log-probs of ``completions[i]`` after ``prompts[i]``, fp64 ``[n]``, with the adapters as they are.

        ``done(numbers, values)`` is called after each pass.

        Raises:
            Cancelled: from ``done``. Where layers are divided, the other processes end here, too, and return.
        """
        order = tree.sorted_by_prefix(prompts, completions, range(len(prompts)))
        result = np.empty(len(prompts))
        todo = deque(tree.packs(prompts, completions, np.zeros(len(prompts), int), order, budget) if order else [])
        stopped = None
        with self.using_tree():
            while True:
                left, stop = self.together(len(todo), stopped is not None)
                if stop or not left:
                    break
                if not todo:
                    self._along()
                    continue
                numbers = todo.popleft()
                values = self._score_pass([prompts[i] for i in numbers], [completions[i] for i in numbers])
                if values is None:  # too much for the memory
                    torch.cuda.empty_cache()
                    middle = len(numbers) // 2
                    todo.extendleft([numbers[middle:], numbers[:middle]])
                    continue
                result[numbers] = values
                try:
                    if done is not None:
                        done(numbers, values)
                except Cancelled as e:
                    stopped = e
        if stopped is not None:
            raise stopped
        return result

    def _score_pass(self, prompts, completions) -> np.ndarray | None:
        """None: out of GPU memory, and the pass can be split."""
        try:
            t = tree.build(prompts, completions)
            hidden = self.forward(t.ids, t.positions, attention.Pass(t.segments, self.device))
            return self._sums(hidden, t.scores)[0].double().cpu().numpy()
        except RuntimeError as e:
            if len(prompts) == 1 or self.divided or not is_out_of_memory(e):
                raise
            return None

    def _sums(self, hidden, scores: tree.Scores, stats: bool = False):
        """Sequence sums of log-prob, entropy and mean logit from the hidden states of a pass."""
        index, sequence = self._tensor(scores.index), self._tensor(scores.sequence)
        tokens = token_logps(Head.of(self.causal), hidden[index], self._tensor(scores.target), stats)
        values = [tokens.logps, tokens.entropy, tokens.mean_logits] if stats else [tokens.logps]
        return [sequence_sums(v, sequence, scores.count) for v in values]

    def run(
        self,
        group: Group,
        objective: Objective,
        *,
        rows: int | None = None,
        backward: Callable[[torch.Tensor], None] | None = None,
        reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
        autocast: Callable = contextlib.nullcontext,
    ) -> Result:
        """Loss of the group, and its gradient if ``backward`` is given.

        Args:
            rows: what the sum of the row losses is divided by; default the group's rows.
            reduce: sums a tensor over all processes; z0 is then the mean over all their groups.
            autocast: a context for the forward passes.
        """
        n = len(group.prompts)
        kl = group.borrowed is not None and objective.loss_type == "kto"
        extra = [y_tokens(len(b)) for b in group.borrowed] if kl else [0] * n
        order = tree.sorted_by_prefix(group.prompts, group.completions, range(n))
        passes = tree.packs(group.prompts, group.completions, extra, order, self.limits.token_budget)
        work = Work(group, objective, rows or n, kl, extra, passes, backward, reduce, autocast)
        (count,) = self.together(len(passes))
        with self.using_tree(), torch.set_grad_enabled(backward is not None):
            z0 = self._run_whole(work) if count == 1 else self._run_in_passes(work, count)
        lengths = self._tensor([len(c) for c in group.completions])
        tokens = int(sum(len(p) + len(c) for p, c in zip(group.prompts, group.completions, strict=True)))
        return Result(work.loss, z0, *work.totals, lengths, tokens, work.packed, len(passes))

    def _run_whole(self, work: Work) -> torch.Tensor:
        """The group in one pass, whose kept keys and values the y' run on. Returns z0."""
        (numbers,) = work.passes
        z0 = torch.zeros((), device=self.device)
        with work.autocast():
            t = work.build_tree(numbers)
            branches = tree.branch(t, [work.group.borrowed[i] for i in numbers]) if work.kl else None
            self._recompute_as_needed(work, len(t) + sum(work.borrowed_tokens))
            hidden, store = self.hidden(t, branches)
            if branches is not None:
                values = self.branch_logps(branches, hidden, store)
                z0 = self._z0(values, work.group.ref_kl[self._tensor(np.array(numbers))], work.reduce)
                del store
            sums = self._sums(hidden, t.scores, stats=True)
        self._finish_pass(work, numbers, len(t), sums, z0)
        return z0

    def _run_in_passes(self, work: Work, count: int) -> torch.Tensor:
        """z0 of the whole group without gradients, then pass by pass; ``count`` of them, with those of one token for a
        process that has fewer. Returns z0."""
        z0 = torch.zeros((), device=self.device)
        if work.kl:
            with work.autocast():
                values = self.score(work.group.prompts, work.group.borrowed, self.limits.scoring_tokens)
            z0 = self._z0(self._tensor(values), work.group.ref_kl, work.reduce)
        for numbers in work.passes:
            with work.autocast():
                t = work.build_tree(numbers)
                self._recompute_as_needed(work, len(t))
                sums = self._sums(self.hidden(t)[0], t.scores, stats=True)
            self._finish_pass(work, numbers, len(t), sums, z0)
        for _ in range(count - len(work.passes)):
            with work.autocast():
                self._along(work.backward is not None)
        return z0

    def _recompute_as_needed(self, work: Work, tokens: int) -> None:
        """As many layers as a pass of so many tokens has to compute again in its backward."""
        if self.limits.needed is not None and work.backward is not None:
            layers = max(self.limits.least_layers, self.limits.needed(tokens))
            self.limits = replace(self.limits, checkpoint_layers=layers)

    def hidden(self, t: tree.Tree, branches: tree.Branches | None = None) -> tuple[torch.Tensor, dict | None]:
        """Hidden states of a pass over the tree, ``[T, hidden]``, and what of it the branches need."""
        run = attention.Pass.keeping(t, branches, self.device)
        store = run.store
        hidden = self.forward(t.ids, t.positions, run)
        run.close()
        return hidden, store

    def _finish_pass(self, work: Work, numbers: list[int], packed: int, sums: list[torch.Tensor], z0) -> None:
        """Loss and backward of the rows of a pass of ``packed`` tokens; what they gave goes to the ``work``."""
        group, place = work.group, self._tensor(np.array(numbers))
        losses = work.objective.losses(sums[0], group.ref[place].to(sums[0].dtype), z0, group.labels[place])
        part = losses.sum() / work.rows
        if work.backward is not None:
            work.backward(part)
        work.loss = work.loss + part.detach()
        for i, values in enumerate(sums):
            if work.totals[i] is None:
                work.totals[i] = torch.empty(len(group.prompts), dtype=values.dtype, device=self.device)
            work.totals[i][place] = values.detach()
        work.packed += packed

    @torch.no_grad()
    def branch_logps(self, branches: tree.Branches, hidden, store) -> torch.Tensor:
        """Sequence log-probs of the y' below the prompts of a pass whose K/V were kept."""
        states = hidden.detach()[self._tensor(branches.carry)]
        if branches.segments is not None:
            run = attention.Pass(branches.segments, self.device, prefix=store)
            states = torch.cat([states, self.forward(branches.ids, branches.positions, run)])
        elif self.divided:
            self._along()
        return self._sums(states, branches.scores)[0]

    def _z0(self, logps, ref_logps, reduce) -> torch.Tensor:
        # fp64 whether the batch took one pass or several: processes that add up must agree on the format
        difference = (logps - ref_logps.to(logps.dtype)).detach().double()
        total = torch.stack([difference.sum(), torch.full_like(difference.sum(), len(difference))])
        if reduce is not None:
            total = reduce(total)
        return (total[0] / total[1]).clamp(min=0)
