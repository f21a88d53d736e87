"""RunState -> what the page shows: HTML, curves, lists. Pure; every text from outside is escaped."""

from __future__ import annotations

import html
import time

from kto_core.jobs import duration
from kto_core.plain_text import one_line
from kto_core.runs import log
from kto_core.runs.events import TERMINAL, RunState, spaced
from kto_core.runs.run_list import Brief

from .jobs_view import bar
from .prose import prose

LOG_LINES = 300
POINTS = 400  # of one curve: more costs the browser's main thread seconds
CURVES = {  # plot -> (title, metric -> its name in the legend)
    "loss": ("Loss", {"loss": "training", "eval_loss": "validation"}),
    "rewards": ("Rewards", {"rewards/chosen": "good", "rewards/rejected": "bad"}),
    "margin": ("Reward margin", {"rewards/margins": "training", "eval_rewards/margins": "validation"}),
    "kl": ("KL", {"kl": "training", "eval_kl": "validation"}),
    "learning_rate": ("Learning rate", {"learning_rate": "learning rate"}),
    "gpu_memory": ("GPU memory", {"gpu_memory": "GiB"}),
}
COLORS = {
    "training": "#0d9488",
    "validation": "#c2710c",
    "good": "#0d9488",
    "bad": "#d9534f",
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
        '<div class="brand"><svg viewBox="0 0 32 32" width="30" height="30" aria-hidden="true"><rect width="32" '
        'height="32" rx="8" fill="#0f766e"/><path d="M8 21l5-6 4 3.5L24 10" fill="none" stroke="#fff" '
        'stroke-width="2.6" stroke-linecap="round" stroke-linejoin="round"/></svg><div><h1>KTO Studio</h1><p>Turn '
        "thumbs-up and thumbs-down data into a better model</p></div></div>"
    )


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


def head(run_id: str, state: RunState, problem: str = "") -> str:
    """State, progress, time left and the last message of a run, or why it cannot be read."""
    done = fraction(state)
    facts = []
    if state.total_steps:
        facts.append(f"Step <b>{state.step:,}</b> of {state.total_steps:,}")
    if state.seconds >= 1:
        facts.append(f"took {duration(state.seconds)}" if state.terminal else f"{duration(state.seconds)} elapsed")
    if state.eta is not None and state.state == "training":
        facts.append(f"<b>{duration(state.eta)}</b> left")
    text = state.error if state.state == "failed" and state.error else state.message
    text = f"This run cannot be read: {problem}." if problem and problem != state.problem else text
    bad = state.state == "failed" or problem
    tone = ' class="run-message bad" role="alert"' if bad else ' class="run-message"'
    shown = "" if state.terminal and not done else bar(done, "Training progress")
    return (
        f'<div class="run-head" data-state="{state.state}" data-step="{state.step}">'
        f'<div class="run-line">{chip(state.state)}<span class="run-id">{html.escape(run_id)}</span>'
        f'<span class="run-facts">{" · ".join(facts)}</span></div>{shown}'
        f"<div{tone}>{prose(text)}</div></div>"
    )


def tiles(state: RunState) -> str:
    """The newest numbers, each with its name."""
    names = [
        ("Loss", "loss", "{:.4f}", "Starts at 0.5; lower is better"),
        ("Reward margin", "rewards/margins", "{:+.4f}", "Reward of good minus bad rows; higher is better"),
        ("KL", "kl", "{:.3g}", "Distance from the model before training; should stay small"),
        ("Learning rate", "learning_rate", "{:.2e}", "Current value"),
        ("Tokens/s", "tokens_per_second", "{:,.0f}", "Over the last steps"),
        ("GPU memory", "gpu_memory", "{:.1f} GiB", "GPU memory reserved by this run"),
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
        for step, value in spaced(state.series(metric), POINTS)
    ]


def legend() -> str:
    """The colors of the curves that share a plot."""
    names = {"training, good rows": "training", "validation rows": "validation", "bad rows": "bad"}
    marks = "".join(f'<span><i style="background:{COLORS[c]}"></i>{n}</span>' for n, c in names.items())
    hint = '<span class="hint">Drag over a plot to zoom in, double-click to reset</span>'
    return f'<div class="legend">{marks}{hint}</div>'


def logs(state: RunState) -> str:
    """The last lines, newest at the bottom and in view (the styles reverse the column)."""
    last, before = log.lines(state, LOG_LINES)
    lines = []
    for t, level, text in last:
        clock = time.strftime("%H:%M:%S", time.localtime(t))
        level = {"warning": "warn", "error": "bad"}.get(level, "")
        lines.append(f'<span class="log-time">{clock}</span> <span class="{level}">{html.escape(text)}</span>')
    if not lines and not state.skipped:
        return '<div class="logs" tabindex="0" role="log"><pre>No log messages yet.</pre></div>'
    first = f"… {before:,} earlier lines are in the downloaded log\n" if before else ""
    first += f'<span class="warn">{skipped(state)}</span>\n' if state.skipped else ""
    body = first + "\n".join(lines)
    return f'<div class="logs" tabindex="0" role="log" aria-label="Log"><pre>{body}</pre></div>'


def skipped(state: RunState) -> str:
    """What of the events is not shown."""
    lines = "1 line" if state.skipped == 1 else f"{state.skipped:,} lines"
    return f"{lines} of the events cannot be read and are not shown"


def run_label(run_id: str, run: RunState | Brief | None) -> str:
    """A line of the run picker. Of a run that goes on without its steps: a list that changes is sent as a whole."""
    if run is None:  # not read yet
        return one_line(run_id)
    if run.problem:
        return one_line(f"{run_id} · cannot be read: {run.problem}", 200)
    steps = f", step {run.step:,}" if run.step and run.state in TERMINAL and run.state != "finished" else ""
    return f"{one_line(run_id)} · {LABELS.get(run.state, run.state).lower()}{steps}"


def no_runs() -> str:
    return (
        '<div class="empty"><h3>No run yet</h3><p>Choose a preset and press <b>Start training</b>. Loss, rewards and '
        "the log appear here live, and are still here after a reload.</p></div>"
    )
