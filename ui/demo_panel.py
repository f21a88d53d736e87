"""``app.py --demo``: train the example at one press, and show the model before and after. Runs `kto_core.demo`.

The result lies in the run's folder, so a reload, a second window and a restarted app show it too.
"""

from __future__ import annotations

import html
import json
import os
from pathlib import Path

import gradio as gr

from kto_core import jobs
from kto_core.errors import BusyError, RunError
from ui import jobs_view, live
from ui.context import Context

JOB = "Demo "
RESULT = "demo.json"  # in the run's folder
RUN_DEMO, RUNNING = "Run the demo", "Running…"
_running: dict[str, str] = {}  # the id of the run of the job that is under way
QUICK = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}


def build(ctx: Context) -> None:
    with gr.Column(elem_classes="card", elem_id="demo"):
        with gr.Row(equal_height=True):
            gr.HTML(
                "<h3>See it work</h3><p>Trains the embedded small model to answer briefly, from the example's thumbs; "
                "a few minutes on two CPU cores. Then both models answer questions that neither was trained on.</p>",
                elem_classes="panel-head",
            )
            start = gr.Button(RUN_DEMO, variant="primary", scale=0, min_width=150, elem_id="demo-start")
        jobs_view.build(ctx, JOB, keep_done=False)  # what it made is shown below
        result = gr.HTML("", visible=False, elem_id="demo-result", show_label=False)
        with gr.Row(visible=False, elem_id="demo-next") as onward:
            watch = gr.Button("Its curves and log", scale=0, min_width=170, elem_id="demo-watch")
            chat = gr.Button("Chat with it", scale=0, min_width=130, elem_id="demo-chat", visible=False)
    seen = gr.State(None)
    outputs = [start, result, onward, chat, seen]

    def run():
        if jobs_view.busy(JOB):
            raise BusyError("The demo runs already.")
        if (other := live.active()) is not None:
            raise BusyError(f"Run {other.id} is training. Stop it or wait for its end, then run the demo.")
        jobs.start(JOB + "run", work)
        return refresh(None)

    def go(tab: str):
        run, _ = latest()
        if run is None:
            raise RunError("The demo has not been run yet.")
        return run.id, gr.Tabs(selected=tab)

    ctx.on_tick(refresh, outputs, [seen])
    ctx.on_load(lambda: refresh(None), outputs)
    start.click(None, None, [start], js=f"() => '{RUNNING}'", queue=False)  # answers before the server does
    start.click(ctx.guarded(run), None, outputs, trigger_mode="once", **QUICK).failure(
        lambda: refresh(None), None, outputs, **QUICK
    )
    for button, name in ((watch, "train"), (chat, "chat")):
        button.click(ctx.guarded(lambda name=name: go(name)), None, [ctx.chosen_run, ctx.tabs], **QUICK)


def work(progress, cancel) -> dict:
    """The job: train, measure, and keep the result beside the run."""
    from kto_core import demo, paths

    def began(run) -> None:
        _running[JOB] = run.id
        live.forget()

    _running.pop(JOB, None)
    found = demo.run_demo(progress=progress, cancel=cancel, on_run=began)
    file = paths.runs_dir() / found["run"] / RESULT
    part = file.with_name(RESULT + ".part")
    part.write_text(json.dumps(found, ensure_ascii=False, indent=1), encoding="utf-8")
    os.replace(part, file)
    return found


def latest() -> tuple[object | None, dict | None]:
    """The newest run of the demo and its result; (None, None) if there is none.

    While the demo runs it is the run of that; its result comes later.
    """
    if jobs_view.busy(JOB) is not None:
        return next((r for r in live.listed() if r.id == _running.get(JOB)), None), None
    for run in live.listed():
        if (found := _result(run.path)) is not None:
            return run, found
    return None, None


def _result(folder: Path) -> dict | None:
    try:
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        view(found)  # a file of another form shows nothing
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def refresh(before) -> list:
    """Values for start, result, the row onward, chat, and what was shown."""
    run, found = latest()
    busy = jobs_view.busy(JOB) is not None
    now = [busy, run.id if run else "", found is not None]
    if now == before:
        return [gr.skip()] * 5
    return [
        gr.update(interactive=not busy, value=RUNNING if busy else RUN_DEMO),
        gr.update(value=view(found) if found else "", visible=found is not None),
        gr.update(visible=run is not None),
        gr.update(visible=found is not None),
        now,
    ]


def view(result: dict) -> str:
    """Before and after: the habit and the margin as numbers, three answers side by side."""
    before, after = result["habit"]["before"], result["habit"]["after"]
    cells = "".join(
        f'<div class="tile wide" title="{html.escape(title)}"><span>{name}</span><b>{value}</b></div>'
        for name, value, title in (
            ("Words an answer", f"{before['words']:.0f} → {after['words']:.0f}", "Mean over the held-out questions"),
            (
                "Short answers",
                f"{100 * before['short_share']:.0f} % → {100 * after['short_share']:.0f} %",
                "Share of the answers that have few words",
            ),
            (
                "Right answers",
                f"{100 * before['right_share']:.0f} % → {100 * after['right_share']:.0f} %",
                "Of the held-out questions that have one right answer; a long answer has more chances to name it",
            ),
            (
                "Held-out reward margin",
                f"{result['margin']:+.3f}",
                "Desirable minus undesirable rows; 0 before training",
            ),
            (
                "Told apart (AUC)",
                f"{result['auc']:.2f}",
                "Held-out rows ranked by reward; 0.5 is chance, 1 is all right",
            ),
            ("Took", jobs_view.duration(result["seconds"]), "Training and measuring"),
        )
    )
    answers = "".join(
        f'<div><b>{html.escape(a["prompt"])}</b><div class="demo-pair">'
        f'<div><span>Before</span><pre tabindex="0">{html.escape(a["base"])}</pre></div>'
        f'<div class="after"><span>After</span><pre tabindex="0">{html.escape(a["tuned"])}</pre></div></div></div>'
        for a in result["samples"][:3]
    )
    return f'<div class="demo-numbers">{cells}</div><div class="demo-answers">{answers}</div>'
