"""One training of the sweep and what is measured of it. `learning_plan.py` says which; this module runs it.

Each training puts a fresh adapter into a model and takes the product's own step: the packed engine, its groups and
pairs, its optimizer, its schedule. The reference is scored once and kept.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
from learning_held import HeldOut, repeats
from learning_model import Data, Model

EARLY = (3, 10, 20)  # steps after which a part of the held-out rows is measured
TRIES = 6  # of a training that runs out of memory


def digits(value, n: int = 6):
    """A float with ``n`` significant digits; None for one that is not finite; lists and dicts of them."""
    if isinstance(value, dict):
        return {k: digits(v, n) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [digits(v, n) for v in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.{n}g}") if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def optimizer(model: Model, rate: float, defaults: dict):
    """The optimizer that transformers' Trainer would make of the product's arguments."""
    from transformers import Trainer, TrainingArguments

    name = defaults["optim"] if model.device.type == "cuda" else "adamw_torch"
    args = TrainingArguments(output_dir="none", optim=name, learning_rate=rate, weight_decay=0.0, report_to=[])
    kind, keywords = Trainer.get_optimizer_cls_and_kwargs(args)
    return kind(list(model.parameters.values()), weight_decay=defaults["weight_decay"], **keywords), name


def train(model: Model, rows, job, defaults: dict, after=lambda step, rates: None, fit: bool = True) -> dict:
    """Train ``job`` on ``rows``; ``after(step, rates)`` is called after the steps of `EARLY`. ``fit``: choose the size
    of the passes by the memory that is free; else they stay as they are."""
    import torch
    from transformers import get_scheduler

    from kto_core.engine.group import Group, Objective
    from kto_core.engine.packing.batches import Planner

    model.reset(job.seed, job.start)
    model.peft.train()
    planner = Planner(rows, job.batch, job.seed, None, True)
    if fit:
        model.fit(planner)
    steps = job.max_steps if job.max_steps > 0 else math.ceil(job.epochs * len(planner.epoch(0)))
    scores = model.reference(rows, planner, steps)
    adam, optim = optimizer(model, job.rate, defaults)
    warmup = 0 if job.schedule == "constant" else math.ceil(steps * defaults["warmup_ratio"])
    schedule = get_scheduler(job.schedule, adam, num_warmup_steps=warmup, num_training_steps=steps)
    parameters, tensor = list(model.parameters.values()), lambda v: torch.as_tensor(v, device=model.device)
    losses, norms, rates, tokens, passes = [], [], [], 0, 0
    started, outside = time.perf_counter(), 0.0
    for step in range(steps):
        epoch, g = divmod(step, len(planner.epoch(0)))
        own, other = (part.tolist() for part in planner.epoch(epoch).group(g))
        group = Group(
            [rows.prompt[i] for i in own],
            [rows.completion[i] for i in own],
            [rows.completion[i] for i in other],
            tensor(rows.labels[own]),
            tensor(scores.values(zip(own, own, strict=True))),
            tensor(scores.values(zip(own, other, strict=True))),
        )
        with model.engine.using_tree():
            result = model.engine.run(
                group, Objective(job.beta), backward=torch.Tensor.backward, autocast=model.autocast
            )
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, defaults["max_grad_norm"]))
        rates.append(adam.param_groups[0]["lr"])
        adam.step()
        schedule.step()
        adam.zero_grad()
        losses.append(result.loss.detach())
        tokens, passes = tokens + result.tokens, passes + result.passes
        if step + 1 in EARLY:
            now = time.perf_counter()
            after(step + 1, rates)
            outside += time.perf_counter() - now
    curve = torch.stack(losses).float().cpu().numpy()
    seconds = time.perf_counter() - started - outside
    few = max(1, min(5, len(curve) // 4))
    return {
        "steps": steps, "train_rows": len(rows), "optim": optim, "warmup": warmup, "rate_first": rates[0],
        "rate_sum": sum(rates), "train_seconds": seconds, "step_seconds": seconds / steps,
        "tokens_per_second": tokens / seconds, "tokens": tokens, "passes_per_step": passes / steps,
        "recomputed": model.engine.limits.checkpoint_layers, "first_loss": float(curve[:few].mean()),
        "last_loss": float(curve[-few:].mean()), "losses": digits(curve, 4),
        "norms": digits(torch.stack(norms).float().cpu().numpy(), 3),
    }  # fmt: skip


def run(model: Model, data: Data, held: HeldOut, job, defaults: dict, tokenizer=None) -> tuple[dict, list]:
    """Train and measure ``job``: its line of the results, and the held-out rows' log-ratios. With ``job.show`` also
    what the model answers, as text if there is a tokenizer.

    Raises:
        RuntimeError: out of memory however small the passes.
    """
    import torch

    from kto_core.engine import limits
    from kto_core.engine.packing.batches import longest
    from kto_core.hardware.out_of_memory import is_out_of_memory

    started, rows = time.perf_counter(), data.some(job.rows, job.seed)
    early: list[dict] = []

    def after(step: int, rates: list[float]) -> None:
        values, _ = held.measure(model, job.beta, part=True)
        early.append({"step": step, "rate_sum": sum(rates), **values})

    tight = 0
    while True:
        try:
            early.clear()
            facts = train(model, rows, job, defaults, after, fit=not tight)
            break
        except RuntimeError as e:
            if not is_out_of_memory(e) or tight >= TRIES:
                raise
            tight += 1
        torch.cuda.empty_cache()
        tighter = limits.tightened(model.engine, longest(rows), job.batch * longest(rows))
        if tighter is None:
            raise RuntimeError("out of memory with the smallest passes")
        model.engine.limits = tighter
    model.engine.limits = replace(model.engine.limits, least_layers=0)
    values, gains = held.measure(model, job.beta)
    part, _ = held.measure(model, job.beta, part=True)
    changed, same = held.changed(model)
    record = {
        **facts, **values, "early": early, "part": part, "noise": held.noise, "answers": len(held.answers),
        "answers_changed": changed, "answers_same_share": same, "tightened": tight,
        "base_repeats": sum(map(repeats, held.answers)),
        "seconds": time.perf_counter() - started, "device": "cpu",
    }  # fmt: skip
    if torch.cuda.is_available():
        record["device"] = torch.cuda.get_device_name()
        record["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if job.show:
        answers = held.greedy(model)
        record["repeats"] = sum(map(repeats, answers))
        if tokenizer is not None:
            record["shown"] = [
                {"base": tokenizer.decode(b), "tuned": tokenizer.decode(t)}
                for b, t in zip(held.answers[:3], answers[:3], strict=True)
            ]
    return digits(record), digits(gains, 4)
