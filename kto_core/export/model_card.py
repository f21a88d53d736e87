"""The model card of an upload (README.md): base, use, data, settings, metrics, lineage, licence of the base."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from kto_core.paths import is_hub_id
from kto_core.runs.lineage import adapter_origin
from kto_core.verdict import keeping, wording

from .hub import origin
from .hub.calls import TAG
from .model_use import use

SETTINGS = ("loss_type", "beta", "desirable_weight", "undesirable_weight", "learning_rate", "lr_scheduler_type",
            "warmup_ratio", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
            "max_steps", "max_length", "optim", "weight_decay", "r", "lora_alpha", "lora_dropout", "target_modules",
            "load_in_4bit", "kl_group", "engine", "seed")  # fmt: skip
METRICS = ("loss", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "eval_loss", "eval_kl",
           "eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins", "eval_auc")  # fmt: skip
USED = ("learning_rate", "optim", "kl_group", "engine")  # what a run may take otherwise, and then notes
FIXED = ("learning_rate",)  # of these a number is used as it is
SHAPE = ("r", "lora_alpha", "lora_dropout", "target_modules")  # of a run that went on: its adapter's, not its own
RELATION = {("adapter",): "adapter", ("gguf",): "quantized"}  # to the base; of other uploads: finetune
RESULTS = (("rewards/margins", "Reward margin", "margin_interval"),
           ("rewards/chosen", "Reward of good answers", "chosen_interval"),
           ("accuracy", "Rewards on the right side of 0", ""), ("auc", "AUC of rewards", ""))  # fmt: skip
PACKAGES = ("trl", "peft", "transformers", "torch")


def write(
    run,
    repo: str,
    what: list[str],
    *,
    adapter_sha256: str,
    files: list[str],
    dtype: str = "",
    base: str = "",
    stated: dict[str, Any] | None = None,
) -> str:
    """Text of the card.

    Args:
        run: a `run.Run`. what: of "adapter", "merged", "gguf". files: paths in the repository.
        dtype: of the merged weights, if there are any.
        base: the base's Hub id where the run has it in a folder. stated: licence and languages of the base
            (`origin.STATED`).
    """
    from huggingface_hub import ModelCard, ModelCardData

    config = run.config().config
    base, stated = base or origin.base_name(config.model), stated or {}
    on_hub = is_hub_id(base)
    data = run.dataset()
    source = str(data.get("source", ""))
    hub_data = source.split(":")[0] if is_hub_id(source.split(":")[0]) and not Path(source).exists() else ""
    library = "transformers" if "merged" in what else "peft" if "adapter" in what else "gguf"
    results = _results(run, hub_data, Path(source).name)
    card_data = ModelCardData(
        base_model=base if on_hub else None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=[
            "kto",
            "trl",
            TAG,
            *(["lora", "peft"] if "adapter" in what else []),
            *(["gguf"] if "gguf" in what else []),
        ],
        datasets=[hub_data] if hub_data else None,
        **({"model_name": repo.split("/")[-1], "eval_results": results} if results else {}),
        **stated,
    )
    if on_hub:
        card_data.base_model_relation = RELATION.get(tuple(what), "finetune")
    state = run.state()
    body = [
        f"# {repo.split('/')[-1]}",
        f"{_link(base) if on_hub else base}, trained with KTO (Kahneman-Tversky Optimization, arXiv 2402.01306) on "
        "answers marked good or bad.",
        "## Use",
        use(run, repo, base, what, files),
        "## Data",
        _data(data, source, hub_data),
        "## Settings",
        _table(_settings(run, config, state.used)),
        "## Metrics",
        _metrics(state),
        *_verdict(run),
        "## Lineage",
        _lineage(run, base, _began(config, state.used), adapter_sha256, what, dtype),
        "## License",
        _license(stated),
    ]
    return str(ModelCard(f"---\n{card_data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"))


def _link(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})"


def _data(data: dict, source: str, hub_data: str) -> str:
    if not data:
        return "Not recorded."
    report, train, test = data.get("report") or {}, data.get("train") or {}, data.get("test") or {}
    name = _link(f"datasets/{hub_data}") if hub_data else f"`{Path(source).name}`" if source else "Not recorded"
    rows = [
        ("source", name),
        ("sha256", data.get("sha256")),
        ("rows read", report.get("rows")),
        ("rows kept", report.get("kept")),
        ("trained on", _count(train)),
        ("validation", _count(test)),
        ("prompts truncated", data.get("truncated")),
        ("dropped as too long", data.get("too_long")),
    ]
    return _table([r for r in rows if r[1] not in (None, "")])


def _count(part: dict) -> str:
    if not part.get("rows"):
        return ""
    return f"{part['rows']:,} ({part.get('desirable', 0):,} good, {part.get('undesirable', 0):,} bad)"


def _settings(run, config, used: dict) -> list[tuple]:
    """Name and value of each setting: what was used, which is not always what was configured."""
    values = {name: getattr(config, name) for name in SETTINGS}
    for name in USED:
        sure = name in FIXED and not isinstance(values[name], str)
        values[name] = used.get(name) or (values[name] if sure else f"{values[name]} (as configured)")
    if config.adapter:
        own = json.loads((run.adapter / "adapter_config.json").read_text(encoding="utf-8"))
        for name in SHAPE:
            value = own.get(name, values[name])
            values[name] = sorted(value) if isinstance(value, list) else value
    return list(values.items())


def _metrics(state) -> str:
    rows = [(name, state.latest(name)) for name in METRICS]
    rows = [(name, f"{value:.4g}") for name, value in rows if value is not None]
    if not rows:
        return "No metrics were recorded."
    return f"Last values, after {state.step:,} steps.\n\n" + _table(rows)


def _verdict(run) -> list[str]:
    """What `evaluate` said of the adapter, if it was asked."""
    found = keeping.read(run)
    if found is None:
        return []
    about = "Compared with the model before training, on rows whose questions were not trained on."
    if found["trained_on"] is None:
        about = "Compared with the model before training. Some of the rows' questions may have been trained on."
    lines = _table([("verdict", found["verdict"]["sentence"]), *wording.lines(found)])
    return ["## Verdict", f"{about}\n\n{lines}"]


def _results(run, hub_data: str, name: str) -> list:
    """The verdict's numbers for the header's model-index, each with its 95 % interval where it has one."""
    from huggingface_hub import EvalResult

    found = keeping.read(run)
    if found is None:
        return []
    rows = {"dataset_type": hub_data or "private", "dataset_name": hub_data or name or "rows of the run"}
    made = []
    for key, title, interval in RESULTS:
        if (value := found.get(key)) is None:
            continue
        bounds = found.get(interval) if interval else None
        made.append(EvalResult(task_type="text-generation", task_name="Answers marked good or bad", **rows,
                               metric_type=key, metric_name=title, metric_value=value,
                               metric_args={"interval_95": bounds} if bounds else None))  # fmt: skip
    return made


def _license(stated: dict[str, Any]) -> str:
    if not (name := origin.name_of(stated)):
        return (
            "Not specified. The license of the base model and the terms of the data apply. Add yours to the header of "
            "this model card."
        )
    return f"That of the base model: {name}. The terms of the data apply as well."


def _began(config, used: dict) -> list[str]:
    """The adapters that the run goes back to, in words without a path, the oldest first; [] of a fresh one."""
    if not config.adapter:
        return []
    noted, found = used.get("began_from"), []
    origin = noted if isinstance(noted, dict) and noted else adapter_origin(config.adapter)
    while isinstance(origin, dict) and origin:
        name, step = origin.get("run"), origin.get("checkpoint")
        words = f"of run `{name}`" + (f", {step}" if step else "") if name else f"`{origin.get('folder')}`"
        found.append(f"LoRA adapter {words}")
        origin = origin.get("began_from")
    return found[::-1]


def _lineage(run, base: str, began: list[str], adapter_sha256: str, what: list[str], dtype: str) -> str:
    lines = [f"base model `{base}`"]
    lines += [
        f"{adapter}, from which {'this' if adapter == began[-1] else 'the next'} run continued" for adapter in began
    ]
    lines.append(f"LoRA adapter of run `{run.id}`, sha256 `{adapter_sha256}`")
    if "merged" in what or "gguf" in what:
        lines.append(f"merged into the base model in fp32, stored as {dtype or '16 bit'}")
    if "gguf" in what:
        lines.append("converted with llama.cpp's `convert_hf_to_gguf.py`, quantized by llama.cpp")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    numbered = [f"{i}. {line}" for i, line in enumerate(lines, 1)]
    return "\n".join(numbered) + f"\n\nMade with KTO Studio ({versions})."


def _table(rows: list[tuple]) -> str:
    def cell(value) -> str:
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        return text.replace("|", "\\|").replace("\n", " ")

    return "\n".join(["| | |", "|---|---|", *(f"| {cell(k)} | {cell(v)} |" for k, v in rows)])
