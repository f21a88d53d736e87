"""What the Chat tab has on it, without what it does."""

from __future__ import annotations

import gradio as gr

from . import view


def model_controls() -> tuple[gr.Dropdown, gr.Dropdown, gr.Button, gr.Button, gr.HTML]:
    """Model, checkpoint, Load, Unload, status."""
    model = gr.Dropdown(
        [("Demo model (SmolLM2 135M)", "demo")],
        value="demo",
        label="Model",
        info="A run, the demo model, or a Hub id (owner/name).",
        allow_custom_value=True,
        elem_id="chat-model",
    )
    checkpoint = gr.Dropdown(
        [],
        label="Checkpoint",
        info="The latest adapter of the run, or an earlier checkpoint.",
        visible=False,
        elem_id="chat-checkpoint",
    )
    with gr.Row():
        load = gr.Button("Load", variant="primary", min_width=80, elem_id="chat-load")
        unload = gr.Button("Unload", min_width=80, interactive=False, elem_id="chat-unload")
    state = gr.HTML(view.status(None, False, "", None), elem_id="chat-status", show_label=False)
    return model, checkpoint, load, unload, state


def settings_controls() -> list[gr.Component]:
    """In the order of `Settings` after model and checkpoint."""
    mode = gr.Radio(
        list(view.MODES),
        value=view.MODES[0],
        label="Answers from",
        info="Both use the same loaded weights; Base turns the adapter off.",
        elem_id="chat-mode",
    )
    system = gr.Textbox(
        label="System prompt", info="Leave empty for no system prompt.", lines=2, max_lines=8, elem_id="chat-system"
    )
    with gr.Accordion("Sampling", open=False, elem_id="chat-sampling"):
        sampling = [
            gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", info="0: always pick the most likely token."),
            gr.Slider(
                0.05,
                1,
                0.9,
                step=0.05,
                label="Top-p",
                info="Sample from the most likely tokens whose probabilities add up to this value.",
            ),
            gr.Slider(
                0, 200, 50, step=1, label="Top-k", info="Sample from this many of the most likely tokens; 0: no limit."
            ),
            gr.Slider(1, 2, 1.0, step=0.05, label="Repetition penalty", info="Above 1: fewer repetitions."),
            gr.Slider(
                16,
                4096,
                512,
                step=16,
                label="Max tokens",
                info="Maximum length of an answer.",
                elem_id="chat-max-tokens",
            ),
            gr.Number(-1, precision=0, label="Seed", info="The same seed gives the same answer; -1: random."),
        ]
    markdown = gr.Checkbox(True, label="Render Markdown", info="Off: show the raw text.", elem_id="chat-markdown")
    return [mode, system, *sampling, markdown]


def chatbot(elem_id: str, label: str, visible: bool = True) -> gr.Chatbot:
    return gr.Chatbot(
        label=label,
        height="calc(100dvh - 346px)",
        min_height=320,
        editable="user",
        buttons=["copy", "copy_all"],
        layout="bubble",
        placeholder="**Send a message to start.**\n\nThe selected model loads with your first message.",
        visible=visible,
        latex_delimiters=[],
        elem_id=elem_id,
    )


def correction_controls() -> tuple[gr.Column, gr.Textbox, gr.Button, gr.Button]:
    """The field under a bad answer: its room, the text, Save, Not now."""
    with gr.Column(visible=False, elem_classes="card", elem_id="chat-correct") as room:
        text = gr.Textbox(
            label="Write what it should have said",
            info="This text becomes a 👍 Good row. The answer stays a 👎 Bad one.",
            lines=3,
            max_lines=12,
            elem_id="chat-correction",
        )
        with gr.Row():
            save = gr.Button("Save", variant="primary", min_width=90, elem_id="chat-correction-save")
            cancel = gr.Button("Not now", min_width=90, elem_id="chat-correction-cancel")
    return room, text, save, cancel


def message_controls() -> tuple[gr.Textbox, gr.Button, gr.Button, gr.Button]:
    """Message, Send, Stop, Clear."""
    with gr.Row(equal_height=True, elem_id="chat-composer"):
        message = gr.Textbox(
            label="Your message",
            show_label=False,
            placeholder="Type a message. Enter to send, Shift+Enter for a new line.",
            lines=1,
            max_lines=8,
            scale=8,
            elem_id="chat-message",
        )
        send = gr.Button("Send", variant="primary", scale=1, min_width=90, elem_id="chat-send")
        stop = gr.Button("Stop", variant="stop", scale=1, min_width=90, visible=False, elem_id="chat-stop")
        clear = gr.Button("Clear", scale=1, min_width=90, elem_id="chat-clear")
    return message, send, stop, clear
