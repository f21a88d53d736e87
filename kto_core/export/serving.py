"""Commands that serve what a run has exported, on this machine: right for these files, to be copied into a shell."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from kto_core.models.facts import public_name

from .model_use import rank_of, vllm_adapter
from .sources import finished_adapter, merged_facts


@dataclass(frozen=True)
class Command:
    """``program``: who serves; ``what``: "adapter", "merged", or a file's name; ``text``: one line for a shell."""

    program: str
    what: str
    text: str


def commands(run) -> list[Command]:
    """For each thing of the run that is there: GGUF files first, then the merged model, then the adapter.

    Raises:
        ExportError: the run has no adapter yet.
    """
    adapter = finished_adapter(run)
    exports, base = run.path.resolve() / "exports", public_name(run.config().config.model)
    found = []
    for file in sorted((exports / "gguf").glob("*.gguf")):
        path = shlex.quote(str(file))
        made_by = file.parent / f"Modelfile-{file.stem.rpartition('-')[2]}"
        if made_by.is_file():
            name = shlex.quote(re.sub(r"[^a-z0-9_.-]+", "-", file.stem.lower()).strip("-.") or "model")
            text = f"ollama create {name} -f {shlex.quote(str(made_by))} && ollama run {name}"
            found.append(Command("Ollama", file.name, text))
        found.append(Command("llama.cpp", file.name, f"llama-server -m {path}"))
        found.append(Command("LM Studio", file.name, f"lms import --copy {path}"))
    if merged_facts(exports / "merged"):
        found.append(Command("vLLM", "merged", f"vllm serve {shlex.quote(str(exports / 'merged'))}"))
    place, name = shlex.quote(str(adapter.resolve())), shlex.quote(run.id)
    found.append(Command("vLLM", "adapter", vllm_adapter(shlex.quote(base), name, place, rank_of(adapter))))
    return found
