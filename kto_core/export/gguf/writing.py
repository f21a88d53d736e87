"""GGUF files written: from a model folder, and quantized. Native code runs in `native`, in a child process."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from kto_core.errors import DiskError, ExportError
from kto_core.files import beside
from kto_core.guards import child
from kto_core.jobs import Progress, no_progress

from .converter import converter

# Kinds of files: bytes a weight, a little more than is written, where rows are multiples of 256 weights; and where they
# are not, since llama.cpp then stores them in a wider type. Kinds that need an importance matrix are not here: cyllama
# cannot take one (llama.cpp refuses iq2_m without).
QUANTS = {
    "f16": 2.0, "q8_0": 1.07, "q6_k": 0.85, "q5_k_m": 0.75, "q4_k_m": 0.65, "iq4_xs": 0.58, "q3_k_m": 0.54,
    "q2_k": 0.46,
}  # fmt: skip
WIDER = {"q6_k": 1.07, "q5_k_m": 0.87, "q4_k_m": 0.81, "iq4_xs": 0.75, "q3_k_m": 0.75, "q2_k": 0.75}
FTYPES = {  # llama.h: enum llama_ftype
    "f16": 1, "q8_0": 7, "q2_k": 10, "q3_k_m": 12, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18, "iq4_xs": 30,
}  # fmt: skip
ROW = 256  # weights of a block of the k and i types
FULL = 20_000_000  # bytes; a disk with less is full


def per_weight(quant: str, *widths: int) -> float:
    """Bytes a weight of a kind, for a model whose rows have these numbers of weights (none: unknown)."""
    return WIDER.get(quant, QUANTS[quant]) if any(w % ROW for w in widths) else QUANTS[quant]


def known(quants) -> list[str]:
    """Names of quantizations (a list, or one comma-separated text; any case) in the order of ``QUANTS``, each once.

    Raises:
        ExportError: an unknown one, or none; it lists those that are known.
    """
    names = quants.split(",") if isinstance(quants, str) else list(quants)
    names = [str(n).strip().lower() for n in names if str(n).strip()]
    if wrong := [n for n in names if n not in QUANTS]:
        raise ExportError(f"Unknown GGUF type: {', '.join(wrong)}. Choose from {', '.join(QUANTS)}.")
    if not names:
        raise ExportError(f"Name at least one GGUF type: {', '.join(QUANTS)}.")
    return [n for n in QUANTS if n in names]


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

    with beside(out, sync=True) as part:
        arguments = {"script": str(script), "model": str(model), "out": str(part), "outtype": outtype, "name": name}
        try:
            # offline: it would look for a model card of that name
            env = {"HF_HUB_OFFLINE": "1"}
            what = "The conversion to GGUF"
            child.call("export.gguf.native", "convert", arguments, what=what, cancel=cancel, env=env, on_line=read)
        except child.ChildFailed as e:
            _require_room(out.parent)
            raise ExportError(_why_not_converted(e)) from e


def _why_not_converted(e: child.ChildFailed) -> str:
    if "pre-tokenizer was not recognized" in e.tail:
        return (
            "llama.cpp does not know this model's tokenizer, so a GGUF file would tokenize text differently from the "
            "model. Export the merged model instead, or train a model with a supported tokenizer."
        )
    return str(e)


def _require_room(folder: Path) -> None:
    """After a failure whose reason may have been a full disk. Raises DiskError if it is full."""
    free = shutil.disk_usage(folder).free
    if free < FULL:
        raise DiskError(f"The disk of {folder} is full ({free / 1e6:.0f} MB free). Free up disk space and try again.")


def quantize(source: Path, out: Path, quant: str, *, progress: Progress = no_progress, cancel=None) -> str:
    """f16 (or bf16) GGUF -> ``quant``, beside and renamed. Returns the library that did it. Raises as `convert`."""

    def read(line: str) -> None:
        if found := re.search(r"\[\s*(\d+)\s*/\s*(\d+)\]", line):
            progress(int(found[1]) / int(found[2]), f"Quantizing to {quant}: tensor {found[1]} of {found[2]}")

    progress(0.0, f"Quantizing to {quant}…")
    with beside(out, sync=True) as part:
        arguments = {"source": str(source), "out": str(part), "quant": quant, "threads": threads()}
        try:
            return child.call("export.gguf.native", "quantize", arguments, what=f"Quantizing to {quant}", cancel=cancel,
                              on_line=read)  # fmt: skip
        except ExportError:
            _require_room(out.parent)
            raise


def threads(share: float = 1.0) -> int:
    """What the user allows with OMP_NUM_THREADS, else a share of the cores this process may use."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return int(allowed) if allowed.isdigit() and int(allowed) else max(1, int(share * len(os.sched_getaffinity(0))))
