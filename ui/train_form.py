"""The settings of the Train tab: one control for each field of RunConfig, and what the user made of them.

Names, help texts, choices and ranges come from `config.cli_fields`; nothing is said twice. A form is a plain dict
``{"preset", "model", "adapter", "values"}``; ``values`` has what differs from the preset only.
"""

from __future__ import annotations

import html
from pathlib import Path

import gradio as gr

from kto_core import config, run
from kto_core.config_checks import Control
from kto_core.errors import KTOError, ModelError
from ui import chat_models, sources

ORIGIN = "user interface"
MAIN = ("num_train_epochs", "max_steps", "learning_rate", "beta", "per_device_train_batch_size",
        "gradient_accumulation_steps", "max_length", "test_size", "desirable_weight", "undesirable_weight")  # fmt: skip
ELSEWHERE = {"preset", "model", "adapter", "data", "data_split", "output_dir"}  # chosen by id, never typed as a path
LABELS = {  # where the name alone says too little
    "num_train_epochs": "Epochs",
    "max_steps": "Steps at most",
    "per_device_train_batch_size": "Batch size",
    "gradient_accumulation_steps": "Gradient accumulation",
    "max_length": "Maximum length",
    "test_size": "Held-out share",
    "kl_group": "KL group",
    "precompute_ref_log_probs": "Precompute the reference",
    "lr_scheduler_type": "Schedule",
    "warmup_ratio": "Warm-up share",
    "optim": "Optimizer",
    "max_grad_norm": "Largest gradient norm",
    "r": "LoRA rank (r)",
    "lora_alpha": "LoRA alpha",
    "lora_dropout": "LoRA dropout",
    "load_in_4bit": "4-bit weights",
    "bnb_4bit_quant_type": "4-bit format",
    "bnb_4bit_use_double_quant": "Double quantization",
    "dtype": "Number format",
    "num_gpus": "GPUs",
    "shard": "Divide the weights",
    "save_total_limit": "Checkpoints kept",
    "report_to": "Report to",
    "wandb_project": "W&B project",
}


def label(name: str) -> str:
    return LABELS.get(name, name.replace("_", " ").capitalize())


def controls() -> list[Control]:
    """All fields with a widget: the main ones first, then by group."""
    shown = [c for c in config.cli_fields() if c.group != "Hidden" and c.name not in ELSEWHERE]
    by_name = {c.name: c for c in shown}
    main = [by_name.pop(name) for name in MAIN]
    groups = list(dict.fromkeys(c.group for c in shown))
    return main + sorted(by_name.values(), key=lambda c: groups.index(c.group))


def widget(c: Control, value) -> gr.components.Component:
    """The control of a field; its help is the field's description. What is valid is said when it is not."""
    common = {"label": label(c.name), "info": c.description, "elem_id": f"set-{c.name}", "value": shown(value)}
    if c.choices:
        return gr.Dropdown([(str(x).lower(), str(x).lower()) for x in c.choices], filterable=False, **common)
    if c.type is bool:
        return gr.Checkbox(**common)
    if c.type in (int, float):
        return gr.Number(precision=0 if c.type is int else None, step=1 if c.type is int else "any", **common)
    return gr.Textbox(max_lines=1, **common)


def shown(value):
    """A configuration's value as a widget has it."""
    if isinstance(value, bool) or value is None:
        return value
    return ", ".join(value) if isinstance(value, list) else value


def choice(c: Control, value):
    """`shown` for a field with choices, whose true and false are words."""
    return str(value).lower() if c.choices else shown(value)


# ---- presets and models ----------------------------------------------------------------------------------------------


def preset_choices() -> list[tuple[str, str]]:
    return [(name, name) for name in config.presets()]


def preset_note(preset: str) -> str:
    text = config.presets().get(preset, {}).get("description", "")
    return f'<div class="note">{html.escape(text)}</div>'


def model_choices(preset: str) -> list[tuple[str, str]]:
    """(label, name): the preset's model and its alternatives."""
    values = config.presets().get(preset, {})
    names = dict.fromkeys([values.get("model", "demo"), *values.get("alternatives", [])])
    return [("demo (SmolLM2 135M, embedded)" if n == "demo" else n, n) for n in names]


def adapter_choices(chosen: str = "") -> list[tuple[str, str]]:
    """(label, run id) of the adapters to go on from. The chosen one stays when its run is deleted: `resolve` says so,
    and nobody trains a new adapter in its place unawares."""
    there = [r.id for r in chat_models.with_adapter()]
    gone = [(f"Run {chosen} (not there any more)", chosen)] if chosen and chosen not in there else []
    return [("A new adapter", ""), *((f"Run {name}", name) for name in there), *gone]


def first_model() -> dict:
    """What `Context.chosen_model` begins with: the default preset's."""
    found = config.resolve(None, {}).config
    return {"model": found.model, "max_length": found.max_length}


# ---- forms -----------------------------------------------------------------------------------------------------------


def empty(preset: str | None = None) -> dict:
    preset = preset if preset in config.presets() else config.default_preset()
    return {"preset": preset, "model": config.presets()[preset].get("model", "demo"), "adapter": "", "values": {}}


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
    base = config.resolve(form["preset"], {}).config
    for c, value in zip(controls(), values, strict=True):
        if value is not None and value != choice(c, getattr(base, c.name)):
            form["values"][c.name] = value
    return form


def write(form: dict) -> list:
    """Values of the widgets of a form, in the order of `controls`."""
    base = config.resolve(form["preset"], {}).config
    return [form["values"].get(c.name, choice(c, getattr(base, c.name))) for c in controls()]


def resolve(form: dict, data_id: str = "") -> config.Resolved:
    """The run's configuration.

    Raises:
        ConfigError: all problems at once.
        DataError: the data set is not there.
        ModelError: the model is not named as a Hub id, or the adapter to go on from is gone.
    """
    name = form["model"]
    if name != "demo" and (not chat_models.HUB_ID.fullmatch(name) or Path(name).exists()):
        raise ModelError("Type the model's Hub id as owner/name, or choose one from the list.")
    overrides = form["values"] | {"model": name}
    if form["adapter"]:
        overrides["adapter"] = str(_adapter(form["adapter"]))
    if data_id:
        overrides["data"], overrides["data_split"] = sources.locate(data_id)
    return config.resolve(form["preset"], overrides, origin=ORIGIN)


def _adapter(run_id: str) -> Path:
    found = {r.id: r.adapter for r in run.list_runs()}.get(run_id)
    if found is None:
        raise ModelError(f"Run {run_id} has no adapter any more. Choose another one, or a new adapter.")
    return found


def problems(form: dict, data_id: str = "") -> list[str]:
    """Why a run of this form would be refused; [] if nothing speaks against it so far."""
    try:
        resolve(form, data_id)
    except KTOError as e:
        return getattr(e, "problems", None) or [str(e)]
    return []


# ---- origins ---------------------------------------------------------------------------------------------------------


def origins(found: config.Resolved) -> str:
    """Every value and where it comes from."""
    values, lines = found.config.model_dump(), []
    hidden = {c.name for c in config.cli_fields() if c.group == "Hidden"} | {"output_dir"}
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
        '<div class="report origins"><table><thead><tr><th scope="col">Setting</th><th scope="col">Value</th>'
        f'<th scope="col">Comes from</th></tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def changed(form: dict) -> str:
    """What the user changed, in a line."""
    base = config.resolve(form["preset"], {}).config
    parts = [
        f"{html.escape(label(k))} <b>{html.escape(str(v))}</b> instead of {html.escape(str(shown(getattr(base, k))))}"
        for k, v in form["values"].items()
    ]
    if form["model"] != base.model:
        parts.insert(0, f"model <b>{html.escape(form['model'])}</b>")
    if not parts:
        return f'<div class="changed">All settings are those of preset <b>{html.escape(form["preset"])}</b>.</div>'
    return f'<div class="changed">Changed by you: {"; ".join(parts)}.</div>'
