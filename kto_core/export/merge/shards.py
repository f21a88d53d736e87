"""A merge tensor by tensor: each weight of the base is read, taken out of its 4 bits, changed, rounded and written.

In memory are one weight of the base, what merging it takes, and the adapter.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path

from kto_core.errors import ModelError, first_line
from kto_core.files import write_whole
from kto_core.guards import bounded

from . import tensor_files
from .plan import Plan, greatest_of
from .rounding import PIECE
from .tensor_files import Entry
from .whole import Tell, diverged, merge_layer, note_dtype, valid

STATE = "merging.json"  # in the folder while it is made: which files are finished, of which base and adapter
SHARD = 2_000_000_000  # bytes of a file
SILENCE = 0.2  # seconds between two messages, but for layers


def run(plan: Plan, folder: Path, source: str, public_base: str, tell: Tell) -> dict:
    """Write the weights, their index and the configuration into ``folder``.

    Args:
        source: stands for base and adapter: files that an earlier merge of the same finished are kept. "": none are.

    Returns:
        What it adds to the merge's facts; see `merging.merge`.

    Raises:
        ModelError: a file of the base cannot be read. ExportError: a merged weight is not finite.
    """
    shards = tensor_files.in_shards(plan.tensors, SHARD)
    files = dict(zip(tensor_files.names_of(len(shards)), shards, strict=True))
    stamp = hashlib.sha256(repr((source, plan.dtype, plan.own, files)).encode()).hexdigest()
    state = bounded.read_dict(folder / STATE)
    done = state.get("files", {}) if source and state.get("stamp") == stamp else {}
    done = {name: f for name, f in done.items() if _is_whole(folder / name, f)}
    for file in folder.iterdir():
        if file.name not in done:
            file.unlink()
    say = _Said(plan, tell)
    for name, entries in files.items():
        if name in done:
            say.skip(entries)
            continue
        made = _Made(plan, say)
        size = tensor_files.write(folder / name, entries, made.tensor)
        done[name] = {"bytes": size, "largest": made.largest, "along": made.along, "whole": made.whole}
        write_whole(folder / STATE, json.dumps({"source": source, "stamp": stamp, "files": done}), sync=True)
    if len(files) > 1:
        tensor_files.write_index(folder, files)
    _save_config(plan, folder, public_base)
    along, whole = (sum(f[key] for f in done.values()) for key in ("along", "whole"))
    return {
        "dtype": str(plan.dtype).removeprefix("torch."),
        "largest": max(f["largest"] for f in done.values()),
        "layers": len(plan.layers),
        "kept": along / whole if whole else 1.0,
    }


def _is_whole(file: Path, facts: dict) -> bool:
    with contextlib.suppress(OSError, AttributeError):
        return file.is_file() and file.stat().st_size == facts.get("bytes")
    return False


class _Said:
    """Progress by bytes written, with the layer that is merged."""

    def __init__(self, plan: Plan, tell: Tell):
        self._tell, self._layers = tell, plan.layers
        self._all, self._done, self._layer, self._last = sum(e.size for e in plan.tensors), 0, 0, 0.0

    def skip(self, entries: list[Entry]) -> None:
        self._done += sum(e.size for e in entries)
        self._layer += sum(e.name in self._layers for e in entries)

    def next(self, entry: Entry) -> None:
        """``entry`` is about to be made."""
        merged = entry.name in self._layers
        self._layer += merged
        if merged or time.monotonic() - self._last > SILENCE:
            self._last = time.monotonic()
            text = f"Merging: layer {self._layer:,} of {len(self._layers):,}"
            gb = f"{self._done / 1e9:.2f} of {self._all / 1e9:.2f} GB written"
            self._tell(0.2 + 0.78 * self._done / max(1, self._all), f"{text}, {gb}")
        self._done += entry.size


class _Made:
    """The tensors of one file, and what is said of them."""

    def __init__(self, plan: Plan, say: _Said):
        self._plan, self._say = plan, say
        self.largest = self.along = self.whole = 0.0

    def tensor(self, entry: Entry):
        import torch

        plan = self._plan
        self._say.next(entry)
        with torch.no_grad():
            before = _dense(plan, entry.name)
            if entry.name in plan.layers:
                name, layer = plan.layers[entry.name]
                found, along, whole = merge_layer(layer, name, before, plan.dtype, before.dtype == plan.dtype)
                self.along, self.whole = self.along + along, self.whole + whole
                holder = layer.get_base_layer()
                holder.weight = torch.nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
            elif before.is_floating_point():
                found = _cast(before, plan.dtype)
            else:
                return before
        greatest = greatest_of(found)
        if not greatest < float("inf"):
            raise diverged()
        self.largest = max(self.largest, greatest)
        return found


def _dense(plan: Plan, name: str):
    """A tensor of the base as transformers would have it in memory, out of its 4 bits."""
    data = plan.read(name)
    if name not in plan.scales:
        return _cast(data, plan.own) if data.is_floating_point() else data
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit

    try:
        state = QuantState.from_dict(
            {key: plan.read(n) for key, n in plan.scales[name].items()}, device=torch.device("cpu")
        )
        return dequantize_4bit(data, state)
    except (ValueError, KeyError, RuntimeError, AssertionError) as e:
        raise ModelError(
            f"The 4-bit weight {name[:100]} cannot be read ({first_line(e)}). Download the model again."
        ) from e


def _cast(tensor, dtype):
    """``tensor`` in ``dtype``, itself where it is; piece by piece, since a converted copy of a mapped file is read
    once."""
    import torch

    if tensor.dtype == dtype:
        return tensor
    out = torch.empty(tensor.shape, dtype=dtype)
    for old, new in zip(tensor.reshape(-1).split(PIECE), out.view(-1).split(PIECE), strict=True):
        new.copy_(old)
    return out


def _save_config(plan: Plan, folder: Path, public_base: str) -> None:
    """config.json and generation_config.json, as transformers saves them with a model."""
    from transformers import GenerationConfig

    model = plan.model
    config = model.config
    note_dtype(config, str(plan.dtype).removeprefix("torch."))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures, config._name_or_path = [type(model).__name__], public_base
    config.save_pretrained(folder)
    if not model.can_generate():
        return
    if (plan.base / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(plan.base)
    valid(model.generation_config)
    model.generation_config.save_pretrained(folder)
