"""``app.py --demo``: train the example at one press, and show the model before and after. Runs `kto_core.demo`."""

from __future__ import annotations

import html

import gradio as gr

from kto_core import jobs
from kto_core.errors import BusyError
from ui import jobs_view, live
from ui.context import Context

JOB = "Demo "


def build(ctx: Context) -> None:
    with gr.Column(elem_classes="card", elem_id="demo"):
        with gr.Row(equal_height=True):
            gr.HTML(
                "<h3>See it work</h3><p>Trains the embedded small model on the example, minutes on two CPU cores, "
                "and shows what it learned. The Train tab has the curves meanwhile.</p>",
                elem_classes="panel-head",
            )
            start = gr.Button("Run the demo", variant="primary", scale=0, min_width=150, elem_id="demo-start")
        jobs_view.build(ctx, JOB)
        result = gr.HTML("", visible=False, elem_id="demo-result", show_label=False)
    seen = gr.State("")

    def run():
        if jobs_view.busy(JOB):
            raise BusyError("The demo runs already.")
        if (other := live.active()) is not None:
            raise BusyError(f"Run {other.id} is training. Stop it or wait for its end, then run the demo.")

        def work(progress, cancel):
            from kto_core import demo

            return demo.run_demo(progress=progress, cancel=cancel)

        jobs.start(JOB + "training", work)
        return gr.update(interactive=False, value="Running…")

    def tick(before: str):
        done = [j for j in jobs_view.mine(JOB) if j.state == "done"]
        busy = jobs_view.busy(JOB) is not None
        now = f"{busy}-{done[-1].id if done else ''}"
        if now == before:
            return (gr.skip(),) * 3
        shown = gr.update(value=view(done[-1].result), visible=True) if done else gr.skip()
        return shown, gr.update(interactive=not busy, value="Running…" if busy else "Run the demo"), now

    ctx.on_tick(tick, [result, start, seen], [seen])
    ctx.on_load(lambda: tick(""), [result, start, seen])
    start.click(
        ctx.guarded(run),
        None,
        [start],
        concurrency_limit=None,
        trigger_mode="once",
        show_progress="hidden",
        api_visibility="private",
    )


def view(result: dict) -> str:
    """Before and after: the habit and the margin as numbers, three answers side by side."""
    habit = result["habit"]
    cells = _pair(habit["name"], habit["before"], habit["after"], habit.get("unit", ""))
    cells += _pair("Held-out reward margin", result["margin"]["before"], result["margin"]["after"], "")
    answers = "".join(
        f'<div class="demo-answer"><b>{html.escape(a["prompt"])}</b><div class="demo-pair">'
        f"<div><span>Before</span><pre>{html.escape(a['before'])}</pre></div>"
        f'<div class="after"><span>After</span><pre>{html.escape(a["after"])}</pre></div></div></div>'
        for a in result["answers"][:3]
    )
    return f'<div class="demo-numbers">{cells}</div>{answers}'


def _pair(name: str, before: float, after: float, unit: str) -> str:
    unit = f" {html.escape(unit)}" if unit else ""
    return f'<div class="tile wide"><span>{html.escape(name)}</span><b>{before:,.3g} → {after:,.3g}{unit}</b></div>'
