"""What of an adapter's folder PEFT may open: a LoRA in safetensors, and settings that choose neither code nor patterns.

An adapter may come from anybody. Which layers it has is read from its weights, not from a pattern in its settings,
which could take for ever to match. No torch, no PEFT.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from kto_core.errors import DiskError, ModelError
from kto_core.paths import cache_dir

from .model_gate import PLAIN, clean, read_object, require_inside, tensor_header

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYER = re.compile(r"base_model\.model\.(.+)\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)(?:\.weight)?")
LINEAR = re.compile(r"[\w.^$\\]*")  # patterns without repetition: matched in time that grows with the name only
LOCAL = re.compile(r"^[./~]|\\")
QUANTIZED = re.compile(r"(-unsloth)?(-bnb)?(-4bit|-bf16|-mxfp4)?$", re.IGNORECASE)  # siblings with the same weights


def require_adapter(folder: Path, base: str = "") -> None:
    """Whether ``folder`` has a safetensors adapter that can be loaded; ``base``: on the model of that name or folder.

    Raises:
        ModelError: it has none, or one that is broken, of another kind, or of another base model.
    """
    _settings(folder)
    if base:
        _require_base(folder, base)
        _require_sizes(folder, base)


def opened(folder: Path) -> Path:
    """The folder that PEFT is given: ``folder`` itself, or one in the cache with settings that are safe to read.

    Raises:
        ModelError: as `require_adapter`.
        DiskError: the cache cannot be written.
    """
    kept = _settings(folder)
    if kept == read_object(folder / SETTINGS):
        return folder
    file = (folder / WEIGHTS).resolve()
    stat = file.stat()
    key = repr((str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino, json.dumps(kept, sort_keys=True)))
    home = cache_dir() / "adapters" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if home.is_dir():
        return home
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(suffix=".part", dir=home.parent))
        (part / SETTINGS).write_text(json.dumps(kept, indent=1), encoding="utf-8")
        (part / WEIGHTS).symlink_to(file)
        try:
            os.replace(part, home)
        except OSError:  # another thread or process was first
            shutil.rmtree(part, ignore_errors=True)
            if not home.is_dir():
                raise
    except OSError as e:
        raise DiskError.of(home.parent, e) from e
    return home


def _settings(folder: Path) -> dict:
    """adapter_config.json as PEFT may read it."""
    for name in (SETTINGS, WEIGHTS):
        if not os.path.lexists(folder / name):
            raise ModelError(f"{folder} does not contain an adapter ({SETTINGS} and {WEIGHTS}). Choose a finished run.")
        require_inside(folder / name)
    kept = clean(read_object(folder / SETTINGS), [])
    if kept.get("peft_type") != "LORA":
        raise ModelError(
            f"The adapter in {folder} is a {str(kept.get('peft_type'))[:40]}, not a LoRA adapter. Choose another."
        )
    try:
        names = tensor_header(folder / WEIGHTS)
    except ModelError as e:
        raise ModelError(f"The adapter in {folder} cannot be loaded: {e}") from e
    layers = {m[1] for name in names if (m := LAYER.fullmatch(name))}
    if not layers:
        raise ModelError(f"The adapter in {folder} contains no LoRA weights. Choose another.")
    narrowing = ("exclude_modules", "layers_pattern", "layers_to_transform")
    if isinstance(kept.get("target_modules"), str) or any(kept.get(key) for key in narrowing):
        kept |= {"target_modules": sorted(layers), **{key: None for key in narrowing if key in kept}}
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = kept.get(key) or {}
        if not isinstance(patterns, dict) or not all(LINEAR.fullmatch(p) for p in patterns):
            raise ModelError(
                f"The adapter in {folder} chooses layers by patterns in {key} that may take for ever to match. Choose "
                "another, or write the layers' names there."
            )
    return kept


def _require_base(folder: Path, base: str) -> None:
    """Two Hub ids that differ are two models. A folder's name says little, so only sizes tell there, on loading."""
    from .facts import public_name

    made_for = read_object(folder / SETTINGS).get("base_model_name_or_path")
    chosen = public_name(base)
    if not isinstance(made_for, str) or not _hub_id(made_for) or not _hub_id(chosen):
        return
    if _family(made_for) != _family(chosen):
        raise ModelError(
            f"The adapter in {folder} was made for {made_for[:100]}, not for {chosen}: on another model it would only "
            "do harm. Choose its own base model."
        )


def _require_sizes(folder: Path, base: str) -> None:
    """Each layer's two matrices against the weight they change, where that is here and neither packed nor renamed."""
    from .facts import weights_at_hand

    found = weights_at_hand(base)
    ours = {name: shape for name, (_, shape) in tensor_header(folder / WEIGHTS).items()}
    for name, wide in ours.items():
        match = LAYER.fullmatch(name)
        if not match or not name.endswith("lora_A.weight"):
            continue
        dtype, shape = found.get(f"{match[1]}.weight", ("", ()))
        tall = ours.get(name.replace("lora_A", "lora_B"), ())
        if dtype in PLAIN and len(wide) == len(tall) == len(shape) == 2 and (tall[0], wide[1]) != shape:
            raise ModelError(
                f"The adapter in {folder} does not fit {base}: {match[1][:100]} is {tall[0]} × {wide[1]} here, "
                f"{shape[0]} × {shape[1]} there. Choose the adapter's own base model."
            )


def _hub_id(name: str) -> bool:
    return name.count("/") == 1 and not LOCAL.match(name) and not Path(name).exists()


def _family(name: str) -> str:
    """The model's own name, without who published it and how it is quantized."""
    return QUANTIZED.sub("", name.rpartition("/")[2]).lower()
