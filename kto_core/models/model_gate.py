"""What of a model's folder the libraries may open: safetensors, known JSON, tokenizer files. Nothing else.

A model may come from anybody. Before transformers, PEFT or Unsloth see a folder it passes `opened`: weights are plain
``*.safetensors`` files of the folder itself and are what their headers say; keys of the configuration that choose code
are dropped. No torch, no transformers.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from kto_core.errors import DiskError, ModelError
from kto_core.paths import cache_dir

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model*", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
SETTINGS = ("config.json", "generation_config.json")
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")  # for merged models
CLEANED = (*SETTINGS, "tokenizer_config.json", "special_tokens_map.json")  # keys in these may choose code
MAX_JSON = 256 * 2**20  # bytes; the largest tokenizer.json known has 35 MB
CODE_KEYS = frozenset({
    "_attn_implementation", "_attn_implementation_internal", "attn_implementation",
    "_experts_implementation", "_experts_implementation_internal", "experts_implementation",
    "auto_map", "auto_mapping", "custom_generate", "custom_pipelines", "trust_remote_code",
    "kernel_config", "use_kernels", "transformers_weights",
    "tokenizer_file", "vocab_file", "merges_file", "spm_file", "chat_template_file",
})  # fmt: skip
PLAIN = ("F64", "F32", "F16", "BF16")  # dtypes of weights that have the model's own shapes; packed ones have others
QUANTIZATIONS = ("bitsandbytes", "mxfp4")  # the others need packages of their own
FOREIGN = ("adapter_config.json",)  # an adapter inside a model's folder would be put on it without a word


def wanted(name: str) -> bool:
    """Whether a file of a Hub repository is fetched; its weights are named by `weight_names`."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in (*SETTINGS, *PROCESSOR, *TOKENIZER, INDEX))


# ---- JSON -----------------------------------------------------------------------------------------------------------


def read_object(file: Path) -> dict:
    """A JSON file that holds one object.

    Raises:
        ModelError: it cannot be read, or holds something else.
    """
    try:
        if file.stat().st_size > MAX_JSON:
            raise ValueError(f"it has more than {MAX_JSON // 2**20} MiB")
        found = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ModelError(f"{file.name} of {file.parent.name} is nested too deeply. Choose another model.") from None
    except (OSError, ValueError) as e:
        reason = str(e)[:200]
        raise ModelError(
            f"The {file.name} of {file.parent.name} cannot be read ({reason}). Download it again, or choose "
            "another model."
        ) from e
    if not isinstance(found, dict):
        raise ModelError(
            f"The {file.name} of {file.parent.name} holds a {type(found).__name__} instead of settings by name. "
            "Choose another model."
        )
    return found


def clean(value, dropped: list[str], above: str = ""):
    """``value`` without the keys that choose code, at any depth; their names go into ``dropped``."""
    if isinstance(value, dict):
        kept = {}
        for key, inner in value.items():
            if key in CODE_KEYS:
                if inner is not None:
                    dropped.append(above + key)
                continue
            kept[key] = clean(inner, dropped, f"{above}{key}.")
        return kept
    if isinstance(value, list):
        return [clean(inner, dropped, above) for inner in value]
    return value


def dropped(folder: Path) -> list[str]:
    """What `opened` takes away from a folder, as ``file: key``; empty for most models."""
    out = []
    for name in CLEANED:
        if (folder / name).is_file():
            keys: list[str] = []
            clean(read_object(folder / name), keys)
            out += [f"{name}: {key}" for key in dict.fromkeys(keys)]
    return out + [name for name in FOREIGN if (folder / name).exists()]


# ---- weights --------------------------------------------------------------------------------------------------------


def plain_name(name: object) -> bool:
    """Whether ``name`` is a safetensors file beside the index, not a path."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not name.startswith(".")
        and name.isprintable()
        and not set(name) & set("/\\:")
    )


def weight_names(folder: Path) -> set[str]:
    """Names of a model's weight files: one file, or those of its index; empty without either.

    Raises:
        ModelError: the index is broken, or names something else than safetensors files beside it.
    """
    single = os.path.lexists(folder / SINGLE)
    if single or not (folder / INDEX).is_file():  # as transformers chooses
        return {SINGLE} if single else set()
    weight_map = read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"The {INDEX} of {folder.name} names no weights. Download the model again, or choose another.")
    if wrong := [n for n in weight_map.values() if not plain_name(n)]:
        raise ModelError(
            f"The {INDEX} of {folder.name} names {str(wrong[0])[:100]!r}, which is not a safetensors file in the "
            "same folder. Other formats can carry code and are never read: choose another model."
        )
    return set(weight_map.values())


def tensors_of(folder: Path) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Name -> (file, dtype, shape) of each tensor in a folder's safetensors files. Raises as `tensor_header`."""
    return {n: (file, *found) for file in weight_names(folder) for n, found in tensor_header(folder / file).items()}


def tensor_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of each tensor in a safetensors file; no weights are read.

    Raises:
        ModelError: it is no whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as f:
            parts = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 - no dict
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as e:
        reason = " ".join(str(e).split())[:200]
        raise ModelError(
            f"{file.name} of {file.parent.name} is not a complete safetensors file ({reason}). Download it again."
        ) from e


def require_inside(file: Path) -> None:
    """Whether a file lies in its folder, or where the Hub's cache keeps the files of a snapshot.

    Raises:
        ModelError: it is a link that leads elsewhere.
    """
    folder = file.parent.resolve()
    places = {folder}
    if folder.parent.name == "snapshots":
        places.add(folder.parents[1] / "blobs")
    try:
        inside = file.resolve(strict=True).parent in places
    except (OSError, RuntimeError):  # a link to nothing, or to itself
        inside = False
    if not inside or not file.is_file():
        raise ModelError(
            f"{file.name} in {file.parent.name} is a link to another place. Put the file itself there: a model may "
            "not reach outside its folder."
        )


def _require_weights(folder: Path) -> None:
    """The files are there, are safetensors, and each has the tensors that the index says."""
    names = weight_names(folder)
    if not names:
        raise ModelError(
            f"{folder.name} has no safetensors weights, and other formats are not safe to load. Choose another model."
        )
    indexed: dict[str, set[str]] = {}
    if names != {SINGLE}:
        for tensor, name in read_object(folder / INDEX)["weight_map"].items():
            indexed.setdefault(name, set()).add(tensor)
    for name in sorted(names):
        if not os.path.lexists(folder / name):
            raise ModelError(f"{folder.name} lacks {name}, which its index names. Download the model again.")
        require_inside(folder / name)
        lacking = indexed.get(name, set()) - tensor_header(folder / name).keys()
        if lacking:
            raise ModelError(
                f"{len(lacking)} weights that the index of {folder.name} names are not in {name} "
                f"({sorted(lacking)[0][:100]}…). Download the model again, or choose another."
            )


# ---- the way in -----------------------------------------------------------------------------------------------------


def opened(folder: Path, *, weights: bool = True) -> Path:
    """The folder that libraries are given: ``folder`` itself, or a copy of its settings without what may not be there.

    Args:
        weights: look at the weight files, too; else only settings and tokenizer are meant to be read.

    Returns:
        ``folder``, or a folder in the cache with links to its files, where `dropped` names something.

    Raises:
        ModelError: a file is not what it has to be; one sentence which.
        DiskError: the cache cannot be written.
    """
    if folder.parent.parent == _copies():  # has passed
        return folder
    names = [p.name for p in folder.iterdir() if any(fnmatch.fnmatchcase(p.name, n) for n in (*SETTINGS, *TOKENIZER))]
    for name in names:
        require_inside(folder / name)
    if weights:
        _require_weights(folder)
        names += [*weight_names(folder), *([INDEX] if (folder / INDEX).is_file() else [])]
    if "config.json" in names:
        _require_known_quantization(folder)
    return _copy(folder, names, weights) if dropped(folder) else folder


def _require_known_quantization(folder: Path) -> None:
    def methods(value):
        if isinstance(value, dict):
            if found := value.get("quantization_config"):
                known = isinstance(found, dict) and found.get("quant_method", "bitsandbytes")
                yield known if isinstance(known, str) else str(found)
            for inner in value.values():
                yield from methods(inner)

    if wrong := next((m for m in methods(read_object(folder / "config.json")) if m not in QUANTIZATIONS), None):
        raise ModelError(
            f"The weights of {folder.name} are quantized as {wrong[:60]!r}, which cannot be loaded here. Choose plain "
            f"weights, or {' or '.join(QUANTIZATIONS)}."
        )


def _copies() -> Path:
    return cache_dir() / "models"


def _copy(folder: Path, names: list[str], weights: bool) -> Path:
    """A folder of the same name in the cache: settings without the dropped keys, links to the other files."""
    stamp = [(n, s.st_size, s.st_mtime_ns, s.st_ino) for n in sorted(names) if (s := (folder / n).stat())]
    key = hashlib.sha256(repr((str(folder.resolve()), weights, sorted(CODE_KEYS), stamp)).encode()).hexdigest()[:24]
    home = _copies() / key / (folder.name or "model")
    if home.is_dir():
        return home
    try:
        _copies().mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(suffix=".part", dir=_copies()))
        inner = part / home.name
        inner.mkdir()
        for name in names:
            if name in CLEANED:
                kept = clean(read_object(folder / name), [])
                (inner / name).write_text(json.dumps(kept, indent=1), encoding="utf-8")
            else:
                (inner / name).symlink_to((folder / name).resolve())
        try:
            os.replace(part, home.parent)
        except OSError:  # another thread or process was first
            shutil.rmtree(part, ignore_errors=True)
            if not home.is_dir():
                raise
    except OSError as e:
        raise DiskError.of(_copies(), e) from e
    return home
