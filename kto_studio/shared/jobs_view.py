"""Long jobs on the page: a line each with bar, time left and outcome, and one Cancel. Reads `kto_core.jobs` only."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from kto_core import jobs
from kto_core.jobs import duration

from .context import Context
from .marks import mark
from .prose import prose

SHOWN = 4  # newest jobs kept on the page
STATES = {"running": "running", "done": "done", "failed": "failed", "cancelled": "stopped"}


def mine(prefix: str) -> list[jobs.Job]:
    """The jobs whose name starts with ``prefix``, oldest first."""
    return [j for j in jobs.all_jobs() if j.name.startswith(prefix)]


def busy(prefix: str) -> jobs.Job | None:
    """The one that runs now."""
    return next((j for j in mine(prefix) if j.running), None)


def bar(fraction: float | None, label: str) -> str:
    """A progress bar; with no fraction it moves without saying how far."""
    if fraction is None:
        value = ""
        inner = '<div class="job-fill job-unknown"></div>'
    else:
        percent = min(100, max(0, 100 * fraction))
        value = f' aria-valuenow="{percent:.0f}"'
        inner = f'<div class="job-fill" style="width:{percent:.1f}%"></div>'
    name = html.escape(label, quote=True)
    role = f'role="progressbar" aria-label="{name}" aria-valuemin="0" aria-valuemax="100"{value}'
    return f'<div class="job-bar" {role}>{inner}</div>'


def view(shown: Sequence[jobs.Job], prefix: str = "") -> str:
    """The newest jobs as HTML, newest first. Pure but for the clock in `Job.eta`."""
    return "".join(_line(j, prefix) for j in list(shown)[-SHOWN:][::-1])


def _line(job: jobs.Job, prefix: str) -> str:
    name = html.escape(job.name.removeprefix(prefix).strip())
    right = STATES[job.state]
    if job.running and job.fraction is not None:
        right = f"{100 * job.fraction:.0f} %" + (f" · {duration(job.eta)} left" if job.eta is not None else "")
    elif job.ended:
        right += f" in {duration(job.ended - job.started)}"
    text = _made(job.result) if job.state == "done" else prose(job.error or job.text)
    middle = bar(job.fraction, name) if job.running else ""
    return (
        f'<div class="job job-{job.state}" data-job="{job.id}">'
        f'<div class="job-head"><b>{name}</b><span>{html.escape(right)}</span></div>{middle}'
        f'<div class="job-text">{text}</div></div>'
    )


def _made(result: object) -> str:
    """Where to find what a job made, if it says: an address, or a folder of the run."""
    if isinstance(result, str) and result.startswith(("https://", "http://")):
        address = html.escape(result, quote=True)
        return f'<a href="{address}" target="_blank" rel="noopener noreferrer">{address}</a>'
    if isinstance(result, Path) and result.is_dir():
        return f"In the run's folder: {html.escape('/'.join(result.parts[-2:]))}"
    return ""


def build(ctx: Context, prefix: str, keep_done: bool = True) -> None:
    """Show the jobs of ``prefix`` on the timer, with Cancel while one runs; those that are done stay on if kept."""
    with gr.Row(equal_height=False):
        area = gr.HTML("", visible=False, elem_classes="jobs", show_label=False)
        cancel = gr.Button(
            "Cancel", variant="stop", visible=False, scale=0, min_width=110, elem_id=f"cancel-{prefix.strip().lower()}"
        )
    seen = mark()

    def tick(before: str):
        text = view([j for j in mine(prefix) if keep_done or j.state != "done"], prefix)
        if text == before:
            return (gr.skip(),) * 3
        return gr.update(value=text, visible=bool(text)), gr.update(visible=busy(prefix) is not None), text

    def stop():
        if job := busy(prefix):
            job.cancel()

    ctx.on_tick(tick, [area, cancel, seen], [seen])
    ctx.on_load(lambda: tick("-"), [area, cancel, seen])
    cancel.click(ctx.guarded(stop), None, None, concurrency_limit=None, api_visibility="private")
