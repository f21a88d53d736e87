"""Numbers of a loaded run on rows: log-probs of answers under it and under the model that it began with, and rewards.

A row's reward is β·(log π(y|x) − log π_ref(y|x)), a sum over the completion's tokens (KTO, arXiv 2402.01306, §4); π_ref
is the base model, or the adapter the run started from. The KL is estimated as KTO does it: on answers of other rows.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

from kto_core.errors import ModelError
from kto_core.jobs import Progress, check_cancel, no_progress
from kto_core.models.adapter_gate import opened, require_adapter
from kto_core.verdict import intervals, judging, neutral

PADDED = 4096  # tokens of one padded batch, padding included


def measure(
    loaded,
    config,
    encoded: Sequence,
    labels: Sequence[bool],
    questions: Sequence[str],
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> tuple[dict, judging.Measured]:
    """What both models think of rows and of the neutral text.

    Args:
        loaded: a `chat.Chat` with the run's adapter. config: the run's.
        encoded, labels, questions: ``[n]``: a `template.Encoded`, its label, what it asks. Both labels are there.

    Returns:
        The numbers under TRL's names and ours, with intervals over questions, None for what is not finite; and what the
        verdict is made of.
    """
    import numpy as np

    good = np.array(labels, bool)
    pairs = [(e.prompt_ids, e.completion_ids) for e in encoded]
    others = [(p, pairs[(i + 1) % len(pairs)][1]) for i, (p, _) in enumerate(pairs)]  # y' of another row
    text = neutral.windows(loaded.tokenizer)
    work = [
        (tuned, which, key)
        for tuned, keys in ((True, ("policy", "kl", "text")), (False, ("ref", "ref_kl", "ref_text")))
        for which, key in zip((pairs, others, text), keys, strict=True)
    ]
    scores = {}
    for number, (tuned, which, key) in enumerate(work):

        def tell(share: float, number: int = number) -> None:
            progress((number + share) / len(work), "Computing rewards with both models…")

        with contextlib.nullcontext(True) if tuned else as_it_began(loaded.model, config.adapter) as own:
            scores[key] = sequence_logps(loaded, which, tuned=own, progress=tell, cancel=cancel)
    tokens = np.array([len(completion) for _, completion in pairs])
    nats = scores["policy"] - scores["ref"]
    kl = float(np.maximum(0.0, (scores["kl"] - scores["ref_kl"]).mean())) * config.beta
    signs = np.where(good, 1.0, -1.0)
    weights = np.where(good, config.desirable_weight, config.undesirable_weight)
    losses = weights * (1 - _sigmoid(signs * (config.beta * nats - kl)))
    perplexity = (_perplexity(scores["ref_text"], text), _perplexity(scores["text"], text))
    measured = summary(nats, labels, questions, tokens, perplexity, config.beta)
    numbers = {
        "moved": {"nats": measured.moved, "nats_per_token": measured.moved_per_token},
        "rewards/margins": config.beta * measured.margin,
        "margin_interval": _times(config.beta, intervals.of_difference(nats, questions, good)),
        "rewards/chosen": config.beta * measured.chosen,
        "chosen_interval": _times(config.beta, measured.chosen_interval),
        "rewards/rejected": config.beta * float(nats[~good].mean()),
        "accuracy": float(np.where(nats == 0, 0.5, (nats > 0) == good).mean()),
        "auc": auc(nats[good], nats[~good]) if np.isfinite(nats).all() else math.nan,
        "kl": kl / config.beta,
        "loss": float(losses.mean()),
        "lengths": {"good": float(tokens[good].mean()), "bad": float(tokens[~good].mean())},
        "forgotten": {
            "perplexity_before": perplexity[0],
            "perplexity_after": perplexity[1],
            "tokens": sum(len(ids) for _, ids in text),
        },
    }
    return finite(numbers), measured


def summary(
    nats, labels: Sequence[bool], questions: Sequence[Hashable], tokens, perplexity: tuple[float, float], beta: float
) -> judging.Measured:
    """What the verdict is made of.

    Args:
        nats, labels, questions, tokens: ``[n]``, one of each a row: log π − log π_ref of its answer, its label, what it
            asks, tokens of its answer. Both labels are there.
        perplexity: on the neutral text, (before, after).
    """
    import numpy as np

    nats, tokens, good = np.asarray(nats, float), np.asarray(tokens), np.array(labels, bool)
    by_label = [[q for q, g in zip(questions, good, strict=True) if g == side] for side in (True, False)]
    return judging.Measured(
        questions=(len(set(by_label[0])), len(set(by_label[1]))),
        moved=float(np.abs(nats).mean()),
        moved_per_token=float(np.abs(nats).sum() / tokens.sum()),
        margin=float(nats[good].mean() - nats[~good].mean()),
        margin_sure=intervals.of_difference(nats, questions, labels, judging.SURE),
        chosen=float(nats[good].mean()),
        chosen_interval=intervals.of_mean(nats[good], by_label[0]),
        chosen_per_token=float(nats[good].sum() / tokens[good].sum()),
        perplexity=perplexity,
        beta=beta,
    )


def speed(loaded) -> float:
    """Tokens a second that this model reads on this machine, measured on a piece of the neutral text."""
    text = neutral.windows(loaded.tokenizer)[:2]
    started = time.monotonic()
    sequence_logps(loaded, text)
    return sum(len(context) + len(ids) for context, ids in text) / max(1e-3, time.monotonic() - started)


def _sigmoid(x):
    import numpy as np

    return 0.5 * (1 + np.tanh(x / 2))  # without overflow


def _times(factor: float, interval: intervals.Interval | None) -> list[float] | None:
    return [factor * x for x in interval] if interval else None


def finite(value):
    """The same with None for each number that is not finite: JSON has no other word for it."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _perplexity(logps, windows) -> float:
    mean = -float(logps.sum()) / sum(len(ids) for _, ids in windows)
    return math.exp(mean) if mean < 700 else math.inf  # NaN stays NaN


@contextlib.contextmanager
def as_it_began(model, adapter: str) -> Iterator[bool]:
    """The model that the run began with; gives whether an adapter is on: the one it continued from.

    ``adapter``: its folder, "" for the base model, which is the caller's to ask for.

    Raises:
        ModelError: the folder no longer exists.
    """
    if not adapter:
        yield False
        return
    try:
        require_adapter(Path(adapter))
    except ModelError:
        raise ModelError(
            f"The run continued from the adapter in {adapter}, which no longer exists, so the run cannot be compared "
            "with it. Restore the folder and try again."
        ) from None
    own = model.active_adapter
    if "began" not in model.peft_config:
        model.load_adapter(str(opened(Path(adapter))), adapter_name="began")
    model.set_adapter("began")
    try:
        yield True
    finally:
        model.set_adapter(own)


def auc(chosen, rejected) -> float:
    """P(chosen > rejected) + P(equal) / 2 over all pairs: the area under the ROC curve of the reward."""
    import pandas as pd

    ranks = pd.Series([*chosen, *rejected]).rank().to_numpy()
    n, m = len(chosen), len(rejected)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def sequence_logps(
    loaded, pairs: Sequence[tuple[list[int], list[int]]], *, tuned: bool = True, progress=None, cancel=None
):
    """Log-probability of each completion after its prompt, summed over its tokens, in fp64 ``[n]``.

    Computed in padded batches of rows of like length; the LM head sees completion tokens only.
    """
    import numpy as np
    import torch

    model = loaded.model
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    result, done = np.empty(len(pairs)), 0
    base = loaded.has_adapter and not tuned
    with torch.inference_mode(), model.disable_adapter() if base else contextlib.nullcontext():
        for batch in _batches(order, pairs):
            check_cancel(cancel)
            rows = [pairs[i][0] + pairs[i][1] for i in batch]
            width = max(map(len, rows))
            ids = torch.tensor([r + [0] * (width - len(r)) for r in rows], device=model.device)
            mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=model.device)
            first = min(len(pairs[i][0]) for i in batch) - 1  # position that predicts the earliest completion token
            logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=width - first, use_cache=False).logits
            for k, i in enumerate(batch):
                a, b = len(pairs[i][0]), len(rows[k])
                logps = logits[k, a - 1 - first : b - 1 - first].float().log_softmax(-1)
                result[i] = logps.gather(1, ids[k, a:b, None]).double().sum().item()
            done += len(batch)
            if progress:
                progress(done / len(pairs))
    return result


def _batches(order: list[int], pairs) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in order:  # shortest first: the last one added is the widest
        width = len(pairs[i][0]) + len(pairs[i][1])
        if batch and (len(batch) + 1) * width > PADDED:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
