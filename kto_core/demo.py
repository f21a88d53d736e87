"""The demo: train the embedded model on the example, and show what it learned on questions it has not seen.

It goes through the same doors as any run (`folders.create`, `start.start`, `evaluate`), so that what it shows is what a
user gets.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable

from .errors import KTOError, RunError
from .jobs import Progress, check_cancel, no_progress
from .paths import EXAMPLES

DATA = EXAMPLES / "short_answers.jsonl"
HELD_OUT = EXAMPLES / "heldout.jsonl"
PROMPTS = EXAMPLES / "heldout_prompts.jsonl"
SHORT = 15  # words; an answer of at most so many counts as short
ANSWER_TOKENS = 96
SAMPLES = 3
POLL = 0.2  # seconds
PREPARED, TRAINED = 0.25, 0.7  # shares of the whole, by the time they take


def run_demo(
    seed: int = 3407,
    *,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
    overrides: dict | None = None,
    on_run: Callable[[object], None] | None = None,
    prompts: int | None = None,
) -> dict:
    """Train preset ``demo`` on the example and measure the habit before and after.

    Args:
        overrides: fields of RunConfig beside the preset's.
        on_run: gets the `run.Run` as soon as it exists, for whoever shows it live.
        prompts: how many of the held-out prompts are answered; default all.

    Returns:
        ``run`` (id), ``seed``, ``steps``; ``training_seconds`` from the start of the run to its end, loading and
        scoring included, ``seconds`` of everything; ``habit``: for ``before`` and ``after`` the mean ``words`` of an
        answer (cut at 96 tokens), ``short_share`` (of 1 to 15 words) and ``right_share`` on held-out prompts;
        ``margin``, ``auc``, ``kl`` and the ``verdict`` on held-out rows; ``samples``: three of ``prompt``, ``base``,
        ``tuned``.

    Raises:
        RunError: training failed or was stopped; the message says why.
        Cancelled: ``cancel`` was set; the run is stopped and can be resumed.
    """
    from kto_core.chat import chat, evaluate
    from kto_core.config import resolving
    from kto_core.runs import folders

    started = time.monotonic()
    # the example has a file of held-out rows, which the demo judges the run with
    given = {"data": str(DATA), "seed": seed, "run_name": "demo", "test_size": 0.0, **(overrides or {})}
    run = folders.create(resolving.resolve("demo", given, origin="demo"))
    if on_run:
        on_run(run)
    training = _train(run, progress, cancel)

    def part(start: float, end: float) -> Progress:
        """Progress of one part of the whole, which never goes back."""
        reached = start

        def tell(share: float | None, text: str) -> None:
            nonlocal reached
            reached = max(reached, start + (end - start) * (share or 0.0))
            progress(reached, text)

        return tell

    measured = evaluate.evaluate(run, str(HELD_OUT), samples=0, progress=part(TRAINED, 0.8), cancel=cancel)
    held_out = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()][:prompts]
    asked, accepted = [h["prompt"] for h in held_out], [h.get("answers") for h in held_out]
    loaded = chat.Chat.load(run, cancel=cancel)
    try:
        answers = functools.partial(evaluate.answers, max_new_tokens=ANSWER_TOKENS, cancel=cancel)
        before = answers(loaded, asked, tuned=False, progress=part(0.8, 0.95))
        after = answers(loaded, asked, tuned=True, progress=part(0.95, 1.0))
    finally:
        loaded.unload()
    progress(1.0, "The demo is finished.")
    shown = list(zip(asked, before, after, strict=True))[:SAMPLES]
    return {
        "run": run.id,
        "seed": seed,
        "steps": run.state().step,
        "training_seconds": round(training, 1),
        "seconds": round(time.monotonic() - started, 1),
        "habit": {"before": habit(before, accepted), "after": habit(after, accepted)},
        "margin": measured["rewards/margins"],
        "auc": measured["auc"],
        "kl": measured["kl"],
        "verdict": measured["verdict"]["sentence"],
        "samples": [{"prompt": p[-1]["content"], "base": b, "tuned": t} for p, b, t in shown],
    }


def habit(answers: list[str], accepted: list[list[str] | None]) -> dict:
    """Mean words of the answers, the share that is short but says something, and the share that is right.

    Args:
        accepted: for each answer the words or phrases of which a right one has at least one; None: no such thing.
    """
    words = [len(a.split()) for a in answers]
    judged = [_has(a, found) for a, found in zip(answers, accepted, strict=True) if found]
    return {
        "words": round(sum(words) / len(words), 2),
        "short_share": round(sum(0 < w <= SHORT for w in words) / len(words), 3),
        "right_share": round(sum(judged) / len(judged), 3) if judged else None,
    }


def _has(answer: str, phrases: list[str]) -> bool:
    return any(re.search(rf"\b{re.escape(p)}\b", answer, re.IGNORECASE) for p in phrases)


def _train(run, progress: Progress, cancel: threading.Event | None) -> float:
    """Train to the end; the seconds it took. Progress goes to `TRAINED`."""
    from kto_core.engine.reference import PHASE
    from kto_core.training import start as starting

    started = time.monotonic()
    starting.start(run)
    while not (state := run.state()).terminal:
        if cancel is not None and cancel.is_set():
            _stop(run)
            check_cancel(cancel)
        if state.state != "preparing" and state.total_steps:
            share = PREPARED + (TRAINED - PREPARED) * state.step / state.total_steps
            progress(min(TRAINED, share), f"Training: step {state.step} of {state.total_steps}")
        else:
            scored = (state.prepared or 0.0) if state.message.startswith(PHASE) else 0.0  # the long part of it
            progress(0.02 + (PREPARED - 0.02) * scored, state.message)
        time.sleep(POLL)
    if state.state != "finished":
        raise RunError(f"The demo's training run {state.state}: {state.message}")
    return time.monotonic() - started


def _stop(run) -> None:
    """Ask it to stop and wait: the model is still in memory."""
    while run.alive():
        try:
            if not (run.path / "stop").exists():
                run.stop()
        except KTOError:  # it ended just now
            return
        time.sleep(POLL)
