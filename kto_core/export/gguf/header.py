"""What a GGUF file says of itself: its header, and its chat template rendered."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kto_core.errors import ExportError, ModelError

from . import layout
from .writing import FTYPES

BOS_PRE = ("llama3", "llama-v3", "llama-bpe")  # BPE tokenizers to which llama.cpp adds a BOS by default
SAMPLING = "general.sampling."


@dataclass(frozen=True, slots=True)
class Facts:
    """What a GGUF file says of itself; ids are None where it does not name the token."""

    name: str
    architecture: str
    file_type: str  # "f16", "q4_k_m", …, or "" if it is another one
    template: str
    bos: int | None
    eos: int | None
    pad: int | None
    bos_text: str
    eos_text: str
    add_bos: bool  # llama.cpp and Ollama put a BOS before the text
    pre: str
    context: int | None = None  # tokens that the model was made for
    sampling: dict[str, float | int] = field(default_factory=dict)  # the model's own, by llama.cpp's names


def read_facts(path: str | os.PathLike) -> Facts:
    """The header of a GGUF file.

    Raises:
        ExportError: it is none, or is cut.
    """
    try:
        found = layout.read(path).fields
        get: Callable = found.get
        tokens = get("tokenizer.ggml.tokens") or []
        ids = [get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos", "padding")]
        texts = [tokens[i] if i is not None and i < len(tokens) else "" for i in ids]
        pre = str(get("tokenizer.ggml.pre", ""))
        types = {number: name for name, number in FTYPES.items()}
        return Facts(
            name=str(get("general.name", "")),
            architecture=str(get("general.architecture", "")),
            file_type=types.get(get("general.file_type"), ""),
            template=str(get("tokenizer.chat_template", "")),
            bos=ids[0],
            eos=ids[1],
            pad=ids[2],
            bos_text=texts[0],
            eos_text=texts[1],
            # what llama.cpp does where the file does not say
            add_bos=bool(get("tokenizer.ggml.add_bos_token", get("tokenizer.ggml.model") == "llama" or pre in BOS_PRE)),
            pre=pre,
            context=get(f"{get('general.architecture', '')}.context_length"),
            sampling={k.removeprefix(SAMPLING): v for k, v in found.items() if k.startswith(SAMPLING)},
        )
    except (OSError, ValueError, MemoryError) as e:
        raise ExportError(f"{Path(path).name} is not a complete GGUF file ({e}). Create it again.") from e


def render(facts: Facts, messages: list[dict], generation: bool = True, tools: list[dict] | None = None) -> str:
    """Messages through the file's own chat template, as transformers renders it, sandboxed and bounded.

    Raises:
        ExportError: the file has no template, or it refuses these messages.
    """
    import jinja2

    from kto_core.data.rendering.bounded_template import render as rendered

    if not facts.template:
        raise ExportError("This GGUF file has no chat template, so it cannot be used for chat. Create it again.")
    tokens = {"bos_token": facts.bos_text, "eos_token": facts.eos_text}
    try:
        return rendered(facts.template, messages, tools, generation, **tokens)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, ModelError) as e:
        raise ExportError(f"The file's chat template cannot be rendered: {e}.".replace("..", ".")) from e


def prompt_text(facts: Facts, prompt: str) -> str:
    """One user message, ready to be answered."""
    return render(facts, [{"role": "user", "content": prompt}])
