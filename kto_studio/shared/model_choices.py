"""The models a user can talk to, by id: ``demo``, ``run:ID``, ``base:NAME`` (of a preset), or a typed Hub id.

The browser sends ids, never paths. One model is loaded at a time, in the background. `first_model`: of the default
preset, which Train and Data begin with.
"""

from __future__ import annotations

import re
from pathlib import Path

from kto_core import jobs
from kto_core.errors import KTOError, ModelError, RunError
from kto_core.paths import is_hub_id
from kto_core.plain_text import one_line

from . import live

JOB = "Load "


def signature() -> tuple:
    """Changes when a run appears, goes, or gets an adapter or a checkpoint. Costs nothing where nobody asked before."""
    known = live.runs()
    return str(known.root), known.file_changes


def with_adapter() -> list[tuple[str, str]]:
    """(id, label) of the runs that can be exported or gone on from, newest first."""
    return [(r.id, _label(r, problem)) for r, adapter, _, problem in live.runs().models() if adapter]


def talkable() -> list[tuple[str, str]]:
    """(id, label) of the runs with an adapter or at least a checkpoint, newest first."""
    return [(r.id, _label(r, problem)) for r, _, _, problem in live.runs().models()]


def _label(r, problem: str) -> str:
    return one_line(f"Run {live.runs().title(r)}" + (f" (cannot be read: {problem})" if problem else ""), 200)


def first_model() -> dict:
    """What `Context.chosen_model` begins with: the default preset's."""
    from kto_core.config import resolving

    found = resolving.resolve(None, {}).config
    return {"model": found.model, "max_length": found.max_length}


def choices() -> list[tuple[str, str]]:
    """(label, id) for the Model list: runs first, then the demo, then the presets' models."""
    from kto_core.config import resolving

    runs = [(label, f"run:{name}") for name, label in talkable()]
    names = []
    for values in resolving.presets().values():
        names += [values.get("model"), *(values.get("alternatives") or [])]
    bases = [(name, f"base:{name}") for name in dict.fromkeys(names) if name and name != "demo"]
    return [*runs, ("Demo model (SmolLM2 135M)", "demo"), *bases]


def checkpoints(choice: str | None) -> list[tuple[str, str]]:
    """(label, id) of a run's adapters: the last one, then its checkpoints, newest first."""
    if not (name := _run_id(choice)):
        return []
    found = _find(name)
    rest = [(f"Step {step(p)}", p.name) for p in sorted(found.checkpoints(), key=step, reverse=True)]
    return [("Latest", "")] * bool(found.adapter) + rest


def _run_id(choice: str | None) -> str:
    """The run that an id of this page means, or ""."""
    kind, _, name = (choice or "").strip().partition(":")
    return name if kind == "run" and name and Path(name).name == name and name not in (".", "..") else ""


def _find(name: str):
    from kto_core.runs import folders

    try:
        return folders.find(name)
    except RunError:
        raise RunError(f"Run {name} no longer exists. Choose another.") from None


def gone(choice: str | None) -> bool:
    """Whether the id is one of a run that was deleted."""
    try:
        return bool(name := _run_id(choice)) and not _find(name)
    except RunError:
        return True


def step(checkpoint: Path) -> int:
    digits = re.sub(r"\D", "", Path(checkpoint).name)
    return int(digits) if digits else 0


def label(choice: str) -> str:
    """The name shown for an id."""
    kind, _, name = choice.partition(":")
    return {"run": f"run {name}", "base": name}.get(kind, "the demo model" if choice == "demo" else choice)


def target(choice: str | None) -> str:
    """What `kto_core.chat.chat` loads for an id.

    Raises:
        ModelError: not an id of this page, and not the form of a Hub id.
    """
    choice = (choice or "").strip()
    kind, _, name = choice.partition(":")
    if choice == "demo":
        return choice
    if run_id := _run_id(choice):  # not looked for: its weights may be loaded, although it was deleted
        return run_id
    hub = name if kind == "base" else choice
    if is_hub_id(hub):
        return hub
    raise ModelError("Choose a model from the list, or enter a Hub id as owner/name.")


def origin(choice: str | None, checkpoint: str | None = None) -> tuple[str, str]:
    """(name of the base model, run and checkpoint) of an id, as a row notes them; no path of this machine."""
    from kto_core.models.facts import public_name

    choice = (choice or "").strip()
    run_id = _run_id(choice)
    if not run_id:
        return public_name(choice.removeprefix("base:")) if choice else "", ""
    try:
        model = _find(run_id).config().config.model
    except KTOError:  # deleted, or its settings cannot be read; its weights may be loaded all the same
        model = ""
    name = Path(model).name if Path(model).is_absolute() else public_name(model)
    return name, f"{run_id}/{checkpoint}" if checkpoint else run_id


def loading() -> jobs.Job | None:
    """The newest load, running or ended."""
    found = [j for j in jobs.all_jobs() if j.name.startswith(JOB)]
    return found[-1] if found else None


def load(choice: str | None, checkpoint: str | None = None) -> jobs.Job:
    """Start to load in the background; a load that runs already is returned as it is.

    Raises:
        ModelError: see `target`.
        RunError: the run was deleted.
    """
    from kto_core.chat import chat

    name = target(choice)
    if run_id := _run_id(choice):
        _find(run_id)
    if (job := loading()) and job.running:
        return job
    return jobs.start(
        JOB + label(choice or ""),
        lambda progress, cancel: chat.load(name, checkpoint=checkpoint or None, progress=progress, cancel=cancel),
    )
