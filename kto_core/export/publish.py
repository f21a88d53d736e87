"""Upload an adapter, a merged model or GGUF files to the Hub."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from kto_core import files
from kto_core.errors import ExportError
from kto_core.guards import bounded
from kto_core.jobs import Progress, no_progress, part_of
from kto_core.paths import cache_dir, is_hub_id
from kto_core.runs.locks import only_one

from . import model_card
from .export import Written, make_gguf, make_merged, modelfile
from .hub import origin, upload
from .hub import private as hidden
from .merging import FACTS
from .sources import Sources, finished_adapter, merged_facts, sha256

WHAT = ("adapter", "merged", "gguf")
DEFAULT_QUANT = "q4_k_m"  # made for an upload of GGUF files if there is none
NOT_UPLOADED = (files.MANIFEST, FACTS, "README.md")
CONFIG = "adapter_config.json"
BASE = "base.json"  # in exports: the Hub id of a base that the run has in a folder
PICKLES = (".bin", ".pt", ".pth", ".pkl")


def token_present() -> bool:
    """Whether a Hub token is in the environment or was saved by ``hf auth login``."""
    return upload.find_token() is not None


def push(
    run,
    repo: str,
    *,
    what="adapter",
    private: bool = True,
    token: str | None = None,
    base: str | None = None,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> str:
    """Upload to ``repo`` (owner/name), with a model card, in one commit. What is missing is made first.

    Args:
        what: "adapter", "merged" or "gguf", or several of them. Beside a merged model the adapter goes into the folder
            ``adapter``: in one folder transformers would apply it a second time.
        private: for a new repository; one that is there with another visibility is refused.
        token: instead of the environment's; never stored.
        base: Hub id of a base model that the run has in a folder; kept for later uploads.

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
    repo, secret = upload.require(repo, token)
    with only_one(run):
        adapter = finished_adapter(run)
        name = public_base(run, base)
        on_hub = name if is_hub_id(name) else ""
        there = upload.prepare(repo, private, secret, on_hub, progress=progress, cancel=cancel)  # before hours of work
        sent, dtype = _to_upload(run, adapter, name, asked, part_of(progress, 0.0, 0.5), cancel)
        sent = hidden.without_paths(sent, _folders(run), run.path / "exports" / "public")
        card = model_card.write(
            run, repo, asked, adapter_sha256=sha256(adapter / "adapter_model.safetensors", cancel),
            files=[name for _, name in sent], dtype=dtype, base=on_hub,
            stated=origin.of_base(run.config().config.model) or there.base,
        )  # fmt: skip
        url = upload.upload(repo, secret, sent, card, new=not there.exists, private=private,
                            progress=part_of(progress, 0.5, 1.0), cancel=cancel)  # fmt: skip
    progress(1.0, f"Uploaded to {repo}, {'private' if private else 'public'}.")
    return url


def public_base(run, given: str | None = None) -> str:
    """What others call the run's base: a Hub id, or of a folder whose id nobody said, its last part.

    Args:
        given: the Hub id of a base in a folder; kept with the run.

    Raises:
        ExportError: ``given`` is no Hub id, or the run's base has another.
    """
    name, file = origin.base_name(run.config().config.model), run.path / "exports" / BASE
    if given is None:
        noted = bounded.read_dict(file).get("base")
        return noted if isinstance(noted, str) and is_hub_id(noted) and not is_hub_id(name) else name
    given = given.strip()
    if not is_hub_id(given):
        raise ExportError("Enter the base model's Hub id as owner/name, for example Qwen/Qwen2.5-7B-Instruct.")
    if is_hub_id(name) and name != given:
        raise ExportError(f"The base model of this run is {name}. Leave its Hub id out.")
    file.parent.mkdir(exist_ok=True)
    files.write_whole(file, json.dumps({"base": given}))
    return given


def _folders(run) -> list[Path]:
    """What of this machine's folders could stand in a file of the run."""
    model = Path(run.config().config.model).expanduser()
    return [run.path, run.path.parent, cache_dir(), Path.home(), *([model, model.parent] if model.is_dir() else [])]


def _to_upload(
    run, adapter: Path, base: str, what: list[str], progress: Progress, cancel
) -> tuple[list[tuple[Path, str]], str]:
    """(file, path in the repository) of all there is to send, and the merged weights' dtype."""
    files, dtype = [], ""
    sources = Sources.of(run, cancel=cancel) if "gguf" in what else None
    if sources is not None:  # first: it asks for room for the merged model as well
        fresh = [p for p in sorted(sources.gguf.glob("*.gguf")) if sources.gguf_is_fresh(p)]
        for path in fresh or make_gguf(run, [DEFAULT_QUANT], progress, cancel, sources):
            written = modelfile(run, path)
            files += [(path, path.name), (written.path, written.path.name)]
        files += _for_ollama(run, written)
    if "merged" in what:
        folder = make_merged(run, progress, cancel, sources)
        files += _plain_files(folder, "")
    if "adapter" in what:
        files += _adapter_files(run, adapter, base, "adapter/" if "merged" in what else "")
    if "merged" in what or "gguf" in what:
        dtype = merged_facts(run.path / "exports" / "merged").get("dtype", "")
    return files, dtype


def _for_ollama(run, written: Written) -> list[tuple[Path, str]]:
    """The files that Ollama reads from a repository: all GGUF files of a run have the same template."""
    folder = run.path / "exports" / "ollama"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in written.made.hub_files().items():
        files.write_whole(folder / name, text)
    return [(folder / name, name) for name in written.made.hub_files()]


def _adapter_files(run, adapter: Path, name: str, under: str) -> list[tuple[Path, str]]:
    """An adapter's files; its configuration names the base as others know it, and no folder of this machine."""
    found = _plain_files(adapter, under)
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    if config.get("base_model_name_or_path") == name:
        return found
    public = run.path / "exports" / CONFIG
    public.parent.mkdir(exist_ok=True)
    files.write_whole(public, json.dumps(config | {"base_model_name_or_path": name}, indent=2, sort_keys=True))
    return [(public if path.name == CONFIG else path, target) for path, target in found]


def _plain_files(folder: Path, under: str) -> list[tuple[Path, str]]:
    found = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix not in PICKLES)
    return [(p, under + p.name) for p in found if p.name not in NOT_UPLOADED and not p.name.endswith(".part")]
