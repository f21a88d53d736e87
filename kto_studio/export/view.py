"""What the Export tab shows, as pure functions over a run's folder. A file's id is its path below that folder."""

from __future__ import annotations

import html
import shutil
from pathlib import Path

from kto_core.errors import ExportError
from kto_core.export import sources
from kto_core.export.gguf import writing
from kto_core.jobs import duration
from kto_studio.shared.prose import note

QUANTS = (  # id, label
    ("q4_k_m", "q4_k_m (small, recommended)"),
    ("q5_k_m", "q5_k_m (slightly better, slightly larger)"),
    ("q6_k", "q6_k (better still)"),
    ("q8_0", "q8_0 (close to the original)"),
    ("f16", "f16 (original precision)"),
    ("iq4_xs", "iq4_xs (smaller than q4_k_m, slower on a processor)"),
    ("q3_k_m", "q3_k_m (small, noticeably less accurate)"),
    ("q2_k", "q2_k (smallest, for large models only)"),
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


def needed(parameters: float | None, quants: list[str], merged_is_there: bool, *widths: int) -> float | None:
    """Bytes that merge and conversion write: the merged model, an f16 GGUF on the way, and what was asked for.

    ``widths``: weights in a row of the model, where that is known.
    """
    if not parameters:
        return None
    total = 0.0 if merged_is_there else 2.0
    if quants:
        total += 2.0 + sum(writing.per_weight(q, *widths) for q in quants if q != "f16")
    return parameters * total


def free(folder: Path) -> int:
    """Bytes free on the disk of a folder, or of its nearest parent that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def disk(need: float | None, available: int) -> str:
    """The line under the quantizations: what it takes, what is there."""
    if need is None:
        return f'<div class="note">Free disk space: {size(available)}.</div>'
    if need > available:
        return (
            f'<div class="note note-bad" role="alert">This needs about {size(need)}, but only {size(available)} are '
            "free. Free up disk space, or choose fewer files.</div>"
        )
    return f'<div class="note">This needs about {size(need)}; {size(available)} are free.</div>'


def facts(summary: dict) -> str:
    """The chosen run in a line or two."""
    parts = [f"<b>{html.escape(summary['model'])}</b>", html.escape(summary["state"])]
    if summary.get("steps"):
        parts.append(f"{summary['steps']:,} steps")
    if summary.get("margin") is not None:
        parts.append(f"reward margin {summary['margin']:+.3f}")
    if summary.get("seconds"):
        parts.append(f"trained for {duration(summary['seconds'])}")
    made = ", ".join(html.escape(m) for m in summary.get("made", []))
    about = f'<div class="note">{" · ".join(parts)}<br>Created so far: {made or "only the adapter"}.</div>'
    return about + ollama(summary.get("remarks", []))


def ollama(remarks: list[str]) -> str:
    """What Ollama does otherwise than the model's own chat template, as a list that opens."""
    if not remarks:
        return ""
    rows = "".join(f"<li>{html.escape(r)}</li>" for r in remarks)
    count = "1 remark" if len(remarks) == 1 else f"{len(remarks)} remarks"
    return f'<details class="note" id="export-remarks"><summary>Ollama: {count}</summary><ul>{rows}</ul></details>'


def remarks(folder: Path) -> list[str]:
    """The remarks on all Modelfiles of a run, each once."""
    known = sources.records(folder / "exports" / "gguf").values()
    found = [r for entry in known if isinstance(entry, dict) for r in entry.get("remarks") or [] if isinstance(r, str)]
    return list(dict.fromkeys(found))


def nothing() -> str:
    return (
        '<div class="note">No run has an adapter yet. Train one in the <b>Train</b> tab: '
        "the demo preset takes a few minutes on any computer.</div>"
    )


def token_note(present: bool) -> str:
    if present:
        return "A token is set in the environment. Enter another one only to use it instead; it is not stored."
    return "From huggingface.co/settings/tokens, with write access. Used for this upload only, never stored."


def verdict(found: dict) -> str:
    """What a check found, as HTML: the verdict, each comparison, and the file's answer beside the merged model's."""
    head = note("This file is your model." if found["ok"] else "This file is not your model. Do not use it.",
                "good" if found["ok"] else "bad")  # fmt: skip
    marks = {True: "✓", False: "✗", None: "–"}
    rows = "".join(
        f"<tr><td>{marks[c['ok']]} {html.escape(c['name'])}</td><td>{html.escape(c['text'])}</td></tr>"
        for c in found["checks"]
    )
    speed = f"{found['tokens_per_second']:.1f} tokens/s in {html.escape(found['engine'])} on this machine's processor"
    return (
        f'{head}<table class="plain">{rows}<tr><td>Speed</td><td>{speed}</td></tr></table>'
        + _answer("The file's answer", found["text"])
        + (_answer("Your model's own answer", found["reference_text"]) if found["reference_text"] is not None else "")
    )


def _answer(title: str, text: str) -> str:
    return f'<p class="card-text">{title}</p><pre class="answer">{html.escape(text) or "(no text)"}</pre>'
