"""What the Export tab shows, as pure functions over a run's folder. A file's id is its path below that folder."""

from __future__ import annotations

import html
import shutil
from pathlib import Path

from kto_core.errors import ExportError
from ui.jobs_view import duration

QUANTS = (  # id, label, bytes a weight
    ("q4_k_m", "q4_k_m (small, the usual choice)", 0.61),
    ("q5_k_m", "q5_k_m (a little better, a little bigger)", 0.72),
    ("q8_0", "q8_0 (nearly the original)", 1.07),
    ("f16", "f16 (the original precision)", 2.0),
)
WHAT = (("Adapter", "adapter"), ("Merged model", "merged"), ("GGUF files", "gguf"))
DOWNLOADS = 12  # buttons on the page


def downloads(folder: Path) -> list[Path]:
    """The files worth a download: GGUF files first, then Modelfiles, then the adapter."""
    exports, adapter = folder / "exports", folder / "adapter"
    ggufs = sorted(exports.rglob("*.gguf")) if exports.is_dir() else []
    modelfiles = sorted(p for p in exports.rglob("Modelfile*") if p.is_file()) if exports.is_dir() else []
    weights = [p for p in (adapter / "adapter_model.safetensors", adapter / "adapter_config.json") if p.is_file()]
    return [*ggufs, *modelfiles, *weights]


def gguf_files(folder: Path) -> list[Path]:
    return [p for p in downloads(folder) if p.suffix == ".gguf"]


def file_id(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def by_id(name: str | None, folder: Path) -> Path:
    """The GGUF file of an id.

    Raises:
        ExportError: there is none of that name now.
    """
    for path in gguf_files(folder):
        if file_id(path, folder) == name:
            return path
    raise ExportError("Create a GGUF file first, then check it.")


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.1f} {unit}" if count < 10 * step else f"{count / step:,.0f} {unit}"
    return f"{count:.0f} B"


def needed(parameters: float | None, quants: list[str], merged_is_there: bool) -> float | None:
    """Bytes that merge and conversion write: the merged model, an f16 GGUF on the way, and what was asked for."""
    if not parameters:
        return None
    per_weight = {name: factor for name, _, factor in QUANTS}
    total = 0.0 if merged_is_there else 2.0
    if quants:
        total += 2.0 + sum(per_weight.get(q, 2.0) for q in quants if q != "f16")
    return parameters * total


def free(folder: Path) -> int:
    """Bytes free on the disk of a folder, or of its nearest parent that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def disk(need: float | None, available: int) -> str:
    """The line under the quantizations: what it takes, what is there."""
    if need is None:
        return f'<div class="note">Free on the disk: {size(available)}.</div>'
    if need > available:
        return (
            f'<div class="note note-bad" role="alert">This writes about {size(need)}, but only {size(available)} '
            "are free. Make room first, or choose fewer files.</div>"
        )
    return f'<div class="note">This writes about {size(need)}; {size(available)} are free.</div>'


def facts(summary: dict) -> str:
    """The chosen run in a line or two."""
    parts = [f"<b>{html.escape(summary['model'])}</b>", html.escape(summary["state"])]
    if summary.get("steps"):
        parts.append(f"{summary['steps']:,} steps")
    if summary.get("margin") is not None:
        parts.append(f"reward margin {summary['margin']:+.3f}")
    if summary.get("seconds"):
        parts.append(f"trained in {duration(summary['seconds'])}")
    made = ", ".join(html.escape(m) for m in summary.get("made", []))
    return f'<div class="note">{" · ".join(parts)}<br>Made so far: {made or "the adapter only"}.</div>'


def nothing() -> str:
    return (
        '<div class="note">No run has an adapter yet. Train one in the <b>Train</b> tab: '
        "the demo preset takes a few minutes on any computer.</div>"
    )


def token_note(present: bool) -> str:
    if present:
        return "A token is present in the environment. Type another one only to use that instead; it is not stored."
    return "From huggingface.co/settings/tokens, with write access. Used for this upload only, never stored."


def answer(found: dict) -> str:
    """What llama.cpp said in the check, as HTML; unknown keys are listed below the text."""
    text = str(found.get("text", ""))
    rest = {k: v for k, v in found.items() if k not in ("text", "prompt") and isinstance(v, str | int | float | bool)}
    lines = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(_number(v))}</td></tr>" for k, v in rest.items())
    return f'<pre class="answer">{html.escape(text) or "(no text)"}</pre><table class="plain">{lines}</table>'


def _number(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
