"""The numbers of a verdict as lines for a terminal, a page and a model card: how far, how good, at what price."""

from __future__ import annotations

import difflib
import re
from typing import Any

NONE = "not known"


def lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of each number of a result of `evaluate`, the one that decides most first."""
    moved, answers, text = (_known(result.get(name)) for name in ("moved", "answers", "forgotten"))
    far = "{nats:.3g} nats per answer, {nats_per_token:.2g} per token".format(**moved) if moved else NONE
    found = [
        ("Moved", far),
        ("Reward margin", _with_interval(result, "rewards/margins", "margin_interval")),
        ("Good answers", _good(result)),
    ]
    if answers:
        found.append(("Greedy answers", f"{answers['changed']} of {answers['asked']} changed"))
    accuracy, auc = (result.get(name) for name in ("accuracy", "auc"))
    found.append(("Accuracy", f"{accuracy:.0%} of rewards on the right side of 0" if accuracy is not None else NONE))
    found.append(("AUC", f"{auc:.3f}" if auc is not None else NONE))
    if answers:
        before, after, most = (answers[k] for k in ("tokens_before", "tokens_after", "at_most"))
        found.append(("Answer length", f"{before:.0f} tokens before, {after:.0f} after (of at most {most})"))
    found += _lengths(result)
    same = "perplexity {perplexity_before:.4g} before, {perplexity_after:.4g} after".format(**text) if text else NONE
    return [*found, ("Neutral text", same), ("Rows", _rows(result))]


def _lengths(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Answer lengths by the label of the row that the prompt is of, beside the length of such rows' own answers."""
    own, found = result.get("lengths") or {}, []
    for side, numbers in (result.get("answer_lengths") or {}).items():
        text = "{before:.0f} tokens before, {after:.0f} after".format(**numbers)
        if own.get(side) is not None:
            text += f"; the {side} answers in the data have {own[side]:.0f}"
        found.append((f"To {side} rows", text))
    return found


def changed(before: str, after: str) -> list[tuple[str, str]]:
    """Two answers as one text in pieces: ("same" | "gone" | "new", piece), word by word."""
    old, new = (re.findall(r"\S+\s*|\s+", text) for text in (before, after))
    pieces: list[tuple[str, str]] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append(("same", "".join(old[a:b])))
            continue
        pieces += [(what, text) for what, text in (("gone", "".join(old[a:b])), ("new", "".join(new[c:d]))) if text]
    return pieces


def _known(numbers: dict[str, Any] | None) -> dict[str, Any] | None:
    """Numbers that belong together, or None where one of them is not known."""
    return numbers if numbers and None not in numbers.values() else None


def _with_interval(result: dict[str, Any], name: str, interval: str) -> str:
    value, bounds = result.get(name), result.get(interval)
    if value is None:
        return NONE
    if not bounds or None in bounds:
        return f"{value:+.3g}; too few questions for an interval"
    return f"{value:+.3g}, 95 % interval {bounds[0]:+.3g} to {bounds[1]:+.3g}"


def _good(result: dict[str, Any]) -> str:
    value, bounds = result.get("rewards/chosen"), result.get("chosen_interval")
    word = "about as likely as before"
    if bounds and None not in bounds and value is not None and not bounds[0] <= 0 <= bounds[1]:
        word = "likelier than before" if value > 0 else "less likely than before"
    return f"{word}: reward {_with_interval(result, 'rewards/chosen', 'chosen_interval')}"


def _rows(result: dict[str, Any]) -> str:
    counts = [result.get(k) or 0 for k in ("rows", "desirable", "undesirable", "questions")]
    text = "{:,.0f} ({:,.0f} good, {:,.0f} bad) that ask {:,.0f} questions".format(*counts)
    if trained_on := result.get("trained_on"):
        text += f"; {trained_on:,.0f} not used because the run was trained on their question"
    if unused := result.get("unused"):
        text += f"; {unused:,.0f} more not used, to save time"
    if too_long := result.get("too_long"):
        text += f"; {too_long:,.0f} too long"
    return text
