"""GGUF files: written from a model folder, quantized, read, their chat templates rendered, checked.

Native code runs in `kto_core.gguf_native`, in a child process.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from . import child
from .errors import DiskError, ExportError
from .gguf_converter import converter
from .jobs import Progress, no_progress

QUANTS = {"f16": 2.0, "q8_0": 1.07, "q5_k_m": 0.75, "q4_k_m": 0.65}  # bytes a weight, a little more than is written
BOS_PRE = ("llama3", "llama-v3", "llama-bpe")  # BPE tokenizers to which llama.cpp adds a BOS by default
FULL = 20_000_000  # bytes; a disk with less is full


def known(quants) -> list[str]:
    """Names of quantizations (a list, or one comma-separated text; any case) in the order of ``QUANTS``, each once.

    Raises:
        ExportError: an unknown one, or none; it lists those that are known.
    """
    names = quants.split(",") if isinstance(quants, str) else list(quants)
    names = [str(n).strip().lower() for n in names if str(n).strip()]
    if wrong := [n for n in names if n not in QUANTS]:
        raise ExportError(f"Unknown GGUF kind: {', '.join(wrong)}. Known are {', '.join(QUANTS)}.")
    if not names:
        raise ExportError(f"Name at least one GGUF kind: {', '.join(QUANTS)}.")
    return [n for n in QUANTS if n in names]


# ---- writing --------------------------------------------------------------------------------------------------------


def convert(model: Path, out: Path, outtype: str, name: str, *, progress: Progress = no_progress, cancel=None) -> None:
    """Model folder -> GGUF (f32, f16, bf16), beside and renamed.

    Raises:
        ExportError: the converter refuses; with its reason.
        Cancelled: nothing half-made is left.
    """
    script = converter(cancel=cancel)
    progress(0.0, "Converting to GGUF: reading the model…")

    def read(line: str) -> None:
        if found := re.search(r"Writing:\s+(\d+)%", line):
            progress(0.3 + 0.7 * int(found[1]) / 100, f"Converting to GGUF: {found[1]} % written")

    with _beside(out) as part:
        arguments = {"script": str(script), "model": str(model), "out": str(part), "outtype": outtype, "name": name}
        try:
            # offline: it would look for a model card of that name
            env = {"HF_HUB_OFFLINE": "1"}
            child.call("gguf_native", "convert", arguments, what="The conversion to GGUF", cancel=cancel, env=env,
                       on_line=read)  # fmt: skip
        except child.ChildFailed as e:
            _require_room(out.parent)
            raise ExportError(_why_not_converted(e)) from e


def _why_not_converted(e: child.ChildFailed) -> str:
    if "pre-tokenizer was not recognized" in e.tail:
        return (
            "llama.cpp does not know this model's tokenizer, so a GGUF would split text differently than the model "
            "has learned. Train on a model with a known tokenizer to export GGUF; the merged model can be exported."
        )
    return str(e)


def _require_room(folder: Path) -> None:
    """After a failure whose reason may have been a full disk. Raises DiskError if it is full."""
    free = shutil.disk_usage(folder).free
    if free < FULL:
        raise DiskError(f"The disk of {folder} is full ({free / 1e6:.0f} MB are free). Free some space and try again.")


def quantize(source: Path, out: Path, quant: str, *, progress: Progress = no_progress, cancel=None) -> str:
    """f16 (or bf16) GGUF -> ``quant``, beside and renamed. Returns the library that did it. Raises as `convert`."""

    def read(line: str) -> None:
        if found := re.search(r"\[\s*(\d+)\s*/\s*(\d+)\]", line):
            progress(int(found[1]) / int(found[2]), f"Quantizing to {quant}: tensor {found[1]} of {found[2]}")

    progress(0.0, f"Quantizing to {quant}…")
    with _beside(out) as part:
        arguments = {"source": str(source), "out": str(part), "quant": quant, "threads": _threads()}
        try:
            return child.call("gguf_native", "quantize", arguments, what=f"Quantizing to {quant}", cancel=cancel,
                              on_line=read)  # fmt: skip
        except ExportError:
            _require_room(out.parent)
            raise


class _beside:
    """``with _beside(path) as part``: part becomes path at the end, or is removed if the block raises."""

    def __init__(self, path: Path):
        self.path, self.part = path, path.with_name(path.name + ".part")

    def __enter__(self) -> Path:
        self.part.unlink(missing_ok=True)
        return self.part

    def __exit__(self, kind, value, trace) -> None:
        if kind is not None:
            self.part.unlink(missing_ok=True)
            return
        with open(self.part, "rb") as f:
            os.fsync(f.fileno())
        os.replace(self.part, self.path)


def _threads(share: float = 1.0) -> int:
    """What the user allows with OMP_NUM_THREADS, else a share of the cores this process may use."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return int(allowed) if allowed.isdigit() and int(allowed) else max(1, int(share * len(os.sched_getaffinity(0))))


# ---- reading --------------------------------------------------------------------------------------------------------


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


def read_facts(path: str | os.PathLike) -> Facts:
    """The header of a GGUF file.

    Raises:
        ExportError: it is none, or is cut.
    """
    from gguf import GGUFReader

    from .gguf_native import FTYPES

    try:
        found = GGUFReader(path).fields

        def get(name: str, default=None):
            return found[name].contents() if name in found else default

        tokens = found.get("tokenizer.ggml.tokens")
        ids = [get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos", "padding")]
        texts = ["" if i is None or tokens is None else tokens.contents(i) for i in ids]
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
        )
    except (OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError) as e:
        raise ExportError(f"{Path(path).name} is no whole GGUF file ({e}). Create it again.") from e


def render(facts: Facts, messages: list[dict], generation: bool = True) -> str:
    """Messages through the file's own chat template, as transformers renders it (sandboxed).

    Raises:
        ExportError: the file has no template, or it refuses these messages.
    """
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    if not facts.template:
        raise ExportError("This GGUF file has no chat template, so nobody can talk to it. Create it again.")
    try:
        texts, _ = render_jinja_template(
            [messages],
            chat_template=facts.template,
            add_generation_prompt=generation,
            bos_token=facts.bos_text,
            eos_token=facts.eos_text,
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as e:
        raise ExportError(f"The file's chat template does not render: {e}.") from e
    return texts[0]


def prompt_text(facts: Facts, prompt: str) -> str:
    """One user message, ready to be answered."""
    return render(facts, [{"role": "user", "content": prompt}])


def check(path: Path, prompt: str, max_tokens: int, *, progress: Progress = no_progress, cancel=None) -> dict:
    """`gguf_native.check` in a child."""
    # half: llama.cpp's threads wait for each other at every layer, and one that finds its core busy holds up all
    arguments = {"path": str(path), "prompt": prompt, "max_tokens": max_tokens, "threads": _threads(0.5)}
    return child.call(
        "gguf_native", "check", arguments, what="The check in llama.cpp", progress=progress, cancel=cancel
    )
