"""``app.py --demo``: train the example at one press, and show the model before and after. Runs `kto_core.demo`.

The result lies in the run's folder, so a reload, a second window and a restarted app show it too.
"""

from __future__ import annotations

import html
import json
from pathlib import Path

import gradio as gr

from kto_core import jobs
from kto_core.errors import BusyError, RunError
from kto_core.guards import bounded
from kto_core.runs import folders
from kto_core.runs.run import Run
from kto_studio.shared import jobs_view, live
from kto_studio.shared.context import QUICK, Context, Event
from kto_studio.shared.marks import mark

JOB = "Demo "
RESULT = "demo.json"  # in the run's folder
RUN_DEMO, RUNNING = "Run the demo", "Running…"
NEWEST = 30  # runs whose file is looked at each time; of the others the list knows when something came into them
_results: dict[str, tuple[object, dict | None]] = {}  # run folder -> (when that changed, the result in it)
_running: dict[str, str] = {}  # the id of the run of the job that is under way


def build(ctx: Context) -> None:
    with gr.Column(elem_classes="card", elem_id="demo"):
        with gr.Row(equal_height=True):
            gr.HTML(
                "<h2>See it work</h2><p>Trains the built-in demo model on the example ratings to give short answers. "
                "This takes a few minutes on two CPU cores. Then the model before and after training answers "
                "questions it was not trained on.</p>",
                elem_classes="panel-head",
            )
            start = gr.Button(RUN_DEMO, variant="primary", scale=0, min_width=150, elem_id="demo-start")
        jobs_view.build(ctx, JOB, keep_done=False)  # what it made is shown below
        result = gr.HTML("", visible=False, elem_id="demo-result", show_label=False)
        with gr.Row(visible=False, elem_id="demo-next") as onward:
            watch = gr.Button("Open in Train", scale=0, min_width=170, elem_id="demo-watch")
            chat = gr.Button("Chat with it", scale=0, min_width=130, elem_id="demo-chat", visible=False)
    seen = mark()
    outputs = [start, result, onward, chat, seen]

    def run():
        if jobs_view.busy(JOB):
            raise BusyError("The demo is already running.")
        if (other := folders.active(settle=True)) is not None:
            raise BusyError(f"Run {other.id} is training. Stop it or wait until it finishes, then run the demo.")
        jobs.start(JOB + "Training the demo", work)
        return refresh(None)

    def go(tab: str):
        run, _ = latest()
        if run is None:
            raise RunError("The demo has not run yet.")
        return run.id, gr.Tabs(selected=tab)

    ctx.on_tick(refresh, outputs, [seen])
    ctx.on_load(lambda: refresh(None), outputs)
    start.click(None, None, [start], js=f"() => '{RUNNING}'", queue=False)  # answers before the server does
    once: Event = {**QUICK, "trigger_mode": "once"}
    start.click(ctx.guarded(run), None, outputs, **once).failure(lambda: refresh(None), None, outputs, **QUICK)
    for button, name in ((watch, "train"), (chat, "chat")):
        button.click(ctx.guarded(lambda name=name: go(name)), None, [ctx.chosen_run, ctx.tabs], **QUICK)


def work(progress, cancel) -> dict:
    """The job: train, measure, and keep the result beside the run."""
    from kto_core import demo, files, paths

    def began(run) -> None:
        _running[JOB] = run.id
        live.forget()

    _running.pop(JOB, None)
    found = demo.run_demo(progress=progress, cancel=cancel, on_run=began)
    file = paths.runs_dir() / found["run"] / RESULT
    files.write_whole(file, json.dumps(found, ensure_ascii=False, indent=1))
    return found


def latest() -> tuple[Run | None, dict | None]:
    """The newest run of the demo and its result; (None, None) if there is none.

    While the demo runs it is the run of that; its result comes later.
    """
    if jobs_view.busy(JOB) is not None:
        return live.runs().find(_running.get(JOB, "")), None
    known = live.runs()
    for i, run in enumerate(known.runs()):
        key = str(run.path)
        when = bounded.stamp(run.path / RESULT) if i < NEWEST else known.folder_time(run)
        if key not in _results or _results[key][0] != when:
            _results[key] = (when, _result(run.path))
        if (found := _results[key][1]) is not None:
            return run, found
    return None, None


def _result(folder: Path) -> dict | None:
    found = bounded.read_dict(folder / RESULT)
    try:
        view(found)  # a file of another form shows nothing
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    return found


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
            (
                "Words per answer",
                f"{before['words']:.0f} → {after['words']:.0f}",
                "Average over the held-out questions",
            ),
            (
                "Short answers",
                f"{100 * before['short_share']:.0f} % → {100 * after['short_share']:.0f} %",
                "Share of answers with few words",
            ),
            (
                "Correct answers",
                f"{100 * before['right_share']:.0f} % → {100 * after['right_share']:.0f} %",
                "On the held-out questions with one correct answer. A long answer has more chances to mention it",
            ),
            (
                "Held-out reward margin",
                f"{result['margin']:+.3f}",
                "Reward of good minus bad rows; 0 before training",
            ),
            (
                "Reward AUC",
                f"{result['auc']:.2f}",
                "How well rewards rank good held-out rows above bad ones; 0.5 is chance, 1 is perfect",
            ),
            ("Time", jobs.duration(result["seconds"]), "Training and evaluation"),
        )
    )
    answers = "".join(
        f'<div><b>{html.escape(a["prompt"])}</b><div class="demo-pair">'
        f'<div><span>Before</span><pre tabindex="0">{html.escape(a["base"])}</pre></div>'
        f'<div class="after"><span>After</span><pre tabindex="0">{html.escape(a["tuned"])}</pre></div></div></div>'
        for a in result["samples"][:3]
    )
    return f'<div class="demo-numbers">{cells}</div><div class="demo-answers">{answers}</div>'
