"""What a training of the sweep did to the rows that it did not see: rewards, movement, greedy answers."""

from __future__ import annotations

import numpy as np
from learning_model import Data, Model

PART = 64  # rows of the part that is measured early
GROUP = 32  # rows of a held-out KL group, whatever a training's batch
ANSWERS, ANSWER_TOKENS = 16, 48
HELD_TOKENS = {"cuda": 16384, "cpu": 2048}  # of a scoring pass, for reference and policy alike: so both round alike


class HeldOut:
    """Held-out rows of one setting under one model: pairs that never change, the reference's scores, base answers."""

    def __init__(self, model: Model, data: Data):
        from kto_core.engine.packing.batches import Planner

        plan = Planner(data.held, GROUP, 0, None, True).epoch(0)
        self.budget = HELD_TOKENS[model.device.type]
        self.data, self.rows, self.partner, self.bounds = data, plan.rows, plan.partner, plan.bounds
        self.part_groups = int(np.searchsorted(plan.bounds, PART)) if plan.bounds[-1] > PART else len(plan)
        with model.peft.disable_adapter():
            self.ref = {part: self.scores(model, part) for part in (False, True)}
            again = self.scores(model, False, self.budget // 3)  # packed otherwise, so rounded otherwise
            self.noise = float(np.abs(again[0] - self.ref[False][0]).mean())
            self.first = self._questions()
            self.answers = self.greedy(model)
            self.following = self._following(model)

    def _span(self, part: bool) -> int:
        return int(self.bounds[self.part_groups]) if part else len(self.rows)

    def scores(self, model: Model, part: bool, budget: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Log-probs of each row's answer and of its y', with the adapter as it is: fp64 ``[n]`` each."""
        n, held = self._span(part), self.data.held
        own, other = self.rows[:n], self.partner[:n]
        prompts = [held.prompt[i] for i in own]
        completions = [held.completion[i] for i in own] + [held.completion[i] for i in other]
        values = model.score(prompts + prompts, completions, budget or self.budget)
        return values[:n], values[n:]

    def measure(self, model: Model, beta: float, part: bool = False) -> tuple[dict, np.ndarray]:
        """What the log names, and more; the rows' log-ratios in the order of the held-out rows (a part: in its own)."""
        own, other = (a - b for a, b in zip(self.scores(model, part), self.ref[part], strict=True))
        n, order = self._span(part), self.rows[: self._span(part)]
        starts = self.bounds[: self.part_groups] if part else self.bounds[:-1]
        values = measures(
            own, other, self.data.held.labels[order], self.data.clusters[order],
            self.data.held.completion.lengths[order], starts, beta,
        )  # fmt: skip
        back = np.empty(n) if not part else own
        if not part:
            back[order] = own
        return values, back

    # -- answers --

    def _questions(self) -> list[int]:
        """Rows with the first of the held-out questions, shorter prompts before longer ones."""
        lengths = self.data.held.prompt.lengths
        middle = np.argsort(lengths, kind="stable")[: max(ANSWERS, len(lengths) * 3 // 4)]
        found: dict[int, int] = {}
        for i in np.random.default_rng(0).permutation(middle).tolist():
            found.setdefault(int(self.data.clusters[i]), i)
        return list(found.values())[:ANSWERS]

    def _padded(self, model: Model, tails: list[list[int]] | None = None):
        import torch

        prompts = [self.data.held.prompt[i].tolist() for i in self.first]
        width, tail = max(map(len, prompts)), max(map(len, tails)) if tails else 0
        ids = [[self.data.pad] * (width - len(p)) + p for p in prompts]
        mask = [[0] * (width - len(p)) + [1] * (len(p) + tail) for p in prompts]
        if tails:
            ids = [p + t + [self.data.pad] * (tail - len(t)) for p, t in zip(ids, tails, strict=True)]
        return *(torch.tensor(x, device=model.device) for x in (ids, mask)), width

    def greedy(self, model: Model) -> list[list[int]]:
        """Greedy answers as token ids, without what comes after their end."""
        import torch

        ids, mask, width = self._padded(model)
        model.peft.eval()
        with torch.no_grad(), model.autocast():
            out = model.peft.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=ANSWER_TOKENS, do_sample=False, temperature=None,
                top_p=None, top_k=None, use_cache=True, disable_compile=True, eos_token_id=self.data.ends,
                pad_token_id=self.data.pad,
            )  # fmt: skip
        model.peft.train()
        answers = []
        for row in out[:, width:].tolist():
            end = next((i + 1 for i, t in enumerate(row) if t in self.data.ends), len(row))
            answers.append(row[:end])
        return answers

    def _following(self, model: Model) -> np.ndarray:
        """After each token of the base's answers, the likeliest next one: ``[answers, tokens]``."""
        import torch

        ids, mask, width = self._padded(model, self.answers)
        tail = ids.shape[1] - width
        position = (mask.cumsum(1) - 1).clamp(min=0)
        model.peft.eval()
        with torch.no_grad(), model.autocast():
            logits = model.peft(
                input_ids=ids, attention_mask=mask, position_ids=position, logits_to_keep=tail + 1, use_cache=False
            ).logits[:, :tail]
            best = logits.argmax(-1).cpu().numpy()
        model.peft.train()
        return best

    def changed(self, model: Model) -> tuple[int, float]:
        """How many of the greedy answers are no longer the base's, and the mean share that is still the same.

        An answer is the same as long as its likeliest next token is: one pass over the base's answers tells, in place
        of generating. Places where that pass disagrees with the base's own answer (rounding) do not count.
        """
        now, number, share = self._following(model), 0, 0.0
        for answer, base, tuned in zip(self.answers, self.following, now, strict=True):
            n = len(answer)
            other = np.flatnonzero((tuned[:n] != base[:n]) & (base[:n] == answer))
            number += bool(len(other))
            share += (other[0] / n if len(other) else 1.0) / len(self.answers)
        return number, float(share)


def measures(own, other, labels, clusters, lengths, starts, beta: float) -> dict:
    """Args: log-ratios of the answers and of the y' ``[n]`` in KL groups that begin at ``starts``."""
    z0 = np.add.reduceat(other, starts) / np.diff([*starts, len(other)])
    z0 = np.repeat(np.maximum(z0, 0), np.diff([*starts, len(other)]))
    sign = np.where(labels, 1.0, -1.0)
    rewards = beta * own
    losses = 1 / (1 + np.exp(np.clip(sign * (rewards - beta * z0), -500, 500)))
    good, bad = rewards[labels], rewards[~labels]
    pull = np.where(labels, (rewards - good.mean()) / len(good), -(rewards - bad.mean()) / len(bad))
    _, number = np.unique(clusters, return_inverse=True)
    sums = np.bincount(number, pull)
    few = len(sums) / max(1, len(sums) - 1)
    above = good[:, None] - bad[None]
    return {
        "loss": float(losses.mean()),
        "margin": float(good.mean() - bad.mean()),
        "margin_se": float(np.sqrt(sum(r.var() / max(1, len(r) - 1) for r in (good, bad)))),
        "margin_se_question": float(np.sqrt(few * (sums**2).sum())),
        "chosen": float(good.mean()),
        "rejected": float(bad.mean()),
        "chosen_se": float(good.std() / np.sqrt(max(1, len(good) - 1))),
        "auc": float((above > 0).mean() + (above == 0).mean() / 2),
        "accuracy": float((np.where(labels, rewards > 0, rewards < 0)).mean()),
        "moved": float(np.abs(own).mean()),
        "moved_token": float(np.abs(own).sum() / lengths.sum()),
        "drift": float(other.mean()),  # the KL estimate before it is clamped
        "kl": float(z0.mean()),
        "held_rows": len(own),
    }


def repeats(answer: list[int]) -> bool:
    """Whether an answer goes round in circles: fewer than half of its neighbouring pairs are new."""
    pairs = list(zip(answer, answer[1:], strict=False))
    return len(pairs) >= 10 and len(set(pairs)) < len(pairs) / 2
