"""Is a run better than its base? Rewards, AUC, margin and KL on held-out rows, and greedy answers of both.

A row's reward is β·(log π(y|x) − log π_ref(y|x)), a sum over the completion's tokens (KTO, arXiv 2402.01306, §4); π_ref
is the base model, or the adapter the run started from. The KL is estimated as KTO does it: on answers of other rows.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import DataError, ModelError
from .jobs import Progress, check_cancel, no_progress
from .model_files import require_adapter

SAMPLES = 3  # prompts answered by both models
ANSWER_TOKENS = 128
PADDED = 4096  # tokens of one padded batch, padding included


def evaluate(
    run,
    data: str,
    *,
    split: str = "train",
    checkpoint=None,
    samples: int = SAMPLES,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> dict:
    """Measure a run on held-out rows.

    Args:
        run: a `run.Run`, its id or folder.
        data: file or Hub id, in any form `dataset.load` takes.
        samples: prompts of the data that base and tuned model answer (greedy, at most 128 tokens).

    Returns:
        TRL's names: ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``, ``kl``, ``loss``; ``auc`` (the
        probability that a desirable row's reward beats an undesirable one's; 0.5 is chance), counts, ``samples``.

    Raises:
        DataError: unreadable, fewer than two rows that fit, or one label only.
        ModelError: the run has no adapter, or it does not load.
        Cancelled: ``cancel`` was set.
    """
    from . import chat, dataset

    config, adapter, name = chat.resolve(run, checkpoint)
    if adapter is None:
        raise DataError(f"{name} is no run, so there is nothing to compare. `runs list` shows the runs.")
    rows = dataset.load(data, split, progress=progress, cancel=cancel).rows
    loaded = chat.Chat.load(run, checkpoint=checkpoint, progress=progress, cancel=cancel)
    try:
        result = {"run": name, "data": str(data), **_rewards(loaded, config, rows, progress, cancel)}
        progress(None, "Answering…")
        prompts = _questions(rows, samples)
        tuned = answers(loaded, prompts, cancel=cancel)
        base = answers(loaded, prompts, tuned=False, cancel=cancel)
        result["samples"] = [
            {"prompt": p[-1]["content"], "base": b, "tuned": t} for p, b, t in zip(prompts, base, tuned, strict=True)
        ]
        return result
    finally:
        loaded.unload()


def _rewards(loaded, config, rows, progress: Progress, cancel) -> dict:
    import numpy as np

    from . import template

    encoded = [
        (e, row.label)
        for row, e in zip(
            rows, template.encode_iter(rows, loaded.tokenizer, config.max_length, cancel=cancel), strict=True
        )
        if e.fate != "too_long"
    ]
    labels = np.array([label for _, label in encoded], bool)
    if len(encoded) < 2 or labels.all() or not labels.any():
        raise DataError(
            f"Held-out data needs desirable and undesirable rows that fit into {config.max_length} tokens; "
            f"{len(encoded)} rows fit, {int(labels.sum())} of them desirable. Bring other rows."
        )
    pairs = [(e.prompt_ids, e.completion_ids) for e, _ in encoded]
    others = [(p, pairs[(i + 1) % len(pairs)][1]) for i, (p, _) in enumerate(pairs)]  # y' of another row
    scores = {}
    for number, (tuned, which, key) in enumerate(
        ((True, pairs, "policy"), (False, pairs, "ref"), (True, others, "kl"), (False, others, "ref_kl"))
    ):

        def tell(share: float, number: int = number) -> None:
            progress((number + share) / 4, "Scoring the rows with both models…")

        with contextlib.nullcontext() if tuned else _as_it_began(loaded.model, config.adapter):
            own = tuned or bool(config.adapter)
            scores[key] = sequence_logps(loaded, which, tuned=own, progress=tell, cancel=cancel)
    rewards = config.beta * (scores["policy"] - scores["ref"])
    kl = max(0.0, float((scores["kl"] - scores["ref_kl"]).mean()))
    signs = np.where(labels, 1.0, -1.0)
    weights = np.where(labels, config.desirable_weight, config.undesirable_weight)
    loss = weights * (1 - 1 / (1 + np.exp(-signs * (rewards - config.beta * kl))))
    chosen, rejected = rewards[labels], rewards[~labels]
    return {
        "rows": len(encoded),
        "left_out": len(rows) - len(encoded),
        "desirable": int(labels.sum()),
        "undesirable": int((~labels).sum()),
        "auc": auc(chosen, rejected),
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
        "rewards/margins": float(chosen.mean() - rejected.mean()),
        "kl": kl,
        "loss": float(loss.mean()),
    }


@contextlib.contextmanager
def _as_it_began(model, adapter: str):
    """With the adapter that the run went on from in place of its own; "" leaves the model alone."""
    if not adapter:
        yield
        return
    try:
        require_adapter(Path(adapter))
    except ModelError:
        raise ModelError(
            f"The run went on from the adapter in {adapter}, which is not there any more: what it gained since then "
            "cannot be told. Bring it back."
        ) from None
    own = model.active_adapter
    if "began" not in model.peft_config:
        model.load_adapter(adapter, adapter_name="began")
    model.set_adapter("began")
    try:
        yield
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


def _questions(rows, count: int) -> list[list[dict]]:
    """The first distinct prompts that are plain conversations."""
    found: list[list[dict]] = []
    for row in rows:
        if len(found) == count:
            break
        if row.prompt and row.prompt not in found and not row.tools and row.prompt[-1]["role"] == "user":
            found.append(row.prompt)
    return found


def answers(
    loaded,
    prompts: list[list[dict]],
    *,
    tuned: bool = True,
    max_new_tokens: int = ANSWER_TOKENS,
    batch_size: int = 8,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> list[str]:
    """Greedy answers of a loaded `chat.Chat` to conversations (role/content dicts), many at once, in order."""
    import torch
    from transformers import StoppingCriteriaList

    from .sampling import Stop
    from .template import render_chat

    model, tokenizer = loaded.model, loaded.tokenizer
    ids = [render_chat(p, tokenizer) for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    result = [""] * len(ids)
    own = model.generation_config.eos_token_id
    ends = [own] if isinstance(own, int) else list(own or [])
    base = loaded.has_adapter and not tuned
    with torch.inference_mode(), model.disable_adapter() if base else contextlib.nullcontext():
        for start in range(0, len(order), batch_size):
            check_cancel(cancel)
            progress(start / len(order), "Answering…")
            batch = order[start : start + batch_size]
            width = max(len(ids[i]) for i in batch)
            padded = [[tokenizer.pad_token_id] * (width - len(ids[i])) + ids[i] for i in batch]
            mask = [[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in batch]
            out = model.generate(
                input_ids=torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=list(dict.fromkeys([*ends, tokenizer.eos_token_id])),
                pad_token_id=tokenizer.pad_token_id,
                stopping_criteria=StoppingCriteriaList([Stop([cancel])]),
            )
            for i, row in zip(batch, out[:, width:], strict=True):
                result[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
    check_cancel(cancel)
    return result
