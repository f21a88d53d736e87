"""What the Data tab has on it, without what it does. Every function adds its components to ``ui``.

No gr.Number has bounds: Gradio would refuse every call that has it among its inputs, also those of other controls.
"""

from __future__ import annotations

from collections.abc import Callable

import gradio as gr

from kto_core.config import resolving
from kto_studio.shared import data_sources, model_choices

from . import jobs, view

MODEL, MESSAGES = "As the model sees it", "Messages"
# the marked row is the one whose number is in the box below the table, whichever of the two was drawn last
MARK_ROW = """
number => {
  const rows = [...document.querySelectorAll('#data-table tr[data-index]')];
  const chosen = rows.find(row => Number(row.dataset.index) === number - 1);
  for (const row of rows) {
    row.ariaSelected = String(row === chosen);
    row.tabIndex = row === (chosen ?? rows[0]) ? 0 : -1;  // one Tab stop, arrows inside
  }
}
"""
CHOOSE_ROW = (
    "const mark = "
    + MARK_ROW.strip()
    + """;
const choose = row => {
  if (!row) return;
  mark(Number(row.dataset.index) + 1);  // marked here: drawing the table again would take the focus away
  trigger('select', {index: Number(row.dataset.index), value: null});
};
element.addEventListener('click', e => choose(e.target.closest('tr[data-index]')));
element.addEventListener('keydown', e => {
  const row = e.target.closest('tr[data-index]');
  if (!row) return;
  const next = {ArrowDown: row.nextElementSibling, ArrowUp: row.previousElementSibling}[e.key];
  if (next) { e.preventDefault(); next.focus(); }
  if (e.key === 'Enter' || e.key === ' ') { e.preventDefault(); choose(row); }
});

let held = null;  // the focused row, found again when the table is drawn again under it
element.addEventListener('focusin', e => { held = e.target.closest('tr[data-index]')?.dataset.index ?? null; });
element.addEventListener('focusout', e => setTimeout(() => { if (e.target.isConnected) held = null; }));
new MutationObserver(() => {
  mark(Number(document.querySelector('#data-row input')?.value));
  if (held !== null && document.activeElement === document.body)
    element.querySelector(`tr[data-index="${held}"]`)?.focus({preventScroll: true});
}).observe(element, {childList: true, subtree: true});
"""
)
FORMS = [("TRL (prompt, completion, label)", "trl"), ("ChatML (conversations, label)", "chatml")]


def page(ui, reading_panel: Callable) -> None:
    """Source, labels and lengths at the left; facts, table and row, report at the right; the way on at the end."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=310, elem_id="data-source"):
            source_controls(ui)
            balance_panel(ui)
            lengths_panel(ui)
        with gr.Column(scale=3, min_width=560, elem_id="data-side"):
            ui.facts = gr.HTML("", elem_id="data-facts", show_label=False)
            with gr.Row(equal_height=True, elem_id="data-doing"):
                ui.status = gr.HTML("", visible=False, elem_id="data-status", show_label=False, scale=6)
                ui.action = gr.Button("Cancel", visible=False, size="sm", scale=0, min_width=140, elem_id="data-action")
            reading_panel(ui)
            with gr.Row(equal_height=False):
                with gr.Column(visible=False, scale=3, min_width=440) as ui.table_room:
                    table_controls(ui)
                with gr.Column(visible=False, scale=2, min_width=320, elem_id="data-row-card") as ui.row_card:
                    row_controls(ui)
            with gr.Column(visible=False, min_width=0) as ui.row_room, gr.Row(equal_height=False):
                report_panel(ui)
                convert_panel(ui)
            with gr.Row(visible=False, elem_id="data-onward") as ui.onward:
                ui.train = gr.Button("Train on this data →", variant="primary", scale=0, min_width=240,
                                     elem_id="data-train")  # fmt: skip


def source_controls(ui) -> None:
    first = model_choices.first_model()
    with gr.Column(elem_classes="card"):
        gr.HTML("<h2>Dataset</h2><p>Answers, each rated 👍 or 👎.</p>", elem_classes="panel-head")
        ui.pick = gr.Dropdown(
            data_sources.choices(),
            value=None,
            label="Dataset",
            info="The example, or a file you uploaded.",
            elem_id="data-pick",
        )
        ui.upload = gr.File(
            label="Upload a file",
            file_types=sorted({*data_sources.SUFFIXES, ".gz"}),
            height=128,
            elem_id="data-upload",
        )
        gr.HTML(
            '<p class="card-text">JSONL, JSON, CSV, TSV or Parquet, also as .gz; up to 2 GB.</p>',
            elem_id="data-upload-help",
        )
        with gr.Accordion("From the Hugging Face Hub", open=False, elem_id="data-hub"):
            ui.repo = gr.Textbox(
                label="Dataset id",
                placeholder="owner/name",
                info="As in its URL, for example trl-lib/kto-mix-14k.",
                elem_id="data-hub-id",
            )
            ui.split = gr.Textbox("train", label="Split", info="For example train or test.", elem_id="data-hub-split")
            ui.fetch = gr.Button("Load from the Hub", size="md", elem_id="data-hub-load")
        ui.model = gr.Dropdown(
            _models(),
            value=first["model"],
            label="Model",
            info="Its tokenizer counts the tokens, and its chat template renders the rows. You can also enter a Hub "
            "id.",
            allow_custom_value=True,
            elem_id="data-model",
        )
        ui.limit = gr.Number(
            first["max_length"],
            label="Max length",
            info="In tokens. Longer prompts are truncated from the left; answers never are.",
            precision=0,
            step=64,
            elem_id="data-max-length",
        )
        ui.limit_note = gr.HTML("", visible=False, show_label=False, elem_id="data-max-length-note")


def _models() -> list[tuple[str, str]]:
    names: dict[str, None] = {}
    for values in resolving.presets().values():
        names |= dict.fromkeys([values.get("model") or "", *(values.get("alternatives") or [])])
    return [("Demo model (SmolLM2 135M)", jobs.DEMO), *((n, n) for n in names if n and n != jobs.DEMO)]


def balance_panel(ui) -> None:
    with gr.Column(elem_classes="card", visible=False) as ui.balance_card:
        ui.balance = gr.HTML("", elem_id="data-balance", show_label=False)
        ui.use = gr.Button("Use this weight", visible=False, size="md", elem_id="data-use-weight")


def lengths_panel(ui) -> None:
    with gr.Column(elem_classes="card", visible=False) as ui.lengths_card:
        ui.lengths = gr.HTML("", elem_id="data-lengths", show_label=False)


def table_controls(ui) -> None:
    with gr.Row(equal_height=True, elem_id="data-filters"):
        ui.search = gr.Textbox(
            label="Search", placeholder="Any text in a row", info="Searches all rows as you type.", scale=1,
            min_width=160, elem_id="data-search",
        )  # fmt: skip
        ui.label = gr.Radio(
            view.FILTERS,
            value="all",
            label="Label",
            info="Show only rows with this label.",
            scale=1,
            min_width=300,
            elem_id="data-label",
        )
    ui.table = gr.HTML("", elem_id="data-table", show_label=False, js_on_load=CHOOSE_ROW)
    with gr.Row(equal_height=True, elem_id="data-pager"):
        ui.back = gr.Button("Previous", size="sm", interactive=False, scale=0, min_width=110, elem_id="data-back")
        ui.number = gr.Number(
            1, show_label=False, label="Page", precision=0, step=1, scale=0, min_width=90,
            container=False, elem_id="data-page",
        )  # fmt: skip
        ui.forth = gr.Button("Next", size="sm", interactive=False, scale=0, min_width=110, elem_id="data-forth")
        ui.range = gr.HTML("", elem_id="data-range", show_label=False)


def row_controls(ui) -> None:
    with gr.Column(elem_classes="card"):
        gr.HTML("<h2>Selected row</h2>", elem_classes="panel-head")
        with gr.Row(equal_height=True):
            ui.row = gr.Number(
                1, label="Row", info="Row number in the table.", precision=0, step=1, scale=1,
                min_width=90, elem_id="data-row",
            )  # fmt: skip
            ui.view = gr.Radio(
                [MODEL, MESSAGES], value=MODEL, label="View", scale=3, min_width=200,
                info="With the model's chat template, or as read from the file.", elem_id="data-view",
            )  # fmt: skip
        ui.shown = gr.HTML("", elem_id="data-row-view", show_label=False)


def report_panel(ui) -> None:
    with gr.Column(elem_classes="card", scale=3, min_width=420):
        ui.issues = gr.HTML("", elem_id="data-issues", show_label=False)
        ui.report = gr.DownloadButton("Download report", visible=False, size="md", elem_id="data-report")


def convert_panel(ui) -> None:
    with gr.Column(elem_classes="card", scale=2, min_width=280):
        gr.HTML(
            "<h2>Convert</h2><p>Saves all kept rows as JSONL. Both formats keep every column.</p>",
            elem_classes="panel-head",
        )
        ui.form = gr.Radio(FORMS, value="trl", label="Format", info="Format for other tools.", elem_id="data-form")
        ui.convert = gr.Button("Convert", interactive=False, size="md", elem_id="data-convert")
        ui.converted = gr.DownloadButton("Download", visible=False, size="md", elem_id="data-converted")
        ui.converting = gr.HTML("", elem_id="data-converting", show_label=False)
