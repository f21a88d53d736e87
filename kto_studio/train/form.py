"""The settings of the Train tab: one control for each field of RunConfig, and what the user made of them.

Names, help texts, choices and ranges come from `config.cli_fields`; nothing is said twice. A form is a plain dict
``{"preset", "model", "adapter", "values"}``; ``values`` has what differs from the preset only.
"""

from __future__ import annotations

import html
from pathlib import Path

import gradio as gr

from kto_core.config import resolving
from kto_core.config.controls import Control
from kto_core.config.run_config import EARLIER_RATE
from kto_core.errors import KTOError, ModelError
from kto_core.paths import is_hub_id
from kto_core.planning import checks
from kto_core.planning.rate import short
from kto_core.runs import folders
from kto_studio.shared import data_sources, readings
from kto_studio.shared import model_choices as chat_models
from kto_studio.shared.prose import prose

ORIGIN = "user interface"
MAIN = ("num_train_epochs", "max_steps", "learning_rate", "beta", "per_device_train_batch_size",
        "gradient_accumulation_steps", "max_length", "test_size", "desirable_weight", "undesirable_weight")  # fmt: skip
ELSEWHERE = {
    "preset",
    "model",
    "adapter",
    "data",
    "data_split",
    "output_dir",
    *readings.NAMES,
}  # chosen elsewhere, by id
LABELS = {  # where the name alone says too little
    "num_train_epochs": "Epochs",
    "max_steps": "Max steps",
    "per_device_train_batch_size": "Batch size",
    "gradient_accumulation_steps": "Gradient accumulation",
    "max_length": "Maximum length",
    "test_size": "Validation split",
    "kl_group": "KL group",
    "precompute_ref_log_probs": "Precompute reference log-probs",
    "lr_scheduler_type": "Learning rate schedule",
    "warmup_ratio": "Warmup ratio",
    "optim": "Optimizer",
    "max_grad_norm": "Gradient clipping",
    "r": "LoRA rank (r)",
    "lora_alpha": "LoRA alpha",
    "lora_dropout": "LoRA dropout",
    "load_in_4bit": "Load in 4-bit",
    "bnb_4bit_quant_type": "4-bit data type",
    "bnb_4bit_use_double_quant": "Double quantization",
    "dtype": "Precision",
    "num_gpus": "GPUs",
    "shard": "Shard weights",
    "save_total_limit": "Checkpoints to keep",
    "report_to": "Report to",
    "wandb_project": "W&B project",
}

SUGGESTED = {  # of numbers in whose place a word may stand: (what is read, value)
    "learning_rate": [
        ("auto: found by short trials", "auto"),
        ("rule: from steps, alpha and model size", "rule"),
        (f"{short(EARLIER_RATE)}, the earlier tool's rate", short(EARLIER_RATE)),
    ],
    "test_size": [("auto: a tenth, at most 500 rows", "auto"), ("0: none", "0")],
}


def label(name: str) -> str:
    return LABELS.get(name, name.replace("_", " ").capitalize())


def controls() -> list[Control]:
    """All fields with a widget: the main ones first, then by group."""
    shown = [c for c in resolving.cli_fields() if c.group != "Hidden" and c.name not in ELSEWHERE]
    by_name = {c.name: c for c in shown}
    main = [by_name.pop(name) for name in MAIN]
    groups = list(dict.fromkeys(c.group for c in shown))
    return main + sorted(by_name.values(), key=lambda c: groups.index(c.group))


def widget(c: Control, value) -> gr.components.Component:
    """The control of a field; its help is the field's description. What is valid is said when it is not."""
    common = {"label": label(c.name), "info": c.description, "elem_id": f"set-{c.name}", "value": shown(value)}
    if c.choices:
        return gr.Dropdown([(str(x).lower(), str(x).lower()) for x in c.choices], filterable=False, **common)
    if c.words:
        offered = SUGGESTED.get(c.name, [(w, w) for w in c.words])
        return gr.Dropdown(offered, allow_custom_value=True, **(common | {"value": choice(c, value)}))
    if c.type is bool:
        return gr.Checkbox(**common)
    if c.type in (int, float):
        return gr.Number(precision=0 if c.type is int else None, step=1 if c.type is int else "any", **common)  # type: ignore[arg-type]  # a number input's step
    return gr.Textbox(max_lines=1, **common)


def shown(value):
    """A configuration's value as a widget has it."""
    if isinstance(value, bool) or value is None:
        return value
    return ", ".join(value) if isinstance(value, list) else value


def choice(c: Control, value):
    """`shown` for a field with choices, whose true and false are words, or with words among its numbers."""
    if c.words and isinstance(value, int | float):
        return short(value) if 0 < value < 0.01 else f"{value:g}"
    return str(value).lower() if c.choices else shown(value)


# ---- presets and models ----------------------------------------------------------------------------------------------


def preset_choices() -> list[tuple[str, str]]:
    return [(name, name) for name in resolving.presets()]


def preset_note(preset: str) -> str:
    text = resolving.presets().get(preset, {}).get("description", "")
    return f'<p class="card-text">{prose(text)}</p>'


def model_choices(preset: str) -> list[tuple[str, str]]:
    """(label, name): the preset's model and its alternatives."""
    values = resolving.presets().get(preset, {})
    names = dict.fromkeys([values.get("model", "demo"), *values.get("alternatives", [])])
    return [("demo (SmolLM2 135M, built in)" if n == "demo" else n, n) for n in names]


def adapter_choices(chosen: str = "") -> list[tuple[str, str]]:
    """(label, run id) of the adapters to go on from. The chosen one stays when its run is deleted: `resolve` says so,
    and nobody trains a new adapter in its place unawares."""
    there = dict(chat_models.with_adapter())
    gone = [(f"Run {chosen} (deleted)", chosen)] if chosen and chosen not in there else []
    return [("A new adapter", ""), *((label, name) for name, label in there.items()), *gone]


# ---- forms -----------------------------------------------------------------------------------------------------------


def empty(preset: str | None = None) -> dict:
    preset = preset if preset in resolving.presets() else resolving.default_preset()
    return {"preset": preset, "model": resolving.presets()[preset].get("model", "demo"), "adapter": "", "values": {}}


def carry(form: dict, preset: str) -> dict:
    """Another preset with what the user set: its own model and a new adapter, which are of one size only."""
    new = empty(preset)
    base = resolving.resolve(new["preset"], {}).config
    by_name = {c.name: c for c in controls()}
    new["values"] = {
        k: v for k, v in form["values"].items() if k in by_name and v != choice(by_name[k], getattr(base, k))
    }
    return new


def continuing(run_id: str) -> dict:
    """A form that continues from a run's adapter: that run's preset and model.

    Raises:
        ModelError: its adapter is gone, or its settings cannot be read.
    """
    _adapter(run_id)
    config = folders.find(run_id).config().config
    if Path(config.model).is_absolute():
        raise ModelError(f"Run {run_id} was trained on a model in a folder. Continue it with `kto train --adapter`.")
    return empty(config.preset) | {"model": config.model, "adapter": run_id}


def restore(kept) -> dict:
    """The form a browser kept; whatever is not of that form, or not valid any more, is left out."""
    kept = kept if isinstance(kept, dict) else {}
    form = empty(kept.get("preset"))
    names = {c.name for c in controls()}
    values = kept.get("values") if isinstance(kept.get("values"), dict) else {}
    form["values"] = {k: v for k, v in values.items() if k in names and isinstance(v, str | int | float | bool)}
    form["model"] = kept["model"] if isinstance(kept.get("model"), str) and kept["model"] else form["model"]
    adapter = kept.get("adapter")  # an id; of a run that was deleted meanwhile too: `resolve` says so
    form["adapter"] = adapter if isinstance(adapter, str) and Path(adapter).name == adapter else ""
    return form


def read(preset: str, model: str, adapter: str, *values) -> dict:
    """The form that these widgets show."""
    form = empty(preset) | {"model": (model or "").strip(), "adapter": adapter or ""}
    base = resolving.resolve(form["preset"], {}).config
    for c, value in zip(controls(), values, strict=True):
        if value is not None and value != choice(c, getattr(base, c.name)):
            form["values"][c.name] = value
    return form


def write(form: dict) -> list:
    """Values of the widgets of a form, in the order of `controls`."""
    base = resolving.resolve(form["preset"], {}).config

    def value(c: Control):
        kept = form["values"].get(c.name)
        if kept is None:
            return choice(c, getattr(base, c.name))
        return choice(c, kept) if c.words else kept  # a number that a browser kept while there were no words

    return [value(c) for c in controls()]


def resolve(form: dict, data_id: str = "") -> resolving.Resolved:
    """The run's configuration.

    Raises:
        ConfigError: all problems at once; ``max_length`` beyond the model's positions where there are no others.
        DataError: the data set is not there.
        ModelError: the model is not named as a Hub id, or the adapter to go on from is gone.
    """
    name = form["model"]
    if name != "demo" and (not is_hub_id(name) or Path(name).exists()):
        raise ModelError("Enter the model's Hub id as owner/name, or choose one from the list.")
    overrides = form["values"] | {"model": name} | (readings.of(data_id) if data_id else {})
    if form["adapter"]:
        overrides["adapter"] = str(_adapter(form["adapter"]))
    if data_id:
        overrides["data"], overrides["data_split"] = data_sources.locate(data_id)
    found = resolving.resolve(form["preset"], overrides, origin=ORIGIN)
    checks.check_length(found.config)
    return found


def _adapter(run_id: str) -> Path:
    known = {r.id: r for r in folders.list_runs()}.get(run_id)
    if known is not None and (problem := known.problem()):
        raise ModelError(f"Run {run_id} cannot be read: {problem}. Choose another one, or a new adapter.")
    found = known.adapter if known is not None else None
    if found is None:
        raise ModelError(f"The adapter of run {run_id} no longer exists. Choose another run, or a new adapter.")
    return found


def problems(form: dict, data_id: str = "") -> list[str]:
    """Why a run of this form would be refused; [] if nothing speaks against it so far."""
    try:
        resolve(form, data_id)
    except KTOError as e:
        return getattr(e, "problems", None) or [str(e)]
    return []


# ---- origins ---------------------------------------------------------------------------------------------------------


def origins(found: resolving.Resolved) -> str:
    """Every value and where it comes from."""
    values, lines = found.config.model_dump(), []
    hidden = {c.name for c in resolving.cli_fields() if c.group == "Hidden"} | {"output_dir"}
    for field in values:
        if field in hidden:
            continue
        value = values[field]
        text = Path(value).name if field in ("data", "adapter") and value else shown(value)
        origin = found.origins.get(field, "default")
        mine = ' class="mine"' if origin not in ("default",) and not origin.startswith("preset") else ""
        lines.append(
            f"<tr{mine}><td><code>{html.escape(field)}</code></td><td>{html.escape(str(text))}</td>"
            f"<td>{html.escape(origin)}</td></tr>"
        )
    return (
        '<div class="report origins"><table><thead><tr><th scope="col">Setting</th><th scope="col">Value</th><th '
        f'scope="col">Source</th></tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _instead(before: object) -> str:
    return "" if before in ("", None) else f" instead of {html.escape(str(before))}"


def changed(form: dict) -> str:
    """What the user changed, in a line."""
    base = resolving.resolve(form["preset"], {}).config
    parts = [
        f"{html.escape(label(k))} <b>{html.escape(str(v))}</b>{_instead(shown(getattr(base, k)))}"
        for k, v in form["values"].items()
    ]
    if form["model"] != base.model:
        parts.insert(0, f"model <b>{html.escape(form['model'])}</b>")
    if not parts:
        return f'<div class="changed">All settings match preset <b>{html.escape(form["preset"])}</b>.</div>'
    return f'<div class="changed">Changed by you: {"; ".join(parts)}.</div>'
