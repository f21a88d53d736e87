"""config.json of a merged model, for readers of transformers 4's keys and of 5's.

transformers 5 writes ``rope_parameters`` and ``dtype``; transformers 4, vLLM and mlx-lm of that time read
``rope_theta``, ``rope_scaling`` and ``torch_dtype``, and take their own defaults without a word where they find none.
"""

from __future__ import annotations

import json
from pathlib import Path

from kto_core.models import model_gate

# Not of the base: how its weights were stored, and what this merge decided.
OWN = {"quantization_config", "dtype", "torch_dtype", "_name_or_path", "rope_parameters"}


def write_both(folder: Path, base: Path) -> None:
    """Add the older keys to the config.json in ``folder``, and what the base's says and transformers left out."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    theirs = model_gate.clean(model_gate.read_object(base / "config.json"), [])
    merged = both(_with(config, theirs))
    file.write_text(json.dumps(merged, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def carry_processor(folder: Path, base: Path) -> None:
    """What readers of a model that also takes images need beside its weights, without keys that choose code."""
    for name in model_gate.PROCESSOR:
        if (base / name).is_file():
            kept = model_gate.clean(model_gate.read_object(base / name), [])
            (folder / name).write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def both(config: dict) -> dict:
    """A configuration with the keys of transformers 4 beside those of 5, in every part of it."""
    found = {key: both(value) if key.endswith("_config") and isinstance(value, dict) else value
             for key, value in config.items()}  # fmt: skip
    if "dtype" in found:
        found["torch_dtype"] = found["dtype"]
    rope = found.get("rope_parameters")
    if isinstance(rope, dict):
        whole = rope.get("full_attention", rope)
        if "rope_theta" in whole:
            found.setdefault("rope_theta", whole["rope_theta"])
        found.setdefault("rope_scaling", _scaling(whole))
        local = rope.get("sliding_attention")
        if isinstance(local, dict) and "rope_theta" in local:
            found.setdefault("rope_local_base_freq", local["rope_theta"])
    return found


def _scaling(rope: dict) -> dict | None:
    kind = rope.get("rope_type", "default")
    left_out = {"rope_theta", "partial_rotary_factor"}
    return None if kind == "default" else {k: v for k, v in rope.items() if k not in left_out}


def _with(config: dict, theirs: dict) -> dict:
    """What the base says and transformers does not write again."""
    found = {k: v for k, v in theirs.items() if k not in OWN and k not in config} | config
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict) and isinstance(theirs.get(key), dict):
            found[key] = _with(value, theirs[key])
    return found
