"""RUN/verdict.json: what `evaluate` found of a run, kept beside its adapter and read within bounds.

It belongs to the adapter that was measured. After more training the run has another one, and its verdict is no more
than history.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from kto_core.files import MANIFEST, write_whole
from kto_core.guards import bounded
from kto_core.plain_text import one_line

from . import judging

FILE = "verdict.json"
MOST, TEXT = 12, 500  # reasons and remarks that are read, and characters of one
NUMBERS = ("rewards/margins", "rewards/chosen", "rewards/rejected", "accuracy", "auc", "kl", "loss", "rows",
           "desirable", "undesirable", "questions", "too_long", "unused", "trained_on")  # fmt: skip
NESTED = {
    "moved": ("nats", "nats_per_token"),
    "answers": ("asked", "changed", "tokens_before", "tokens_after", "at_most"),
    "lengths": ("good", "bad"),
    "forgotten": ("perplexity_before", "perplexity_after", "tokens"),
}
SIDES = ("good", "bad")
MOST_SAMPLES, SAMPLE = 16, 1500  # that are read, and characters of one text
INTERVALS = ("margin_interval", "chosen_interval")


def fingerprint(adapter: Path) -> str:
    """Of the adapter's manifest, which has the size and CRC-32 of each of its files; "" without one."""
    try:
        return hashlib.sha256(bounded.read_text(adapter / MANIFEST).encode()).hexdigest()[:32]
    except (OSError, bounded.Unreadable):
        return ""


def write(run_dir: Path, result: dict[str, Any], mark: str) -> None:
    """Keep a result of `evaluate`. ``mark``: `fingerprint` of the adapter that it measured. Raises OSError."""
    write_whole(run_dir / FILE, json.dumps(result | {"adapter": mark}, ensure_ascii=False, indent=1), sync=True)


def read(run) -> dict[str, Any] | None:
    """The verdict on a `run.Run`'s newest adapter as `evaluate` gave it, without samples; None: not judged yet.

    What is of another form than `write` gives it is None.
    """
    found = bounded.read_dict(run.path / FILE)
    saved = _newest(run) if found else None
    if saved is None or found.get("adapter") != fingerprint(saved):
        return None
    verdict = found.get("verdict")
    if not isinstance(verdict, dict) or verdict.get("word") not in judging.WORDS:
        return None
    reasons = _texts(verdict.get("reasons"))
    result: dict[str, Any] = {name: _number(found.get(name)) for name in NUMBERS}
    result |= {name: _numbers(found.get(name), fields) for name, fields in NESTED.items()}
    result |= {name: _interval(found.get(name)) for name in INTERVALS}
    result["answer_lengths"] = _by_label(found.get("answer_lengths"))
    result["data"] = one_line(str(found.get("data", "")), TEXT)
    result["remarks"] = _texts(found.get("remarks"))
    sentence = judging.said(verdict["word"], reasons)
    result["verdict"] = {"word": verdict["word"], "reasons": reasons, "sentence": sentence}
    return result


def samples(run) -> list[dict[str, Any]]:
    """What both models answered, kept with a verdict that `read` gives: ``prompt``, ``base``, ``tuned`` as text, cut;
    ``label`` of the prompt's row, a bool or None."""
    return _samples(bounded.read_dict(run.path / FILE).get("samples"))


def key(run) -> tuple:
    """Changes when `read` may give something else."""
    stamp = bounded.stamp(run.path / FILE)
    saved = _newest(run) if stamp else None  # most runs have none, and pages ask every second
    return stamp, bounded.stamp(saved / MANIFEST) if saved else None


def _newest(run) -> Path | None:
    """The adapter that `evaluate` measures: the finished one, else the newest checkpoint's."""
    saved: Path | None = run.adapter or next(iter(run.checkpoints()[-1:]), None)
    return saved


def _by_label(value: object) -> dict[str, dict[str, float | int]]:
    """What is known of answers to prompts of good and bad rows."""
    sides = value if isinstance(value, dict) else {}
    found = {side: _numbers(sides.get(side), ("asked", "before", "after")) for side in SIDES}
    return {side: numbers for side, numbers in found.items() if numbers}


def _samples(value: object) -> list[dict[str, Any]]:
    """Prompts with both answers; lines and blanks stay, whoever shows them escapes them."""
    found = []
    for sample in value[:MOST_SAMPLES] if isinstance(value, list) else []:
        texts = [sample.get(name) for name in ("prompt", "base", "tuned")] if isinstance(sample, dict) else [None]
        if all(isinstance(text, str) for text in texts):
            prompt, base, tuned = (str(text)[:SAMPLE] for text in texts)
            label = sample.get("label")
            found.append({"prompt": prompt, "label": label if isinstance(label, bool) else None, "base": base,
                          "tuned": tuned})  # fmt: skip
    return found


def _texts(value: object) -> list[str]:
    return [one_line(v, TEXT) for v in value[:MOST] if isinstance(v, str)] if isinstance(value, list) else []


def _number(value: object) -> float | int | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return value if usable and math.isfinite(value) else None  # type: ignore[arg-type, return-value]


def _numbers(value: object, names: tuple[str, ...]) -> dict[str, float | int] | None:
    """All of them, or None."""
    if not isinstance(value, dict):
        return None
    found = {name: _number(value.get(name)) for name in names}
    return {k: v for k, v in found.items() if v is not None} if None not in found.values() else None


def _interval(value: object) -> list[float] | None:
    numbers = [_number(v) for v in value[:2]] if isinstance(value, list) and len(value) == 2 else [None]
    return [float(v) for v in numbers if v is not None] if None not in numbers else None
