"""A merge of a model that is loaded whole: what `shards` cannot do tensor by tensor."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from kto_core.errors import ExportError, HardwareError, ModelError, first_line

from .rounding import generator_of, layer_name, rounded, target_of

SHARD = "2GB"
Tell = Callable[[float, str], None]


def merge_whole(base: str, adapter: str, folder: Path, public_base: str, tell: Tell) -> dict:
    """Write weights and configuration of the merged model into ``folder``. Arguments and errors: as `merging.merge`.

    Returns:
        What it adds to the merge's facts.
    """
    import torch

    from kto_core.models import load as models

    tell(0.02, "Loading the base model…")
    model = _load_plain(base)
    dtype = _target_dtype(model)  # before the adapter, whose own weights are fp32
    tell(0.4, "Loading the adapter…")
    tuned = models.load_adapter(model, adapter)
    with torch.no_grad():
        layers, kept = _merge_layers(tuned, dtype, tell)
        model = tuned.unload()
        model = model.to(dtype)
        largest = max(float(p.detach().abs().max()) for p in model.parameters() if p.is_floating_point())
    if not largest < float("inf"):
        raise diverged()
    name = str(dtype).removeprefix("torch.")
    model.config._name_or_path = model.name_or_path = public_base
    _save(model, folder, tell)
    return {"dtype": name, "largest": largest, "layers": layers, "kept": kept}


def diverged() -> ExportError:
    return ExportError(
        "The merged weights contain NaN or infinity, because training diverged. Train with a lower learning rate."
    )


def merge_layer(layer, name: str, before, dtype, on_grid: bool):
    """PEFT's own merge of one layer in fp32, then rounded.

    Args:
        layer: PEFT's. name: its name in the model. before: the base's weight. on_grid: it lies on ``dtype``'s grid.

    Returns:
        The merged weight in ``dtype``, and the two numbers of `rounding.rounded`.

    Raises:
        ExportError: the adapter is not finite.
    """
    import torch

    holder = layer.get_base_layer()
    parameter = getattr(layer, "parameter_name", "weight")
    setattr(holder, parameter, torch.nn.Parameter(before.float(), requires_grad=False))
    try:
        layer.merge(safe_merge=True)
    except ValueError as e:
        raise ExportError(
            f"The adapter contains NaN or infinity ({name}), because training diverged. Train with a lower learning "
            "rate."
        ) from e
    after = getattr(holder, parameter).data
    return rounded(before, after, dtype, generator_of(name) if on_grid else None)


def _load_plain(base: str):
    """The base on the CPU without quantization, in the dtype it was saved in."""
    import torch

    from kto_core.models import facts as model_info
    from kto_core.models import load as models
    from kto_core.models.experts import gpt_oss, held

    quantized = model_info.model_facts(base).quantized
    how: dict = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False}
    if quantized == "mxfp4":
        from transformers import Mxfp4Config  # type: ignore[attr-defined]

        how |= {"quantization_config": Mxfp4Config(dequantize=True), "dtype": torch.bfloat16}
    elif quantized == "bitsandbytes":
        how["device_map"] = {"": "cpu"}
    elif quantized:
        raise ExportError(
            f"The base model is quantized with {quantized} and cannot be dequantized for a merge. Train a 16-bit or "
            "bitsandbytes 4-bit model to export it, or share only the adapter."
        )
    try:
        model = models.load_whole(Path(base), **how)
        if quantized == "bitsandbytes":
            model = model.dequantize()
            held.fuse(model, model.dtype)
        if model.config.model_type == "gpt_oss":
            gpt_oss.fuse(model)
        if quantized:  # else save_pretrained would try to quantize again, the way it was loaded
            model._weight_conversions = None
        return model
    except MemoryError as e:
        raise HardwareError("The base model does not fit in memory. Close other programs and try again.") from e
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as e:
        raise ModelError(f"The base model cannot be loaded for the merge: {first_line(e)}") from e


def _target_dtype(model):
    """See `rounding.target_of`."""
    import collections

    import torch

    weights = [p.detach() for p in model.parameters() if p.is_floating_point()]
    count: collections.Counter = collections.Counter()
    for weight in weights:
        count[weight.dtype] += weight.numel()
    own = count.most_common(1)[0][0]  # routers and norms may have another one
    return target_of(own, max(float(w.abs().max()) for w in weights) if own == torch.float32 else 0.0)


def _merge_layers(tuned, dtype, tell: Tell) -> tuple[int, float]:
    """Every layer merged and rounded. Returns (layers, share of the change that is kept)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(n, m) for n, m in tuned.named_modules() if isinstance(m, BaseTunerLayer) and m.active_adapters]
    if not layers:
        raise no_layers()
    projected = size = 0.0
    for i, (name, layer) in enumerate(layers):
        tell(0.45 + 0.25 * i / len(layers), f"Merging: layer {i + 1:,} of {len(layers):,}")
        holder, parameter = layer.get_base_layer(), getattr(layer, "parameter_name", "weight")
        kept = getattr(holder, parameter)
        before = kept.data
        merged, along, whole = merge_layer(layer, layer_name(name), before, dtype, before.dtype == dtype)
        kept.data = merged  # the parameter itself: another module may be tied to it
        setattr(holder, parameter, kept)
        projected, size = projected + along, size + whole
    return len(layers), (projected / size if size else 1.0)


def no_layers() -> ModelError:
    return ModelError("The adapter does not match any layer of this base model. Use the base model of the run.")


def valid(generation) -> None:
    """Make a generation configuration one that can be saved."""
    try:
        generation.validate(strict=True)
    except ValueError:  # some published models have sampling values beside greedy decoding, which are not saved
        generation.do_sample = True


def note_dtype(config, dtype: str) -> None:
    """Say in a configuration and its parts in which dtype the weights are; readers ask either."""
    for part in [config, *(getattr(config, key, None) for key in config.sub_configs)]:
        if part is not None:
            part.dtype = dtype


def _save(model, folder: Path, tell: Tell) -> None:
    note_dtype(model.config, str(model.dtype).removeprefix("torch."))
    valid(model.generation_config)
    expected = sum(p.numel() * p.element_size() for p in model.parameters())
    done = threading.Event()
    threading.Thread(target=_watch, args=(folder, expected, done, tell), daemon=True).start()
    try:
        model.save_pretrained(folder, max_shard_size=SHARD)
    finally:
        done.set()


def _watch(folder: Path, expected: int, done: threading.Event, tell: Tell) -> None:
    """Tell how much is written: save_pretrained says nothing until its end."""
    while not done.wait(0.3):
        written = sum(p.stat().st_size for p in folder.glob("*") if p.is_file())
        share = min(1.0, written / max(expected, 1))
        tell(0.7 + 0.28 * share, f"Writing the merged model: {written / 1e9:.2f} of {expected / 1e9:.2f} GB")
