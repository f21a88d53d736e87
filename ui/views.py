"""RunState -> what the page shows: HTML, curves, lists. Pure; every text from outside is escaped."""

from __future__ import annotations

import html
import time

from kto_core import run_log
from kto_core.events import RunState, thin
from ui.jobs_view import bar, duration

LOG_LINES = 300
POINTS = 400  # of one curve: more costs the browser's main thread seconds
CURVES = {  # plot -> (title, metric -> its name in the legend)
    "loss": ("Loss", {"loss": "training", "eval_loss": "held out"}),
    "rewards": ("Rewards", {"rewards/chosen": "desirable", "rewards/rejected": "undesirable"}),
    "margin": ("Reward margin", {"rewards/margins": "training", "eval_rewards/margins": "held out"}),
    "kl": ("KL", {"kl": "training", "eval_kl": "held out"}),
    "learning_rate": ("Learning rate", {"learning_rate": "learning rate"}),
    "gpu_memory": ("GPU memory", {"gpu_memory": "GiB"}),
}
COLORS = {
    "training": "#0d9488",
    "held out": "#c2710c",
    "desirable": "#0d9488",
    "undesirable": "#d9534f",
    "learning rate": "#5b7bd5",
    "GiB": "#8b6fc0",
}
LABELS = {
    "preparing": "Preparing",
    "training": "Training",
    "stopping": "Stopping",
    "finished": "Finished",
    "stopped": "Stopped",
    "failed": "Failed",
    "interrupted": "Interrupted",
}


def brand() -> str:
    return (
        '<div class="brand"><svg viewBox="0 0 32 32" width="30" height="30" aria-hidden="true">'
        '<rect width="32" height="32" rx="8" fill="#0f766e"/>'
        '<path d="M8 21l5-6 4 3.5L24 10" fill="none" stroke="#fff" stroke-width="2.6" '
        'stroke-linecap="round" stroke-linejoin="round"/></svg>'
        "<div><h1>KTO Studio</h1><p>Thumbs up and thumbs down, turned into a better model</p></div></div>"
    )


def note(text: str, tone: str = "") -> str:
    """A line set apart; ``tone`` is "", "good" or "bad"."""
    role = ' role="alert"' if tone == "bad" else ""
    return f'<div class="note{f" note-{tone}" if tone else ""}"{role}>{html.escape(text)}</div>'


def size(n: float) -> str:
    """``1.2 MB`` of bytes."""
    for unit in ("bytes", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"


def chip(state: str) -> str:
    return f'<span class="chip chip-{html.escape(state)}">{html.escape(LABELS.get(state, state))}</span>'


def header_status(state: RunState | None, device: str | None) -> str:
    """Top right: what runs now, and on which device."""
    parts = []
    if state is not None:
        share = f" {100 * state.step // state.total_steps} %" if state.total_steps and state.step else ""
        parts.append(f'<span class="chip chip-{state.state}">{LABELS[state.state]}{share}</span>')
    parts.append(f'<span class="device">{html.escape(device or "")}</span>')
    return f'<div class="header-status" aria-live="polite">{"".join(parts)}</div>'


def fraction(state: RunState) -> float | None:
    """Share of the steps done, or of the preparation; None while nobody knows."""
    if state.state == "finished":
        return 1.0
    if state.state == "preparing":
        return state.prepared
    if not state.total_steps:
        return None if not state.terminal else 0.0
    return min(1.0, state.step / state.total_steps)


def head(run_id: str, state: RunState) -> str:
    """State, progress, time left and the last message of a run."""
    done = fraction(state)
    facts = []
    if state.total_steps:
        facts.append(f"Step <b>{state.step:,}</b> of {state.total_steps:,}")
    if state.started and state.updated and state.updated - state.started >= 1:
        facts.append(f"{duration(state.updated - state.started)} so far" if not state.terminal else "took "
                     + duration(state.updated - state.started))  # fmt: skip
    if state.eta is not None and state.state == "training":
        facts.append(f"<b>{duration(state.eta)}</b> left")
    text = state.error if state.state == "failed" and state.error else state.message
    tone = ' class="run-message bad" role="alert"' if state.state == "failed" else ' class="run-message"'
    shown = "" if state.terminal and not done else bar(done, "Training progress")
    return (
        f'<div class="run-head" data-state="{state.state}" data-step="{state.step}">'
        f'<div class="run-line">{chip(state.state)}<span class="run-id">{html.escape(run_id)}</span>'
        f'<span class="run-facts">{" · ".join(facts)}</span></div>{shown}'
        f"<div{tone}>{html.escape(text)}</div></div>"
    )


def tiles(state: RunState) -> str:
    """The newest numbers, each with its name."""
    names = [
        ("Loss", "loss", "{:.4f}", "0.5 is where it begins; lower is better"),
        ("Reward margin", "rewards/margins", "{:+.4f}", "Desirable minus undesirable; higher is better"),
        ("KL", "kl", "{:.3g}", "Distance to the model before training; it should stay small"),
        ("Learning rate", "learning_rate", "{:.2e}", "Now"),
        ("Tokens a second", "tokens_per_second", "{:,.0f}", "In the last steps"),
        ("GPU memory", "gpu_memory", "{:.1f} GiB", "Reserved by this run"),
    ]
    found = [(n, state.latest(m), f, t) for n, m, f, t in names]
    cells = "".join(
        f'<div class="tile" title="{html.escape(t)}"><span>{n}</span><b>{f.format(v)}</b></div>'
        for n, v, f, t in found
        if v is not None
    )
    return f'<div class="tiles">{cells}</div>' if cells else ""


def curve(state: RunState, name: str) -> list[dict]:
    """Points ``{"step", "value", "series"}`` of one plot, at most `POINTS` a series."""
    return [
        {"step": step, "value": value, "series": series}
        for metric, series in CURVES[name][1].items()
        for step, value in thin(state.series(metric), POINTS)
    ]


def legend() -> str:
    """The colors of the curves that share a plot."""
    names = {"training, desirable rows": "training", "held-out rows": "held out", "undesirable rows": "undesirable"}
    marks = "".join(f'<span><i style="background:{COLORS[c]}"></i>{n}</span>' for n, c in names.items())
    hint = '<span class="hint">drag over a plot to zoom in, double-click to zoom out</span>'
    return f'<div class="legend">{marks}{hint}</div>'


def logs(state: RunState) -> str:
    """The last lines, newest at the bottom and in view (the styles reverse the column)."""
    last, before = run_log.lines(state, LOG_LINES)
    lines = []
    for t, level, text in last:
        clock = time.strftime("%H:%M:%S", time.localtime(t))
        level = {"warning": "warn", "error": "bad"}.get(level, "")
        lines.append(f'<span class="log-time">{clock}</span> <span class="{level}">{html.escape(text)}</span>')
    if not lines:
        return '<div class="logs" tabindex="0" role="log"><pre>Nothing was logged yet.</pre></div>'
    first = f"… {before:,} earlier lines are in the download\n" if before else ""
    body = first + "\n".join(lines)
    return f'<div class="logs" tabindex="0" role="log" aria-label="Log"><pre>{body}</pre></div>'


def run_label(run_id: str, state: RunState, name: str = "") -> str:
    """A line of the run picker."""
    steps = f", step {state.step:,}" if state.step and state.state != "finished" else ""
    return f"{name or run_id} · {LABELS.get(state.state, state.state).lower()}{steps}"


def no_runs() -> str:
    return (
        '<div class="empty"><h3>No run yet</h3><p>Choose a preset and press <b>Start training</b>. '
        "Loss, rewards and the log appear here, live; they are still there after a reload.</p></div>"
    )
