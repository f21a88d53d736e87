"""A run's log as a person reads it: phases, remarks, numbers of the steps and checkpoints, by time."""

from __future__ import annotations

from .events import RunState

SHOWN = (  # TRL's names
    ("loss", "loss {:.4f}"),
    ("rewards/margins", "margin {:+.4f}"),
    ("kl", "kl {:.3f}"),
    ("eval_loss", "eval loss {:.4f}"),
    ("eval_rewards/margins", "eval margin {:+.4f}"),
)


def values(metric: dict) -> str:
    """``loss 0.4812  margin +0.2010  kl 0.013`` of a metric event; what it does not have is left out."""
    found = [form.format(metric[name]) for name, form in SHOWN if isinstance(metric.get(name), int | float)]
    return "  ".join(found)


def step_line(metric: dict, total: int) -> str:
    """One metric event as a line: step and values."""
    return f"step {metric.get('step', 0)}/{total or '?'}  {values(metric)}".rstrip()


def lines(state: RunState, limit: int) -> tuple[list[tuple[float, str, str]], int]:
    """The last ``limit`` of everything worth a line, oldest first, and how many lines came before them.

    A line is (unix time, level, text); level: info, warning or error.
    """
    found = [(e["t"] or 0.0, e["level"], e["text"]) for e in state.logs[-limit:]]
    found += [(p["t"] or 0.0, "info", p["text"]) for p in state.phases[-limit:]]
    found += [(m.get("t") or 0.0, "info", step_line(m, state.total_steps)) for m in state.metrics[-limit:]]
    found += [(c["t"] or 0.0, "info", f"checkpoint of step {c['step']} saved") for c in state.checkpoints[-limit:]]
    found.sort(key=lambda line: line[0])  # stable: those of one time stay in order
    every = len(state.logs) + len(state.phases) + len(state.metrics) + len(state.checkpoints)
    return found[-limit:], every - min(limit, len(found))
