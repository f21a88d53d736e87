"""Give a run to other programs: merge -> GGUF -> check -> Modelfile -> upload.

    RUN/adapter ──▶ exports/merged/  (16-bit safetensors)  ──▶ exports/gguf/NAME-q4_k_m.gguf, Modelfile-q4_k_m ──▶ Hub

Every verb may be called again: what is there and was made of the same adapter and base is used, everything else is made
anew. Files appear under their names only when they are whole; a manifest, written last, says what they were made of.
The work is done in child processes on the CPU: cancel works at any moment, and neither a GPU nor memory stays taken.
"""

from __future__ import annotations

import re
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from kto_core import files
from kto_core.errors import DiskError, ExportError
from kto_core.guards import bounded, child
from kto_core.jobs import Progress, check_cancel, named, no_progress, part_of
from kto_core.models import facts as model_info
from kto_core.models.adapter_gate import require_adapter
from kto_core.runs.locks import only_one

from .checks import require_disk, require_memory
from .gguf import comparing, header, proof, writing
from .gguf import converter as converters
from .hub import origin
from .merge.rounding import F16_MAX
from .merge.shards import STATE
from .ollama.modelfile import Modelfile
from .ollama.modelfile import make as make_modelfile
from .ollama.parameters import context, sampling
from .sources import Sources, finished_adapter, key_of, merged_facts, note, records

QUESTION = "What is the capital of France?"  # of a check, where nobody asks another


# ---- merge ----------------------------------------------------------------------------------------------------------


def merge(run, *, progress: Progress = no_progress, cancel: threading.Event | None = None) -> Path:
    """Merge the run's adapter into its base, in 16 bit: ``exports/merged``. `merging` says how and why so.

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
        return make_merged(run, progress, cancel)


def make_merged(run, progress: Progress, cancel, sources: Sources | None = None) -> Path:
    """`merge` for a caller that holds `only_one(run)` already, and may know the ``sources``."""
    sources = sources or Sources.of(run, part_of(progress, 0.0, 0.02), cancel)
    adapter, base, folder, name = sources.adapter, sources.base, sources.merged, run.config().config.model
    if sources.merge_is_fresh(progress, cancel):
        progress(1.0, "The merged model already exists.")
        return folder
    facts = model_info.model_facts(str(base))
    require_adapter(adapter, name)
    require_memory(base, adapter, facts)
    part = folder.with_name("merged.part")
    resumed = bounded.read_dict(part / STATE).get("source") == sources.key  # of a merge that was killed
    files.clean(folder.parent, keep=part if resumed else None)
    have = sum(p.stat().st_size for p in part.glob("*.safetensors"))
    require_disk(run.path, 2.0 * facts.parameters - have, "The merged model")
    part.mkdir(exist_ok=True)

    def loading(line: str) -> None:
        if found := re.search(r"Loading weights:\s+(\d+)%", line):
            progress(0.02 + 0.38 * int(found[1]) / 100, f"Loading the base model: {found[1]} %")

    try:
        arguments = {
            "base": str(base),
            "adapter": str(adapter),
            "part": str(part),
            "public_base": origin.base_name(name),
            "facts": {"source": sources.key, "base": origin.base_name(name), "run": run.id},
        }
        env = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # all is here; the GPU may be somebody else's
        child.call("export.merging", "merge", arguments, what="The merge", progress=progress, cancel=cancel, env=env,
                   on_line=loading)  # fmt: skip
        if key_of(finished_adapter(run), base, cancel) != sources.key:
            raise ExportError(f"The adapter of {run.id} changed during the merge. Merge again.")
        check_cancel(cancel)
        files.seal(part, progress=named("Verifying the merged model", part_of(progress, 0.98, 1.0)), cancel=cancel)
        files.move_into_place(part, folder)
    except child.ChildFailed:  # killed, most likely: what it has finished is used by the next merge
        for half in part.glob("*.part"):
            half.unlink(missing_ok=True)
        raise
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    progress(1.0, "Merged.")
    return folder


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def gguf(run, quants, *, progress: Progress = no_progress, cancel: threading.Event | None = None) -> list[Path]:
    """GGUF files of the run in ``exports/gguf``; merged first if need be.

    Args:
        quants: of `gguf.writing.QUANTS`, in any case; a list or one comma-separated text.

    Returns:
        The files, in the order of `gguf.writing.QUANTS`.

    Raises:
        ExportError: an unknown kind, an architecture or a tokenizer that llama.cpp does not know, or it fails.
        DiskError, HardwareError, ModelError, BusyError, Cancelled: as in `merge`.
    """
    names = writing.known(quants)
    with only_one(run):
        return make_gguf(run, names, progress, cancel)


def make_gguf(run, names: list[str], progress: Progress, cancel, sources: Sources | None = None) -> list[Path]:
    """`gguf` for a caller that holds `only_one(run)` already, and may know the ``sources``."""
    config = run.config().config
    finished_adapter(run)  # what is missing at all is said before what cannot be converted
    facts = model_info.model_facts(config.model)
    converters.require_convertible(facts.architecture)
    sources = sources or Sources.of(run, part_of(progress, 0.0, 0.02), cancel)
    folder = sources.gguf
    paths = {q: folder / f"{_stem(config.model)}-{q}.gguf" for q in writing.QUANTS}
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.part"):
        stale.unlink()
    todo = [q for q in names if not sources.gguf_is_fresh(paths[q])]
    if not todo:
        progress(1.0, "The GGUF files already exist.")
        return [paths[q] for q in names]

    converters.require_convertible(facts.architecture, converters.converter(part_of(progress, 0.02, 0.1), cancel))
    have_f16 = sources.gguf_is_fresh(paths["f16"])
    rows = facts.shape.hidden, facts.shape.intermediate
    need = sum(writing.per_weight(q, *rows) for q in todo) + (0 if have_f16 or "f16" in todo else writing.QUANTS["f16"])
    if not sources.merge_is_fresh(progress, cancel):
        need += 2.0
    require_disk(run.path, need * facts.parameters, "Merged model and GGUF files")
    merged = make_merged(run, part_of(progress, 0.1, 0.5), cancel, sources)

    made_of = merged_facts(merged)
    overflow = made_of.get("largest", 0.0) > F16_MAX
    if overflow and "f16" in todo:
        raise ExportError("Some weights of this model exceed the range of f16. Choose another type.")
    title = f"{origin.base_name(config.model).rpartition('/')[2]} KTO"
    keep_f16 = have_f16 or "f16" in todo
    # what the others are made from; without ".gguf" at its end nobody takes it for a result
    f16 = paths["f16"] if keep_f16 else folder / f"{_stem(config.model)}-source.part"
    try:
        if not have_f16:
            stage = part_of(progress, 0.5, 0.8)
            writing.convert(merged, f16, "bf16" if overflow else "f16", title, progress=stage, cancel=cancel)
            if keep_f16:
                sources.record(f16, "convert_hf_to_gguf.py")
        rest = [q for q in todo if q != "f16"]
        for i, quant in enumerate(rest):
            stage = part_of(progress, 0.8 + 0.2 * i / len(rest), 0.8 + 0.2 * (i + 1) / len(rest))
            made_by = writing.quantize(f16, paths[quant], quant, progress=stage, cancel=cancel)
            sources.record(paths[quant], made_by)
    finally:
        if not keep_f16:
            f16.unlink(missing_ok=True)
    progress(1.0, f"Created {', '.join(todo)}.")
    return [paths[q] for q in names]


def _stem(model: str) -> str:
    """File name without the kind: the base's name, without what was done to its weights."""
    name = origin.base_name(model).rpartition("/")[2]
    name = re.sub(r"(-unsloth)?(-bnb-4bit)?$", "", name, flags=re.IGNORECASE)
    return (re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model") + "-kto"


def gguf_and_check(
    run, quants, question: str = QUESTION, *, progress: Progress = no_progress, cancel: threading.Event | None = None
) -> list[dict]:
    """`gguf`, a Modelfile for each file, and `check_gguf` of each.

    Returns:
        For each file {path, bytes, modelfile, remarks, check}; ``remarks``: what Ollama does otherwise (`modelfile`).
    """
    files = gguf(run, quants, progress=part_of(progress, 0.0, 0.6), cancel=cancel)
    made: list[dict] = []
    for i, path in enumerate(files):
        stage = part_of(progress, 0.6 + 0.4 * i / len(files), 0.6 + 0.4 * (i + 1) / len(files))
        written = modelfile(run, path)
        verdict = check_gguf(path, question, progress=named(f"Checking {path.name}", stage), cancel=cancel)
        about = {"path": path, "bytes": path.stat().st_size, "modelfile": written.path, "remarks": written.remarks}
        made.append(about | {"check": verdict})
    failed = [m["path"].name for m in made if not m["check"]["ok"]]
    progress(1.0, f"The check of {', '.join(failed)} failed." if failed else "Created and checked.")
    return made


def check_gguf(path, prompt: str, *, progress: Progress = no_progress, cancel: threading.Event | None = None) -> dict:
    """Compare a GGUF file with the merged model of its run, and let it answer ``prompt``; `gguf.proof.prove` says how.

    The verdict is kept in the manifest of the folder.

    Returns:
        As `gguf.proof.prove`. ``ok`` is False if anything differs that no rounding explains.

    Raises:
        ExportError: there is no such file, it is damaged, or llama.cpp does not run it.
        Cancelled: ``cancel`` was set.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"{path.name} does not exist. Create the GGUF file first.")
    if not prompt.strip():
        raise ExportError("Enter a question for the check.")
    entry = records(path.parent).get(path.name, {})
    key, merged = entry.get("source", ""), path.parent.parent / "merged"
    same = key and merged_facts(merged).get("source") == key
    found = proof.prove(
        path, prompt, merged=merged if same else None, key=key, kind=_kind(path), progress=progress, cancel=cancel
    )
    if entry:
        note(path, check={k: found[k] for k in ("ok", "problems", "agreement")})
    return found


def compare(
    run, paths, question: str = QUESTION, *, progress: Progress = no_progress, cancel: threading.Event | None = None
) -> list[dict]:
    """Size, agreement, KL divergence and speed of GGUF files of a run, and which one we would take; the smallest last.

    Returns:
        As `gguf.comparing.compare`.

    Raises:
        ExportError: no file, the merged model they were made from is not there, or llama.cpp does not run one.
        Cancelled: ``cancel`` was set.
    """
    merged = run.path / "exports" / "merged"
    key = merged_facts(merged).get("source")
    made = [path for path in map(Path, paths) if key and records(path.parent).get(path.name, {}).get("source") == key]
    if not made:
        raise ExportError(
            f"Run {run.id} has no GGUF files to compare with its merged model. Create them first: export gguf {run.id}."
        )
    made.sort(key=lambda path: -path.stat().st_size)
    found = comparing.compare(made, question, merged=merged, key=str(key), progress=progress, cancel=cancel)
    progress(1.0, "Compared.")
    return found


def _kind(path: Path) -> str:
    """What a file of ours is to be, by its name."""
    return next((kind for kind in writing.QUANTS if path.stem.lower().endswith(f"-{kind}")), "")


def modelfile(run, gguf_path) -> Written:
    """Write an Ollama Modelfile beside a GGUF of the run (``Modelfile-q4_k_m``); see `kto_core.export.ollama`.

    What Ollama will do otherwise than the model's own template is in its remarks, in the file as comments, and in the
    manifest of the folder.

    Raises:
        ExportError: no whole GGUF file.
        DiskError: it cannot be written.
    """
    path = Path(gguf_path)
    if not path.is_file():
        raise ExportError(f"Run {run.id} has no file {path.name}. Create the GGUF file first.")
    facts, config = header.read_facts(path), run.config().config
    target = path.parent / f"Modelfile-{facts.file_type or path.stem}"
    sampled = sampling(bounded.read_dict(path.parent.parent / "merged" / "generation_config.json"), facts.sampling)
    made = make_modelfile(
        lambda messages, generation=True, tools=None: header.render(facts, messages, generation, tools),
        bos=facts.bos_text if facts.add_bos else "",  # Ollama puts it there itself
        eos=facts.eos_text,
        dated="strftime_now" in facts.template,
        parameters=sampled | {"num_ctx": context(config.max_length, facts.context)},
        license=origin.name_of(origin.of_base(config.model)),
    )
    try:
        files.write_whole(target, made.text(path.name, target.name))
        if path.name in records(path.parent):
            note(path, remarks=made.remarks)
    except OSError as e:
        raise DiskError(f"{target} is not writable ({e.strerror or e}).") from e
    return Written(target, made)


@dataclass(frozen=True)
class Written:
    """A Modelfile at ``path``, and what it says."""

    path: Path
    made: Modelfile

    @property
    def remarks(self) -> list[str]:
        return self.made.remarks
