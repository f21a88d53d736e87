"""One optimizer batch: a packed policy pass, a KL pass on its kept prompt keys and values, z0, loss, backward.

If the batch fits one pass: policy forward (prompts' K/V kept), y' without gradients on those, z0, one backward. If not:
first z0 for the whole batch without gradients, then pass by pass, each row's loss divided by the rows of the batch.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.utils.checkpoint

from ..errors import Cancelled
from ..out_of_memory import is_out_of_memory
from . import attention, lean, sharding, tree
from .loss import Head, kto_losses, sequence_sums, token_logps
from .passes import y_tokens

STOP = 2**31  # more than there are passes


@dataclass
class Group:
    """One KL group. Lists of int32 arrays; ``borrowed[i]`` is row i's y' (None: the loss has no KL).

    ``labels`` bool, ``ref`` and ``ref_kl`` fp32 ``[n]`` on the model's device.
    """

    prompts: list[np.ndarray]
    completions: list[np.ndarray]
    borrowed: list[np.ndarray] | None
    labels: torch.Tensor
    ref: torch.Tensor
    ref_kl: torch.Tensor | None


@dataclass
class Result:
    """``loss``: this group's share of the step's loss. ``logps`` ``[n]`` in the group's order; ``entropy`` and
    ``mean_logits``: sums over each row's completion tokens. ``tokens``: real tokens of the rows; ``packed``: tokens
    that the policy pass computed."""

    loss: torch.Tensor
    z0: torch.Tensor
    logps: torch.Tensor
    entropy: torch.Tensor
    mean_logits: torch.Tensor
    lengths: torch.Tensor
    tokens: int
    packed: int
    passes: int


class Engine:
    """Runs tree passes of one model.

    Args:
        model: a causal LM or a PeftModel over one.
        token_budget: packed tokens of one pass with gradients; None: everything in one. ``scoring_tokens``: of one
            without, the same unless set.
        checkpoint_layers: decoder layers (from the first) that are computed again in the backward to save memory.

    Where ``needed`` is set (tokens of a pass -> layers it has to compute again), each pass with gradients sets
    ``checkpoint_layers`` by it, to ``least_layers`` at least. ``offload``: the inputs of layers that are computed again
    wait for their backward in main memory.
    """

    def __init__(self, model, token_budget: int | None = None, checkpoint_layers: int = 0):
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.model = model
        self.causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.decoder = getattr(self.causal, self.causal.base_model_prefix)
        self.device = self.causal.get_input_embeddings().weight.device
        self.token_budget = self.scoring_tokens = token_budget
        self.divided = sharding.is_divided(self.decoder)
        self.layers = [m for m in self.decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
        self.offload = False
        self.checkpoint_layers = checkpoint_layers
        self.needed: Callable[[int], int] | None = None
        self.least_layers = 0
        self._configs = attention.configs(model)
        self.lean = lean.lean_forwards(self.decoder)

    @property
    def checkpoint_layers(self) -> int:
        return self._checkpointed

    @checkpoint_layers.setter
    def checkpoint_layers(self, count: int) -> None:
        self._checkpointed = min(count, len(self.layers))
        for i, layer in enumerate(self.layers):
            layer.gradient_checkpointing = i < self._checkpointed
            layer._gradient_checkpointing_func = self._again

    def _again(self, layer: Callable, *inputs):
        """Run a layer that is computed again in the backward."""
        waiting = contextlib.nullcontext()
        if self.offload:  # catches what the checkpoint saves, its inputs; inside, its own hooks come first
            waiting = torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda")
        with waiting:  # there is no dropout to repeat
            return torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)

    @contextlib.contextmanager
    def using_tree(self):
        """Inside, the model attends along the tree and runs its leaner layers."""
        with attention.use_tree(self._configs), lean.use(self.lean):
            yield

    def forward(self, ids: np.ndarray, positions: np.ndarray, run: attention.Pass) -> torch.Tensor:
        """Hidden states after the final norm, ``[T, hidden]``."""
        ids, positions = (torch.as_tensor(a, device=self.device)[None] for a in (ids, positions))
        out = self.decoder(input_ids=ids, position_ids=positions, use_cache=False, kto_tree=run)
        return out.last_hidden_state[0]

    # Divided layers are gathered by all processes together, so each runs as many passes as the one that has most.

    def together(self, number: int) -> int:
        """The largest of all processes' numbers where layers are divided; else the own one."""
        return sharding.most(number, self.device) if self.divided else number

    def _along(self, backward: bool = False) -> torch.Tensor:
        """A pass of one token that changes nothing, for a process that has no rows left."""
        t = tree.build([np.zeros(1, np.int32)], [np.zeros(1, np.int32)])
        hidden = self.forward(t.ids, t.positions, attention.Pass(t.segments, self.device))
        if backward:
            hidden.backward(torch.zeros_like(hidden))
        return hidden

    def stand_by(self, z0: Callable, *, kl: bool, backward: bool, autocast: Callable = contextlib.nullcontext):
        """Take part in `run` with no rows at all. ``z0()`` takes part in the sum of z0; its value is returned."""
        count, value = self.together(0), None
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
            while (left := self.together(STOP if stopped else len(todo))) and left < STOP:
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
        *,
        beta: float,
        desirable_weight: float,
        undesirable_weight: float,
        loss_type: str = "kto",
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
        rows = rows or n
        kl = group.borrowed is not None and loss_type == "kto"
        extra = [y_tokens(len(b)) for b in group.borrowed] if kl else [0] * n
        order = tree.sorted_by_prefix(group.prompts, group.completions, range(n))
        passes = tree.packs(group.prompts, group.completions, extra, order, self.token_budget)
        loss_of = partial(
            kto_losses, beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight,
            loss_type=loss_type,
        )  # fmt: skip
        count = self.together(len(passes))
        z0 = torch.zeros((), device=self.device)
        totals, packed, loss = [None, None, None], 0, 0.0
        with self.using_tree(), torch.set_grad_enabled(backward is not None):
            if kl and count > 1:
                with autocast():
                    values = self.score(group.prompts, group.borrowed, self.scoring_tokens)
                z0 = self._z0(self._tensor(values), group.ref_kl, reduce)
            for numbers in passes:
                with autocast():
                    t = tree.build([group.prompts[i] for i in numbers], [group.completions[i] for i in numbers])
                    branches = store = keep = None
                    if kl and count == 1:
                        branches = tree.branch(t, [group.borrowed[i] for i in numbers])
                        store, keep = {}, self._tensor(branches.keep)
                    if self.needed is not None and backward is not None:
                        tokens = len(t) + (sum(extra[i] for i in numbers) if count == 1 else 0)
                        self.checkpoint_layers = max(self.least_layers, self.needed(tokens))
                    run = attention.Pass(t.segments, self.device, keep=keep, store=store)
                    hidden = self.forward(t.ids, t.positions, run)
                    run.close()
                    if branches is not None:
                        values = self.branch_logps(branches, hidden, store)
                        z0 = self._z0(values, group.ref_kl[self._tensor(np.array(numbers))], reduce)
                        del store
                    sums = self._sums(hidden, t.scores, stats=True)
                place = self._tensor(np.array(numbers))
                losses = loss_of(sums[0], group.ref[place].to(sums[0].dtype), z0, group.labels[place])
                part = losses.sum() / rows
                if backward is not None:
                    backward(part)
                loss = loss + part.detach()
                for i, values in enumerate(sums):
                    if totals[i] is None:
                        totals[i] = torch.empty(n, dtype=values.dtype, device=self.device)
                    totals[i][place] = values.detach()
                packed += len(t)
            for _ in range(count - len(passes)):
                with autocast():
                    self._along(backward is not None)
        lengths = self._tensor([len(c) for c in group.completions])
        tokens = int(sum(len(p) + len(c) for p, c in zip(group.prompts, group.completions, strict=True)))
        return Result(loss, z0, *totals, lengths, tokens, packed, len(passes))

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
