"""What the blind vote has on it, without what it does."""

from __future__ import annotations

from types import SimpleNamespace

import gradio as gr

from kto_studio.shared.marks import mark

from . import vote_view

CHAT, VOTE = KINDS = ("Chat", "Blind vote")
PLACES = ("left", "right")


def kind() -> gr.Radio:
    """What the right side is for. The styles show one of the two: nothing has to be mounted anew."""
    return gr.Radio(
        list(KINDS),
        value=CHAT,
        label="What to do",
        show_label=False,
        container=False,
        interactive=True,  # no event takes it: Gradio would lock it
        elem_id="chat-kind",
    )


def side() -> SimpleNamespace:
    """Everything of the vote, in a column of its own."""
    ui = SimpleNamespace()
    with gr.Column(elem_id="vote-side"):
        _setup(ui)
        ui.status = gr.HTML("", show_label=False, elem_id="vote-status")
        ui.cancel = gr.Button("Cancel", visible=False, size="sm", elem_id="vote-cancel")
        ui.resume = gr.Button("Continue the vote", visible=False, size="sm", elem_id="vote-continue")
        _pair(ui)
        ui.progress = gr.HTML("", show_label=False, elem_id="vote-progress")
        _result(ui)
    # hidden: what is shown now, and what it was made of
    ui.seen, ui.vote, ui.number = mark(), gr.Textbox("", visible=False), gr.Number(0, visible=False)
    return ui


def _setup(ui: SimpleNamespace) -> None:
    with gr.Accordion("Set up the vote", open=True, elem_id="vote-setup") as ui.setup:
        gr.HTML(vote_view.INTRODUCTION, show_label=False, elem_id="vote-introduction")
        with gr.Row():
            ui.against = gr.Dropdown(
                [("Its base model", "base")],
                value="base",
                label="Compare the run with",
                info="The run is the one chosen under Model.",
                elem_id="vote-against",
            )
            ui.source = gr.Radio(
                list(vote_view.SOURCES),
                value="held_out",
                label="Prompts from",
                info="Held-out rows: the run did not train on them.",
                elem_id="vote-source",
            )
        ui.typed = gr.Textbox(label="Prompts, one per line", lines=3, visible=False, elem_id="vote-typed")
        ui.data = gr.Dropdown([], label="Dataset", visible=False, elem_id="vote-data")
        with gr.Row(equal_height=True):
            ui.count = gr.Number(20, precision=0, label="Number of prompts", min_width=110, elem_id="vote-count")
            ui.new = gr.Checkbox(
                False,
                label="Start a new vote",
                info="Off: continue the last vote with these models and settings.",
                elem_id="vote-new",
            )
        ui.start = gr.Button("Start voting", variant="primary", elem_id="vote-start")


def _pair(ui: SimpleNamespace) -> None:
    with gr.Column(elem_id="vote-pair"):
        ui.prompt = gr.HTML("", show_label=False, elem_id="vote-prompt")
        ui.answers, ui.edits, ui.folds, ui.keeps = {}, {}, {}, {}
        with gr.Row(elem_id="vote-answers", equal_height=False):
            for place in PLACES:
                with gr.Column(elem_classes="card", min_width=300):
                    gr.HTML(f"<h3>{place.capitalize()} answer</h3>", elem_classes="panel-head group-head")
                    ui.answers[place] = gr.Markdown("", latex_delimiters=[], elem_id=f"vote-{place}")
                    with gr.Accordion("Edit this answer", open=False, elem_id=f"vote-edit-{place}") as fold:
                        ui.edits[place] = gr.Textbox(
                            label="What it should have said",
                            info="This text becomes a 👍 Good row, the original a 👎 Bad one.",
                            lines=5,
                            max_lines=16,
                        )
                        ui.keeps[place] = gr.Button("Keep this text", size="sm")
                    ui.folds[place] = fold
        with gr.Row(elem_id="vote-buttons"):
            ui.left = gr.Button("← Left is better", elem_id="vote-choose-left", min_width=120)
            ui.tie = gr.Button("↓ No difference", elem_id="vote-choose-tie", min_width=120)
            ui.right = gr.Button("Right is better →", elem_id="vote-choose-right", min_width=120)
            ui.bad = gr.Button("Both are bad", elem_id="vote-choose-bad", min_width=120)
        gr.HTML(vote_view.KEYS, show_label=False, elem_id="vote-keys")


def _result(ui: SimpleNamespace) -> None:
    with gr.Accordion("Result so far", open=False, elem_id="vote-result") as ui.fold:
        ui.result = gr.HTML("", show_label=False, elem_id="vote-numbers")
        with gr.Row():
            ui.rows = gr.Button("Make rows of the votes", elem_id="vote-rows", min_width=170)
            ui.train = gr.Button("Train on them →", elem_id="vote-train", min_width=170)
        ui.made = gr.HTML("", show_label=False, elem_id="vote-made")
