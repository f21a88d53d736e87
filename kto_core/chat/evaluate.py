"""Is a run better than the model it began with? Numbers on held-out rows, greedy answers of both, and a verdict."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from kto_core.errors import DataError, DiskError
from kto_core.jobs import Progress, check_cancel, no_progress, part_of
from kto_core.verdict import held_out, judging, keeping

from . import measuring

if TYPE_CHECKING:
    from kto_core.planning.training_data import Planned

SAMPLES = 16  # prompts answered by both models
ANSWER_TOKENS = 128
SECONDS = {True: 50.0, False: 35.0}  # on a GPU and without one: for the rewards of a run's own rows; as many to answer
READS = 4  # passes over the rows: two models, each with the rows' own answers and with those of other rows
SLOWER = 4  # times that a token takes when it is written and not read, eight answers at once
LEAST_SAMPLES = 2


def evaluate(
    run,
    data: str | None = None,
    *,
    split: str = "train",
    checkpoint=None,
    samples: int = SAMPLES,
    keep: bool = True,
    planned: Planned | None = None,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> dict:
    """Measure a run on rows that it was not trained on, and judge it.

    Args:
        run: a `run.Run`, its id or folder.
        data: file or Hub id, in any form `dataset.load` takes; all of its rows are used. None: the run's validation
            rows, as many as this machine reads in `SECONDS`.
        samples: prompts of the data that both models answer (greedy, at most 128 tokens).
        keep: write the result into the run's folder as its verdict. A checkpoint's is never kept.
        planned: the run's rows where the caller has them.

    Returns:
        ``moved`` (nats), TRL's ``rewards/…`` with ``margin_interval`` and ``chosen_interval`` (95 %, over questions),
        ``answers`` (changed, their tokens) and ``answer_lengths`` by label, ``accuracy`` at 0, ``auc`` (the probability
        that a good row's reward beats a bad one's; 0.5 is chance), ``kl``, ``loss``, ``forgotten`` (perplexity on a
        neutral text), ``verdict`` (word, reasons, sentence), counts, ``remarks``, ``samples``. A number is None where
        it is not finite or not known.

    Raises:
        DataError: unreadable, no row held out, fewer than two rows that fit, or one label only.
        ModelError: the run has no adapter, or it does not load.
        Cancelled: ``cancel`` was set.
    """
    from kto_core.models.load import load_tokenizer
    from kto_core.runs import folders
    from kto_core.runs.run import Run

    from . import chat

    config, adapter, name = chat.resolve(run, checkpoint)
    if adapter is None:
        raise DataError(f"{name} is not a run, so there is nothing to compare. `runs list` shows all runs.")
    found = run if isinstance(run, Run) else folders.find(str(run))
    tokenizer = load_tokenizer(config.model, progress, cancel)
    rows = held_out.find(found, config, tokenizer, data, split, part_of(progress, 0.0, 0.1), cancel, planned)
    _require_both_labels(rows, config.max_length)
    mark = keeping.fingerprint(Path(adapter))
    loaded = chat.Chat.load(run, checkpoint=checkpoint, progress=progress, cancel=cancel)
    try:
        if data is None:
            progress(0.1, "Measuring the speed…")
            rate, seconds = measuring.speed(loaded), SECONDS[loaded.device != "cpu"]
            rows = rows.within(int(rate * seconds / READS), config.seed)
            samples = min(samples, max(LEAST_SAMPLES, int(rate * seconds / (2 * SLOWER * ANSWER_TOKENS))))
        labels = [row.label for row in rows.rows]
        numbers, measured = measuring.measure(
            loaded,
            config,
            rows.encoded,
            labels,
            rows.questions,
            part_of(progress, 0.1, 0.7 if samples else 1.0),
            cancel,
        )
        result = {"run": name, "data": rows.source, **_counts(rows, labels), **numbers}
        result |= _answered(loaded, config, rows.rows, samples, part_of(progress, 0.7, 1.0), cancel)
        progress(1.0, "Measured.")
    finally:
        loaded.unload()
    verdict = judging.judge(measured)
    result["verdict"] = {"word": verdict.word, "reasons": list(verdict.reasons), "sentence": verdict.sentence}
    result["remarks"] = rows.remarks
    if keep and not checkpoint:
        try:
            keeping.write(found.path, result, mark)
        except OSError as e:
            result["remarks"] = [*rows.remarks, f"The verdict is not kept with the run: {DiskError.of(found.path, e)}"]
    return result


def _require_both_labels(rows: held_out.HeldOut, max_length: int) -> None:
    good = sum(row.label for row in rows.rows)
    if len(rows.rows) < 2 or good in (0, len(rows.rows)):
        known = f" {rows.trained_on:,} more ask what the run was trained on." if rows.trained_on else ""
        raise DataError(
            f"Held-out data needs good and bad rows of at most {max_length} tokens. {len(rows.rows)} rows fit, {good} "
            f"of them good.{known} Use other rows."
        )


def _counts(rows: held_out.HeldOut, labels: list[bool]) -> dict:
    return {
        "rows": len(labels),
        "desirable": sum(labels),
        "undesirable": len(labels) - sum(labels),
        "questions": len(set(rows.questions)),
        "left_out": rows.too_long + (rows.trained_on or 0),
        "too_long": rows.too_long,
        "unused": rows.unused,
        "trained_on": rows.trained_on,
    }


def _answered(loaded, config, rows, count: int, progress: Progress, cancel) -> dict:
    """Greedy answers of the run and of the model that it began with, and how they differ."""
    asked = _asked(rows, count)
    if not asked:
        return {"answers": None, "samples": []}
    prompts = [row.prompt for row in asked]
    tuned = answers(loaded, prompts, progress=part_of(progress, 0.0, 0.5), cancel=cancel)
    with measuring.as_it_began(loaded.model, config.adapter) as own:
        base = answers(loaded, prompts, tuned=own, progress=part_of(progress, 0.5, 1.0), cancel=cancel)
    lengths = [
        [len(loaded.tokenizer(text, add_special_tokens=False).input_ids) for text in texts] for texts in (base, tuned)
    ]
    sides = {"good": [i for i, row in enumerate(asked) if row.label],
             "bad": [i for i, row in enumerate(asked) if not row.label]}  # fmt: skip

    def tokens(after: bool, which: list[int]) -> float:
        return sum(lengths[after][i] for i in which) / len(which)

    everything = list(range(len(asked)))
    return {
        "answers": {
            "asked": len(prompts),
            "changed": sum(b != t for b, t in zip(base, tuned, strict=True)),
            "tokens_before": tokens(False, everything),
            "tokens_after": tokens(True, everything),
            "at_most": ANSWER_TOKENS,
        },
        "answer_lengths": {
            side: {"asked": len(which), "before": tokens(False, which), "after": tokens(True, which)}
            for side, which in sides.items()
            if which
        },
        "samples": [
            {"prompt": _said(row.prompt), "label": bool(row.label), "base": b, "tuned": t}
            for row, b, t in zip(asked, base, tuned, strict=True)
        ],
    }


def _said(prompt: list[dict]) -> str:
    return content if isinstance(content := prompt[-1]["content"], str) else json.dumps(content, ensure_ascii=False)


def _asked(rows, count: int) -> list:
    """Rows with distinct prompts that are plain conversations, of both labels by turns."""
    sides: dict[bool, list] = {True: [], False: []}
    seen: list[list[dict]] = []
    for row in rows:
        side = sides[bool(row.label)]
        if len(side) == count or row.prompt in seen:
            continue
        if row.prompt and not row.tools and row.prompt[-1]["role"] == "user":
            side.append(row)
            seen.append(row.prompt)
    few = min(map(len, sides.values()))
    mixed = [row for pair in zip(*sides.values(), strict=False) for row in pair]
    return [*mixed, *sides[True][few:], *sides[False][few:]][:count]


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

    from kto_core.data.rendering.template import render_chat

    from .sampling import Stop
    from .thought_text import whole

    model, tokenizer = loaded.model, loaded.tokenizer
    ids = [render_chat(p, tokenizer, style=loaded.style) for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    result = [""] * len(ids)
    own = model.generation_config.eos_token_id
    ends = [own] if isinstance(own, int) else list(own or [])
    base = loaded.has_adapter and not tuned
    with torch.inference_mode(), model.disable_adapter() if base else contextlib.nullcontext():
        for start in range(0, len(order), batch_size):
            check_cancel(cancel)
            progress(start / len(order), "Generating answers…")
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
                result[i] = whole(tokenizer, ids[i], row.tolist()).strip()
    check_cancel(cancel)
    return result
