"""The form as a file and as a command: saved, loaded, copied. What it says is what `train` would do with it."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gradio as gr

from kto_core.config import sharing
from kto_studio.shared import data_sources
from kto_studio.shared.context import QUICK, Context
from kto_studio.shared.saving import save_as

from . import form as train_form
from . import from_config

SAVE = save_as("kto-settings.yaml", "application/yaml")
COPY = "text => { if (text) navigator.clipboard?.writeText(text).catch(() => {}); }"  # else it is there to be marked


def build() -> SimpleNamespace:
    """The group, closed."""
    ui = SimpleNamespace()
    with gr.Accordion("Save, load, copy as a command", open=False, elem_id="train-share"):
        with gr.Row():
            ui.save = gr.Button("Save as YAML", size="md", min_width=120, elem_id="train-save-yaml")
            ui.load = gr.UploadButton("Load YAML", size="md", min_width=120, file_types=[".yaml", ".yml"],
                                      elem_id="train-load-yaml")  # fmt: skip
            ui.copy = gr.Button("Copy command", size="md", min_width=120, elem_id="train-copy-command")
        ui.command = gr.Textbox(visible=False, label="Command", info="Trains with these settings in a terminal.",
                                lines=2, max_lines=6, interactive=False, elem_id="train-command")  # fmt: skip
        ui.text = gr.Textbox(visible=False)
    return ui


def wire(ctx: Context, ui: SimpleNamespace, typed: list, filled: list, everything: Callable) -> list:
    """Connect it; the events that fill the form.

    Args:
        typed: the form's widgets. filled: the outputs of ``everything(form, data_id)``.
    """

    def config(data_id: str, *values):
        found = train_form.resolve(train_form.read(*values), data_id).config
        if not ctx.public:
            return found
        return found.model_copy(update={name: _no_folder(getattr(found, name)) for name in ("data", "adapter")})

    def command(*asked):
        return gr.update(value=sharing.as_command(config(*asked)), visible=True)

    def load(file: str | None, data_id: str):
        if not file:
            return [gr.skip()] * (len(filled) + 1)
        found = from_config.read(file)
        known = from_config.data_id(found)
        for text in from_config.remarks(found, known):
            gr.Warning(html.escape(text))
        chosen = known if known and data_sources.name(known) else ""
        return [chosen or gr.skip(), *everything(from_config.form(found, name=True), chosen or data_id)]

    asked = [ctx.chosen_data, *typed]
    saved = ui.save.click(ctx.guarded(lambda *a: sharing.as_yaml(config(*a))), asked, [ui.text], **QUICK)
    saved.success(None, [ui.text], None, js=SAVE, queue=False)
    copied = ui.copy.click(ctx.guarded(command), asked, [ui.command], **QUICK)
    copied.success(None, [ui.command], None, js=COPY, queue=False)
    events = [ui.load.upload(ctx.guarded(load), [ui.load, ctx.chosen_data], [ctx.chosen_data, *filled], **QUICK)]
    if ctx.start_from is not None:

        def begin(wanted: dict | None, data_id: str):
            """The settings of a run, chosen in Runs."""
            return everything(wanted["form"], wanted["data"] or data_id) if wanted else [gr.skip()] * len(filled)

        events.append(ctx.start_from.change(ctx.guarded(begin), [ctx.start_from, ctx.chosen_data], filled, **QUICK))
    return events


def _no_folder(value: str) -> str:
    return Path(value).name if Path(value).is_absolute() else value
