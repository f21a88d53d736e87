"""RunState -> what the page shows: HTML, curves, lists. Pure; every text from outside is escaped."""

from __future__ import annotations

import html
import time

from kto_core.jobs import duration
from kto_core.plain_text import one_line
from kto_core.runs import log
from kto_core.runs.events import TERMINAL, WAITING, RunState
from kto_core.runs.run_list import Brief

from .curves import number
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
    "grad_norm": ("Gradient norm", {"grad_norm": "gradient norm"}),
    "gpu_memory": ("GPU memory", {"gpu_memory": "reserved"}),
}
UNITS = {"gpu_memory": "GiB"}
COLORS = {  # of style.css, which has them for both themes
    "training": "var(--good)",
    "validation": "var(--violet)",
    "good": "var(--good)",
    "bad": "var(--bad)",
    "learning rate": "var(--blue)",
    "gradient norm": "var(--blue)",
    "reserved": "var(--blue)",
}
LABELS = {
    "queued": "Queued",
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


def chip(state: RunState) -> str:
    """A run's state in a word."""
    kind = "queued" if queued(state) else state.state
    return f'<span class="chip chip-{html.escape(kind)}">{html.escape(LABELS.get(kind, kind))}</span>'


def queued(state: RunState) -> bool:
    """Whether it waits for its turn."""
    return state.state == "preparing" and state.message.startswith(WAITING)


def theme_toggle() -> str:
    """The sun and moon at the top right; ``assets/page.js`` says what a press does."""
    rays = "M12 3v2m0 14v2M3 12h2m14 0h2M5.6 5.6 7 7m10 10 1.4 1.4m0-12.8L17 7M7 17l-1.4 1.4"
    sun = f'<circle cx="12" cy="12" r="4"/><path d="{rays}"/>'
    moon = '<path d="M20 14.5A8 8 0 0 1 9.5 4a8 8 0 1 0 10.5 10.5z"/>'
    icons = "".join(
        f'<svg class="{name}" viewBox="0 0 24 24" width="18" height="18" fill="none" stroke="currentColor" '
        f'stroke-width="2" stroke-linecap="round" stroke-linejoin="round" aria-hidden="true">{drawn}</svg>'
        for name, drawn in (("sun", sun), ("moon", moon))
    )
    return f'<button type="button" class="theme-toggle" aria-label="Dark theme">{icons}</button>'


def header_status(state: RunState | None, device: str | None) -> str:
    """Top right: what runs now, and on which device. The window's title has its percent too."""
    parts, title = [], "KTO Studio"
    if state is not None:
        done = fraction(state)
        share = f" {int(100 * done)} %" if state.total_steps and state.step and done is not None else ""
        title = f"{share.strip() or LABELS[state.state]} · {title}"
        parts.append(f'<span class="chip chip-{state.state}">{LABELS[state.state]}{share}</span>')
    parts.append(f'<span class="device">{html.escape(device or "")}</span>')
    return f'<div class="header-status" data-title="{title}" aria-live="polite">{"".join(parts)}</div>'


def fraction(state: RunState) -> float | None:
    """Share of the steps done, or of the preparation; None while nobody knows."""
    if state.state == "finished":
        return 1.0
    if state.state == "preparing":
        return state.prepared
    if not state.total_steps:
        return None if not state.terminal else 0.0
    return min(1.0, state.step / state.total_steps)


def about(brief: Brief | None) -> str:
    """What a run trains on what, and the settings that no preset decided."""
    if brief is None or brief.problem:
        return ""
    parts = [html.escape(text) for text in (brief.data, brief.model) if text]
    parts += [", ".join(f"{html.escape(k)} <b>{html.escape(v)}</b>" for k, v in brief.changed)] if brief.changed else []
    return " · ".join(parts)


def head(run_id: str, state: RunState, problem: str = "", name: str = "", about: str = "") -> str:
    """Name, state, progress, time left and the last message of a run, or why it cannot be read. ``about``: HTML."""
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
    shown = "" if queued(state) or (state.terminal and not done) else bar(done, "Training progress")
    card = f'<div class="changed run-about">{about}</div>' if about else ""
    named = f'<b class="run-name">{html.escape(name)}</b>' if name else ""
    return (
        f'<div class="run-head" data-state="{state.state}" data-step="{state.step}">'
        f'<div class="run-line">{chip(state)}{named}<span class="run-id">{html.escape(run_id)}</span>'
        f'<span class="run-facts">{" · ".join(facts)}</span></div>{card}{shown}'
        f"<div{tone}>{prose(text)}</div></div>"
    )


def signed(value: float) -> str:
    """``+0.1234``; what rounds to nothing has no sign."""
    text = f"{value:+.4f}"
    return text if float(text) else "0"


def tiles(state: RunState) -> str:
    """The newest numbers, each with its name."""
    names = [
        ("Loss", "loss", "{:.4f}".format, "Starts at 0.5; lower is better"),
        ("Reward margin", "rewards/margins", signed, "Reward of good minus bad rows; higher is better"),
        ("Val. loss", "eval_loss", "{:.4f}".format, "Validation loss: of the rows that are not trained on"),
        (
            "Val. margin",
            "eval_rewards/margins",
            signed,
            "Validation reward margin: of the rows that are not trained on",
        ),
        ("KL", "kl", number, "Distance from the model before training, never below 0; should stay small"),
        ("Learning rate", "learning_rate", number, "Current value"),
        ("Tokens/s", "tokens_per_second", "{:,.0f}".format, "Over the last steps"),
        ("GPU memory", "gpu_memory", "{:.1f} GiB".format, "GPU memory reserved by this run"),
    ]
    found = [(n, state.latest(m), said, t) for n, m, said, t in names]
    cells = "".join(
        f'<div class="tile" title="{html.escape(t)}"><span>{n}</span><b>{said(v)}</b></div>'
        for n, v, said, t in found
        if v is not None
    )
    return f'<div class="tiles">{cells}</div>' if cells else ""


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


def run_label(title: str, run: RunState | Brief | None) -> str:
    """A line of the run picker. Of a run that goes on without its steps: a list that changes is sent as a whole."""
    if run is None:  # not read yet
        return one_line(title)
    if run.problem:
        return one_line(f"{title} · cannot be read: {run.problem}", 200)
    steps = f", step {run.step:,}" if run.step and run.state in TERMINAL and run.state != "finished" else ""
    return f"{one_line(title)} · {LABELS.get(run.state, run.state).lower()}{steps}"


def no_runs() -> str:
    return (
        '<div class="empty"><h2>No run yet</h2><p>Choose a preset and press <b>Start training</b>. Loss, rewards and '
        "the log appear here live, and are still here after a reload.</p></div>"
    )
