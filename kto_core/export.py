"""Give a run to other programs: merge -> GGUF -> check -> Modelfile -> upload.

    RUN/adapter ──▶ exports/merged/  (16-bit safetensors)  ──▶ exports/gguf/NAME-q4_k_m.gguf, Modelfile-q4_k_m ──▶ Hub

Every verb may be called again: what is there and was made of the same adapter and base is used, everything else is made
anew. Files appear under their names only when they are whole; a manifest, written last, says what they were made of.
The work is done in child processes on the CPU: cancel works at any moment, and neither a GPU nor memory stays taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from pathlib import Path

from . import checkpoints, child, hub, model_card, model_info
from . import gguf as ggufs
from . import gguf_converter as converters
from . import modelfile as modelfiles
from .errors import DiskError, ExportError
from .export_checks import only_one, require_disk, require_memory
from .jobs import Progress, check_cancel, no_progress
from .merging import F16_MAX, FACTS

MANIFEST = "manifest.json"  # in exports/gguf: file name -> what it was made of
WHAT = ("adapter", "merged", "gguf")
DEFAULT_QUANT = "q4_k_m"  # made for an upload of GGUF files if there is none
CHECK_TOKENS = 48
FORMAT = 1  # changes when the same inputs would give other files
NOT_UPLOADED = (checkpoints.MANIFEST, FACTS, "README.md")
PICKLES = (".bin", ".pt", ".pth", ".pkl")


# ---- merge ----------------------------------------------------------------------------------------------------------


def merge(run, *, progress: Progress = no_progress, cancel: threading.Event | None = None) -> Path:
    """Merge the run's adapter into its base, in 16 bit: ``exports/merged``. `kto_core.merging` says how and why so.

    Returns:
        The folder: safetensors, configuration, generation configuration, tokenizer, chat template.

    Raises:
        ExportError: the run has no adapter, or the base's quantization cannot be undone.
        DiskError, HardwareError: not enough room or memory, with the numbers.
        ModelError: the base is not there or does not fit the adapter.
        BusyError: another export of this run is going on.
        Cancelled: ``cancel`` was set; nothing half-made is left.
    """
    with only_one(run):
        return _merge(run, progress, cancel)


def _merge(run, progress: Progress, cancel) -> Path:
    adapter, name = _adapter(run), run.config().config.model
    folder = run.path / "exports" / "merged"
    base = model_info.local_folder(name, _stage(progress, 0.0, 0.02), cancel)
    source = _source(adapter, base, cancel)
    if _merge_is_fresh(folder, source, progress, cancel):
        progress(1.0, "The merged model is there already.")
        return folder
    facts = model_info.model_facts(str(base))
    require_disk(run.path, 2.0 * facts.parameters, "The merged model")
    require_memory(facts.parameters, facts.quantized, base)
    checkpoints.clean(folder.parent)
    part = folder.with_name("merged.part")
    part.mkdir()

    def loading(line: str) -> None:
        if found := re.search(r"Loading weights:\s+(\d+)%", line):
            progress(0.02 + 0.38 * int(found[1]) / 100, f"Loading the base model: {found[1]} %")

    try:
        arguments = {
            "base": str(base),
            "adapter": str(adapter),
            "part": str(part),
            "public_base": model_card.base_name(name),
            "facts": {"source": source, "base": model_card.base_name(name), "run": run.id},
        }
        env = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # all is here; the GPU may be somebody else's
        child.call("merging", "merge", arguments, what="The merge", progress=progress, cancel=cancel, env=env,
                   on_line=loading)  # fmt: skip
        if _source(_adapter(run), base, cancel) != source:
            raise ExportError(f"The adapter of {run.id} was replaced during the merge. Merge again.")
        check_cancel(cancel)
        checkpoints.seal(part, progress=_told("Checking the merged model", _stage(progress, 0.98, 1.0)), cancel=cancel)
        checkpoints.put(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    progress(1.0, "Merged.")
    return folder


def _merge_is_fresh(folder: Path, source: str, progress: Progress = no_progress, cancel=None) -> bool:
    if merged_facts(folder).get("source") != source:
        return False
    told = _told("Looking at an earlier merge", lambda _, text: progress(None, text))
    return not checkpoints.problem(folder, progress=told, cancel=cancel)


def merged_facts(folder: Path) -> dict:
    """``export.json`` of a merged folder (see `merging.merge`), or {}."""
    try:
        return json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def gguf(run, quants, *, progress: Progress = no_progress, cancel: threading.Event | None = None) -> list[Path]:
    """GGUF files of the run in ``exports/gguf``; merged first if need be.

    Args:
        quants: of f16, q8_0, q5_k_m, q4_k_m, in any case; a list or one comma-separated text.

    Returns:
        The files, in the order of `gguf.QUANTS`.

    Raises:
        ExportError: an unknown kind, an architecture or a tokenizer that llama.cpp does not know, or it fails.
        DiskError, HardwareError, ModelError, BusyError, Cancelled: as in `merge`.
    """
    names = ggufs.known(quants)
    with only_one(run):
        return _gguf(run, names, progress, cancel)


def _gguf(run, names: list[str], progress: Progress, cancel) -> list[Path]:
    config = run.config().config
    adapter, facts = _adapter(run), model_info.model_facts(config.model)
    converters.require_convertible(facts.architecture)
    base = model_info.local_folder(config.model, _stage(progress, 0.0, 0.02), cancel)
    source, folder = _source(adapter, base, cancel), run.path / "exports" / "gguf"
    paths = {q: folder / f"{_stem(config.model)}-{q}.gguf" for q in ggufs.QUANTS}
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.part"):
        stale.unlink()
    todo = [q for q in names if not _gguf_is_fresh(paths[q], source)]
    if not todo:
        progress(1.0, "The GGUF files are there already.")
        return [paths[q] for q in names]

    converters.require_convertible(facts.architecture, converters.converter(_stage(progress, 0.02, 0.1), cancel))
    have_f16 = _gguf_is_fresh(paths["f16"], source)
    need = sum(ggufs.QUANTS[q] for q in todo) + (0 if have_f16 or "f16" in todo else ggufs.QUANTS["f16"])
    if not _merge_is_fresh(run.path / "exports" / "merged", source, progress, cancel):
        need += 2.0
    require_disk(run.path, need * facts.parameters, "Merged model and GGUF files")
    merged = _merge(run, _stage(progress, 0.1, 0.5), cancel)

    made_of = merged_facts(merged)
    overflow = made_of.get("largest", 0.0) > F16_MAX
    if overflow and "f16" in todo:
        raise ExportError("This model has weights beyond the range of f16. Choose q8_0, q5_k_m or q4_k_m instead.")
    tokens, title = _token_ids(merged), f"{model_card.base_name(config.model).rpartition('/')[2]} KTO"
    keep_f16 = have_f16 or "f16" in todo
    # what the others are made from; without ".gguf" at its end nobody takes it for a result
    f16 = paths["f16"] if keep_f16 else folder / f"{_stem(config.model)}-source.part"
    try:
        if not have_f16:
            stage = _stage(progress, 0.5, 0.8)
            ggufs.convert(merged, f16, "bf16" if overflow else "f16", title, progress=stage, cancel=cancel)
            if keep_f16:
                _record(folder, f16, source, tokens, "convert_hf_to_gguf.py")
        rest = [q for q in todo if q != "f16"]
        for i, quant in enumerate(rest):
            stage = _stage(progress, 0.8 + 0.2 * i / len(rest), 0.8 + 0.2 * (i + 1) / len(rest))
            made_by = ggufs.quantize(f16, paths[quant], quant, progress=stage, cancel=cancel)
            _record(folder, paths[quant], source, tokens, made_by)
    finally:
        if not keep_f16:
            f16.unlink(missing_ok=True)
    progress(1.0, f"Made {', '.join(todo)}.")
    return [paths[q] for q in names]


def _stem(model: str) -> str:
    """File name without the kind: the base's name, without what was done to its weights."""
    name = model_card.base_name(model).rpartition("/")[2]
    name = re.sub(r"(-unsloth)?(-bnb-4bit)?$", "", name, flags=re.IGNORECASE)
    return (re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model") + "-kto"


def _token_ids(merged: Path) -> dict:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged, trust_remote_code=False)
    return {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}


def _records(folder: Path) -> dict:
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _record(folder: Path, file: Path, source: str, tokens: dict, made_by: str) -> None:
    entry = {"source": source, "size": file.stat().st_size, "tokens": tokens, "made_by": made_by}
    part = folder / (MANIFEST + ".part")
    part.write_text(json.dumps(_records(folder) | {file.name: entry}, indent=1))
    os.replace(part, folder / MANIFEST)


def _gguf_is_fresh(file: Path, source: str) -> bool:
    entry = _records(file.parent).get(file.name, {})
    return entry.get("source") == source and file.is_file() and file.stat().st_size == entry.get("size")


def check_gguf(path, prompt: str, *, progress: Progress = no_progress, cancel: threading.Event | None = None) -> dict:
    """Load a GGUF in llama.cpp, ask it ``prompt`` through its own chat template, greedily, at most 48 tokens.

    Returns:
        ``ok`` (it answered, has a template, and its ids are the tokenizer's), ``text``, ``tokens``, ``stopped_at_eos``,
        ``tokens_per_second``, ``file_type``, ``chat_template`` (bool), ``bos``, ``eos``, ``pad`` (ids),
        ``same_token_ids`` (as the merged model's tokenizer has them; None if the file is not one of ours), ``engine``.

    Raises:
        ExportError: there is no such file, it is damaged, or llama.cpp does not run it.
        Cancelled: ``cancel`` was set.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"There is no file {path.name}. Create the GGUF first.")
    if not prompt.strip():
        raise ExportError("Type a question for the check.")
    found = ggufs.check(path, prompt, CHECK_TOKENS, progress=progress, cancel=cancel)
    expected = _records(path.parent).get(path.name, {}).get("tokens")
    same = None if expected is None else expected == {k: found[k] for k in ("bos", "eos", "pad")}
    return {
        "ok": bool(found["tokens"] and found["chat_template"] and same is not False),
        **found,
        "same_token_ids": same,
    }


def modelfile(run, gguf_path) -> Path:
    """Write an Ollama Modelfile beside a GGUF of the run (``Modelfile-q4_k_m``); see `kto_core.modelfile`.

    What Ollama's template language cannot say is in the file as a comment.

    Raises:
        ExportError: no whole GGUF file.
        DiskError: it cannot be written.
    """
    path = Path(gguf_path)
    if not path.is_file():
        raise ExportError(f"Run {run.id} has no file {path.name}. Create the GGUF first.")
    facts = ggufs.read_facts(path)
    target = path.parent / f"Modelfile-{facts.file_type or path.stem}"
    text, _ = modelfiles.write(
        path.name,
        target.name,
        lambda messages, generation=True: ggufs.render(facts, messages, generation),
        bos=facts.bos_text if facts.add_bos else "",  # Ollama puts it there itself
        eos=facts.eos_text,
        dated="strftime_now" in facts.template,
    )
    part = target.with_name(target.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, target)
    except OSError as e:
        raise DiskError(f"{target} cannot be written ({e.strerror or e}).") from e
    return target


# ---- the Hub --------------------------------------------------------------------------------------------------------


def token_present() -> bool:
    """Whether a Hub token is in the environment or was saved by ``hf auth login``."""
    return hub.find_token() is not None


def push(
    run,
    repo: str,
    *,
    what="adapter",
    private: bool = True,
    token: str | None = None,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> str:
    """Upload to ``repo`` (owner/name), with a model card, in one commit. What is missing is made first.

    Args:
        what: "adapter", "merged" or "gguf", or several of them. Beside a merged model the adapter goes into the folder
            ``adapter``: in one folder transformers would apply it a second time.
        private: for a new repository; one that is there and public is refused.
        token: instead of the environment's; never stored.

    Returns:
        The repository's address.

    Raises:
        HubError: no token, refused, or not reachable.
        ExportError, DiskError, …: as in `merge` and `gguf`.
        Cancelled: ``cancel`` was set; nothing is published.
    """
    asked = [what] if isinstance(what, str) else list(what)
    if not asked or (wrong := [w for w in asked if w not in WHAT]):
        raise ExportError(
            f"Cannot upload {', '.join(map(str, wrong)) if asked else 'nothing'}: choose from {', '.join(WHAT)}."
        )
    asked = [w for w in WHAT if w in asked]
    repo, secret = hub.require(repo, token)
    with only_one(run):
        adapter = _adapter(run)
        is_private = hub.prepare(repo, private, secret, progress=progress, cancel=cancel)  # before hours of work
        files, dtype = _to_upload(run, adapter, asked, _stage(progress, 0.0, 0.5), cancel)
        card = model_card.write(
            run, repo, asked, adapter_sha256=_sha256(adapter / "adapter_model.safetensors", cancel),
            files=[name for _, name in files], dtype=dtype,
        )  # fmt: skip
        url = hub.upload(repo, secret, files, card, progress=_stage(progress, 0.5, 1.0), cancel=cancel)
    progress(1.0, f"Uploaded to {repo}, {'private' if is_private else 'public'}.")
    return url


def _to_upload(run, adapter: Path, what: list[str], progress: Progress, cancel) -> tuple[list[tuple[Path, str]], str]:
    """(file, path in the repository) of all there is to send, and the merged weights' dtype."""
    files, dtype = [], ""
    if "gguf" in what:  # first: it asks for room for the merged model as well
        source = _source(adapter, _base(run, cancel), cancel)
        folder = run.path / "exports" / "gguf"
        there = [p for p in sorted(folder.glob("*.gguf")) if _gguf_is_fresh(p, source)]
        for path in there or _gguf(run, [DEFAULT_QUANT], progress, cancel):
            files += [(path, path.name), (made := modelfile(run, path), made.name)]
    if "merged" in what:
        folder = _merge(run, progress, cancel)
        files += _plain_files(folder, "")
    if "adapter" in what:
        files += _plain_files(adapter, "adapter/" if "merged" in what else "")
    if "merged" in what or "gguf" in what:
        dtype = merged_facts(run.path / "exports" / "merged").get("dtype", "")
    return files, dtype


def _plain_files(folder: Path, under: str) -> list[tuple[Path, str]]:
    found = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix not in PICKLES)
    return [(p, under + p.name) for p in found if p.name not in NOT_UPLOADED and not p.name.endswith(".part")]


# ---- shared ---------------------------------------------------------------------------------------------------------


def _adapter(run) -> Path:
    if (adapter := run.adapter) is None:
        raise ExportError(f"Run {run.id} has no finished adapter yet. Let it finish, or resume it.")
    return adapter


def _base(run, cancel) -> Path:
    return model_info.local_folder(run.config().config.model, cancel=cancel)


def _source(adapter: Path, base: Path, cancel: threading.Event | None = None) -> str:
    """What exports are made of, as one hash: the adapter's content, and which files the base has."""
    digest = hashlib.sha256(str(FORMAT).encode())
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        digest.update(_sha256(adapter / name, cancel).encode())
    for file in sorted([*base.glob("*.safetensors"), *base.glob("*.json"), *base.glob("*.jinja")]):
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _sha256(file: Path, cancel: threading.Event | None = None) -> str:
    digest = hashlib.sha256()
    try:
        with open(file, "rb") as f:
            while block := f.read(1 << 22):
                check_cancel(cancel)
                digest.update(block)
        return digest.hexdigest()
    except OSError as e:
        raise ExportError(f"The adapter's {file.name} cannot be read ({e.strerror}). Train or resume the run.") from e


def _told(what: str, progress: Progress) -> Progress:
    """``progress`` that says of what the numbers are."""
    return lambda fraction, text: progress(fraction, f"{what}: {text}")


def _stage(progress: Progress, start: float, end: float) -> Progress:
    """``progress`` for a part of the work, from ``start`` to ``end`` of the whole."""
    return lambda fraction, text: progress(None if fraction is None else start + (end - start) * fraction, text)
