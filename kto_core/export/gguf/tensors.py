"""The weights of a GGUF file, dequantized, beside the merged model's. Runs in a confined child process."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kto_core.guards import confine
from kto_core.guards.child import tell

from . import layout

# Largest error of a row of weights, relative to its length, that a kind of storage may bring: two to three times what
# the worst row of a real model shows.
ROW_ERRORS = {
    "F32": 1e-6, "F16": 1.5e-3, "BF16": 8e-3, "Q8_0": 0.03, "Q6_K": 0.08, "Q5_K": 0.16, "Q5_0": 0.16, "Q5_1": 0.16,
    "Q4_K": 0.3, "Q4_0": 0.35, "Q4_1": 0.3, "Q3_K": 0.55, "Q2_K": 0.9, "IQ4_XS": 0.35, "IQ4_NL": 0.35,
}  # fmt: skip
WIDE = {"Q8_0", "Q5_0", "Q5_1", "F16"}  # what llama.cpp falls back to
TYPES = {  # what a kind of file is made of; all of them may hold small tensors in F32
    "f16": {"F16"},
    "q8_0": {"Q8_0", "F16"},
    "q6_k": {"Q6_K", "Q8_0", "F16"},
    "q5_k_m": {"Q5_K", "Q6_K"} | WIDE,
    "q4_k_m": {"Q4_K", "Q6_K", "Q5_K", "Q4_0", "Q4_1"} | WIDE,
    "iq4_xs": {"IQ4_XS", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K"} | WIDE,
    "q3_k_m": {"Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "IQ4_NL"} | WIDE,
    "q2_k": {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "IQ4_NL"} | WIDE,
}
KNOWN = {"llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo2", "granite", "mistral3", "stablelm"}
NOTHING: dict = {
    "compared": 0,
    "left_out": [],
    "wrong": [],
    "worst": {},
    "other_types": [],
    "known": False,
    "missing": [],
}
PIECE = 2**24  # numbers compared at a time


def compare(path: str, merged: str, kind: str) -> dict:
    """Compare every tensor that both have under a name that llama.cpp's list maps.

    Args:
        kind: what the file is to be ("f16", "q4_k_m", …), or "" if that is unknown.

    Returns:
        ``compared``: number of tensors; ``left_out``: names in the file that have no counterpart; ``wrong``: list of
        {name, error, allowed, rows}, the worst first; ``worst``: {type: largest error of a row}; ``other_types``:
        names of tensors stored in a way that this kind does not use; ``known``: whether this architecture's tensors
        are stored in a way that is understood here; ``missing``: tensors of the merged model that the file lacks.
    """
    import gguf
    import torch  # noqa: F401 - it looks for a folder to write in, which there is none of afterwards

    confine.close_in()
    file = layout.read(path)
    architecture = str(file.fields.get("general.architecture"))
    count = file.fields.get(f"{architecture}.block_count")
    of_name = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    config = json.loads((Path(merged) / "config.json").read_text(encoding="utf-8"))
    if architecture not in of_name or count is None:
        return copy.deepcopy(NOTHING)
    names = gguf.get_tensor_name_map(of_name[architecture], int(count))
    files, mine, missing = _files(merged), {}, []
    for name in files:
        if (theirs := names.get_name(name, try_suffixes=(".weight", ".bias"))) is None:
            missing.append(name)
        else:
            mine[theirs] = name
    found = copy.deepcopy(NOTHING) | {"known": architecture in KNOWN}
    there = {tensor.name: tensor for tensor in file.tensors}
    for i, (name, tensor) in enumerate(there.items()):
        tell(i / len(there), f"Comparing weights: {i + 1} of {len(there)}")
        stored = gguf.GGMLQuantizationType(tensor.kind).name
        if kind and stored != "F32" and stored not in TYPES.get(kind, {stored}):
            found["other_types"].append(name)
        if name not in mine:
            found["left_out"].append(name)
            continue
        error, rows = _error(path, tensor, _load(files, mine[name]), config, mine[name])
        if error is None:
            found["left_out"].append(name)
            continue
        found["compared"] += 1
        found["worst"][stored] = max(found["worst"].get(stored, 0.0), error)
        allowed = ROW_ERRORS.get(stored, 1.0)
        if not error <= allowed:
            found["wrong"].append({"name": name, "error": error, "allowed": allowed, "rows": rows})
    tied = bool(config.get("tie_word_embeddings"))
    gone = [n for gguf_name, n in mine.items() if gguf_name not in there and not (tied and n.startswith("lm_head"))]
    found["missing"] = sorted(missing + gone)
    found["wrong"].sort(key=lambda w: -w["error"])
    return found


def _files(merged: str) -> dict[str, Path]:
    """Each tensor of the merged model -> its file."""
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for file in sorted(Path(merged).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def _load(files: dict[str, Path], name: str):
    """One tensor as a float32 array."""
    from safetensors import safe_open

    with safe_open(files[name], "pt") as opened:
        return opened.get_tensor(name).float().numpy()


def _error(path, tensor, mine, config: dict, name: str):
    """(largest relative error of a row, how many rows are off), or (None, 0) if the two cannot be laid side by side.

    llama.cpp's converter changes some tensors: it reorders the rows of queries and keys where its rotary embedding
    pairs neighbours, and adds one to Gemma's norms.
    """
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType(tensor.kind)
    if math.prod(tensor.shape) != mine.size:
        return None, 0
    rows = math.prod(tensor.shape[:-1]), *gguf.quant_shape_to_byte_shape(tensor.shape[-1:], kind)
    data = np.fromfile(path, np.uint8, count=math.prod(rows), offset=tensor.start).reshape(rows)
    plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    theirs = data.view(plain) if plain else gguf.dequantize(data, kind)
    theirs = theirs.astype(np.float32).reshape(mine.shape)
    allowed = ROW_ERRORS.get(kind.name, 1.0)
    ways: list[Callable] = [lambda w: w]
    if mine.ndim == 1 and name.endswith("norm.weight"):
        ways.append(lambda w: w + 1)
    heads = {"q_proj": config.get("num_attention_heads"), "k_proj": config.get("num_key_value_heads")}
    for part, count in heads.items():
        if f".{part}." in name and count and mine.shape[0] % (2 * count) == 0:
            ways.append(partial(_paired, heads=count))
    return min((_worst(way(mine), theirs, allowed) for way in ways), key=lambda found: found[0])


def _paired(w, heads: int):
    """Rows in the order in which the rotary embedding of llama.cpp pairs them."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def _worst(mine, theirs, allowed: float) -> tuple[float, int]:
    import numpy as np

    mine, theirs = (a.reshape(1, -1) if a.ndim == 1 else a.reshape(a.shape[0], -1) for a in (mine, theirs))
    scale = float(np.sqrt(np.mean(np.square(mine[: max(1, PIECE // mine.shape[1])])) * mine.shape[1])) or 1.0
    worst, off, step = 0.0, 0, max(1, PIECE // mine.shape[1])
    for at in range(0, mine.shape[0], step):
        a, b = mine[at : at + step], theirs[at : at + step]
        length = np.linalg.norm(a, axis=1)
        errors = np.linalg.norm(a - b, axis=1) / np.maximum(length, 0.05 * scale)  # a row of zeros has no length
        errors[~np.isfinite(errors)] = np.inf
        worst, off = max(worst, float(errors.max())), off + int((errors > allowed).sum())
    return worst, off
