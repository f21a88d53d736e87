"""An adapter into its base: 16-bit weights in a plain model folder. Runs in a child process (`kto_core.guards.child`).

Which base. A plain checkpoint is loaded as it lies on the disk, never quantized, even if training quantized it on the
fly. A checkpoint that is itself 4-bit (bitsandbytes, MXFP4) is dequantized: the adapter is the difference to exactly
those weights, so base + adapter is the model that was trained, evaluated and talked to; the full-precision
sibling would be another one, and may not be on this machine.

Which rounding. KTO's steps are small: with 8 bits of mantissa most of an update is less than half a unit in the last
place, and rounding to nearest would put every such weight back where it was. The sum is formed in fp32 and, where the
base already lies on the 16-bit grid, rounded stochastically (seeded): right on average, so the update survives.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from kto_core.errors import ExportError, HardwareError, ModelError, first_line
from kto_core.guards.child import tell

from .config_keys import carry_processor, write_both

FACTS = "export.json"  # in the merged folder: what it was made of
SEED = 3407
F16_MAX = 65504.0
SHARD = "4GB"
PIECE = 2**18  # numbers rounded at a time


def merge(base: str, adapter: str, part: str, public_base: str, facts: dict) -> dict:
    """Write the merged model into the folder ``part``.

    Args:
        base: folder of the base model. adapter: folder of the PEFT adapter (safetensors).
        public_base: the base's name for others, kept in the config.
        facts: what the caller wants to find in ``export.json``.

    Returns:
        ``facts`` plus ``dtype``, ``largest`` (greatest magnitude of a weight), ``layers`` (merged ones) and ``kept``:
        the share of the adapter's change that survived rounding, its projection (1 is all).

    Raises:
        ModelError: base or adapter cannot be loaded, or they do not fit together.
        ExportError: a quantization that cannot be undone; a merged weight is not finite.
    """
    import torch

    from kto_core.models import load as models

    folder = Path(part)
    tell(0.02, "Loading the base model…")
    model = _load_plain(base)
    dtype = _target_dtype(model)  # before the adapter, whose own weights are fp32
    tell(0.4, "Loading the adapter…")
    tuned = models.load_adapter(model, adapter)
    with torch.no_grad():
        layers, kept = _merge_layers(tuned, dtype)
        model = tuned.unload()
        model = model.to(dtype)
        largest = max(float(p.detach().abs().max()) for p in model.parameters() if p.is_floating_point())
    if not largest < float("inf"):
        raise ExportError(
            "The merged weights contain NaN or infinity, because training diverged. Train with a lower learning rate."
        )
    facts = {**facts, "dtype": str(dtype).removeprefix("torch."), "largest": largest, "layers": layers, "kept": kept}
    _save(model, base, folder, public_base)
    (folder / FACTS).write_text(json.dumps(facts, indent=1))
    return facts


def _load_plain(base: str):
    """The base on the CPU without quantization, in the dtype it was saved in."""
    import torch

    from kto_core.models import facts as model_info
    from kto_core.models import load as models
    from kto_core.models.experts import gpt_oss, held

    quantized = model_info.model_facts(base).quantized
    how: dict = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False}
    if quantized == "mxfp4":
        from transformers import Mxfp4Config

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
    """bf16 and fp16 stay. fp32 becomes fp16, which has 8 times bf16's resolution, if all weights lie in its range."""
    import collections

    import torch

    weights = [p.detach() for p in model.parameters() if p.is_floating_point()]
    count: collections.Counter = collections.Counter()
    for weight in weights:
        count[weight.dtype] += weight.numel()
    own = count.most_common(1)[0][0]  # routers and norms may have another one
    if own != torch.float32:
        return own if own == torch.float16 else torch.bfloat16
    return torch.float16 if all(float(w.abs().max()) < F16_MAX for w in weights) else torch.bfloat16


def _merge_layers(tuned, dtype) -> tuple[int, float]:
    """PEFT's own merge, layer by layer in fp32, then rounded. Returns (layers, share of the change that is kept)."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    generator = torch.Generator().manual_seed(SEED)
    layers = [(n, m) for n, m in tuned.named_modules() if isinstance(m, BaseTunerLayer) and m.active_adapters]
    if not layers:
        raise ModelError("The adapter does not match any layer of this base model. Use the base model of the run.")
    projected = size = 0.0
    for i, (name, layer) in enumerate(layers):
        tell(0.45 + 0.25 * i / len(layers), f"Merging: layer {i + 1:,} of {len(layers):,}")
        holder = layer.get_base_layer()
        weight = getattr(holder, getattr(layer, "parameter_name", "weight"))
        before = weight.data
        weight.data = before.float()
        try:
            layer.merge(safe_merge=True)
        except ValueError as e:
            raise ExportError(
                f"The adapter contains NaN or infinity ({name}), because training diverged. Train with a lower "
                "learning rate."
            ) from e
        on_grid = before.dtype == dtype  # which is never float32
        weight.data, along, whole = _rounded(before, weight.data, dtype, generator if on_grid else None)
        projected, size = projected + along, size + whole
    return len(layers), (projected / size if size else 1.0)


def _rounded(before, after, dtype, generator):
    """(``after`` in ``dtype``, how far it then lies from ``before`` along the change, the change's squared length).

    Piece by piece: what a piece needs stays in the processor's cache, a quarter of the time of whole layers at once.
    """
    import torch

    before, after = before.contiguous(), after.contiguous()
    rounded, along, whole = torch.empty_like(after, dtype=dtype), 0.0, 0.0
    pieces = (t.view(-1).split(PIECE) for t in (before, after, rounded))
    for old, new, out in zip(*pieces, strict=True):
        old = old.float()
        out.copy_(round_to(new, dtype, generator))
        wanted = new - old
        along += float(torch.dot(out.float() - old, wanted))
        whole += float(torch.dot(wanted, wanted))
    return rounded, along, whole


def round_to(values, dtype, generator=None):
    """fp32 -> fp16 or bf16; stochastically with a ``generator`` (the expectation is exact), else to nearest.

    A value that lies on the 16-bit grid is never moved.
    """
    import torch

    if generator is None:
        return values.to(dtype)
    dropped = 16 if dtype == torch.bfloat16 else 13  # bits of fp32's mantissa that go
    noise = torch.randint(0, 1 << dropped, values.shape, generator=generator, dtype=torch.int32)
    rounded = ((values.view(torch.int32) + noise) & -(1 << dropped)).view(torch.float32)
    if dtype == torch.float16:  # below 2^-14 its steps are all 2^-24
        fine = torch.floor(values * 2.0**24 + noise / float(1 << dropped)) * 2.0**-24
        rounded = torch.where(values.abs() < 2.0**-14, fine, rounded).clamp(-F16_MAX, F16_MAX)
    return rounded.to(dtype)


def _save(model, base: str, folder: Path, public_base: str) -> None:
    from kto_core.models import load as models
    from kto_core.models.tokenizer import save_tokenizer

    model.config._name_or_path = model.name_or_path = public_base
    generation = model.generation_config
    try:
        generation.validate(strict=True)
    except ValueError:  # some published models have sampling values beside greedy decoding, which are not saved
        generation.do_sample = True
    expected = sum(p.numel() * p.element_size() for p in model.parameters())
    done = threading.Event()
    threading.Thread(target=_watch, args=(folder, expected, done), daemon=True).start()
    try:
        model.save_pretrained(folder, max_shard_size=SHARD)
    finally:
        done.set()
    write_both(folder, Path(base))
    carry_processor(folder, Path(base))
    save_tokenizer(models.load_tokenizer(base), folder)
    for file in folder.iterdir():
        os.chmod(file, 0o644)  # safetensors writes 0600: others could not read what is shared


def _watch(folder: Path, expected: int, done: threading.Event) -> None:
    """Tell how much is written: save_pretrained says nothing until its end."""
    while not done.wait(0.3):
        written = sum(p.stat().st_size for p in folder.glob("*") if p.is_file())
        share = min(1.0, written / max(expected, 1))
        tell(0.7 + 0.28 * share, f"Writing the merged model: {written / 1e9:.2f} of {expected / 1e9:.2f} GB")
