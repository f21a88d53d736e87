"""A run's log as a person reads it: phases, remarks, numbers of the steps and checkpoints, by time."""

from __future__ import annotations

from typing import Any

from .events import RunState

SHOWN = (  # TRL's names
    ("loss", "loss {:.4f}"),
    ("rewards/margins", "margin {:+.4f}"),
    ("kl", "kl {:.3f}"),
    ("eval_loss", "eval loss {:.4f}"),
    ("eval_rewards/margins", "eval margin {:+.4f}"),
)


def values(metric: dict[str, Any]) -> str:
    """``loss 0.4812  margin +0.2010  kl 0.013`` of a metric event; what it does not have is left out."""
    found = [form.format(metric[name]) for name, form in SHOWN if isinstance(metric.get(name), int | float)]
    return "  ".join(found)


def step_line(metric: dict[str, Any], total: int) -> str:
    """One metric event as a line: step and values."""
    return f"step {metric.get('step', 0)}/{total or '?'}  {values(metric)}".rstrip()


def lines(state: RunState, limit: int) -> tuple[list[tuple[float, str, str]], int]:
    """The last ``limit`` of everything worth a line, in the order of the file, and how many lines came before them.

    A line is (unix time, level, text); level: info, warning or error.
    """
    last = state.told[-limit:]
    found = [(item["t"] or 0.0, item.get("level") or "info", _text(kind, item, state)) for kind, item in last]
    return found, state.told.total - len(found)


def _text(kind: str, item: dict[str, Any], state: RunState) -> str:
    if kind == "metric":
        return step_line(item, state.total_steps)
    return f"saved checkpoint at step {item['step']}" if kind == "checkpoint" else item["text"]
