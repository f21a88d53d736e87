"""The GGUF files of a run side by side: size, agreement with the merged model, KL divergence to it, and speed."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from kto_core.errors import ExportError
from kto_core.guards import child, confine
from kto_core.guards.child import tell
from kto_core.jobs import Progress, named, no_progress, part_of

from .proof import agreement_of, reference
from .writing import threads

GOOD = 0.95  # of the places where the merged model is decided: a file that agrees at so many is as good as it
LOGITS = "logits.part"  # beside the GGUF files while they are compared; removed afterwards


def compare(
    files: list[Path],
    question: str,
    *,
    merged: Path,
    key: str,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> list[dict[str, Any]]:
    """Measure each file along the merged model's own answers.

    Args:
        merged: folder of the merged model. key: what it and the files were made of (`sources.key_of`).

    Returns:
        For each file, in their order: ``path``; ``bytes``; ``agreement``: {same, of, undecided} places; ``kl``: median
        KL divergence of its next token from the merged model's, in nats; ``tokens_per_second``: on this machine's
        processor; ``taken``: whether it is the one we would take (`choose`).

    Raises:
        ExportError: the merged model's answers do not fit into memory, or llama.cpp does not run a file.
        Cancelled: ``cancel`` was set.
    """
    expected = reference(files[0].parent, merged, key, question, part_of(progress, 0.0, 0.2), cancel)
    given = expected["answers"]
    if not given:
        raise ExportError(f"The files cannot be compared. {expected['why_not']}.")
    logits = files[0].parent / LOGITS
    try:
        arguments = {"merged": str(merged), "given": given, "out": str(logits)}
        env = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        child.call("export.gguf.comparing", "write_logits", arguments, what="The merged model's own answers",
                   progress=part_of(progress, 0.2, 0.4), cancel=cancel, env=env)  # fmt: skip
        rows = []
        for i, path in enumerate(files):
            stage = part_of(progress, 0.4 + 0.6 * i / len(files), 0.4 + 0.6 * (i + 1) / len(files))
            # half the threads, as in `proof.prove`
            arguments = {"path": str(path), "given": given, "logits": str(logits), "threads": threads(0.5)}
            found = child.call("export.gguf.comparing", "measure", arguments, what="The comparison in llama.cpp",
                               progress=named(f"Measuring {path.name}", stage), cancel=cancel)  # fmt: skip
            agreement = agreement_of(found.pop("choices"), given)
            rows.append({"path": path, "bytes": path.stat().st_size, "agreement": agreement, **found})
    finally:
        logits.unlink(missing_ok=True)
    best = choose(rows)
    return [row | {"taken": row is best} for row in rows]


def choose(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The smallest file that agrees with the merged model at `GOOD` of the decided places; if none does, the one that
    agrees most, and of those the smallest.
    """
    good = [row for row in rows if _share(row) >= GOOD]
    if good:
        return min(good, key=lambda row: row["bytes"])
    return min(rows, key=lambda row: (-_share(row), row["bytes"]))


def _share(row: dict[str, Any]) -> float:
    found = row["agreement"]
    return found["same"] / found["of"] if found and found["of"] else 0.0


# ---- in the child ---------------------------------------------------------------------------------------------------


def write_logits(merged: str, given: list[dict], out: str) -> None:
    """Log-probabilities of the merged model at each place of the given answers, one after another: float16, (places,
    vocabulary), as numpy writes it.
    """
    import numpy as np
    import torch

    from kto_core.models.load import load_whole

    tell(None, "Loading the merged model…")
    model: Any = load_whole(Path(merged), dtype="auto", use_safetensors=True)
    if torch.finfo(model.dtype).bits == 16:
        model = model.float()
    parts = []
    for i, answer in enumerate(given):
        tell(i / len(given), f"The merged model reads answer {i + 1} of {len(given)}")
        ids = torch.tensor([answer["prompt_ids"] + answer["ids"][:-1]])
        with torch.no_grad():
            logits = model(ids, logits_to_keep=len(answer["ids"])).logits[0]
        parts.append(torch.log_softmax(logits.float(), -1).half().numpy())
    with open(out, "wb") as f:
        np.save(f, np.concatenate(parts))


def measure(path: str, given: list[dict], logits: str, threads: int) -> dict[str, Any]:
    """A file's first choice at each place of the given answers, ``kl`` and ``tokens_per_second`` (`compare`)."""
    import numpy as np

    from .llama import engine

    confine.close_in()
    expected = np.load(logits, mmap_mode="r")
    tell(None, "Loading the file in llama.cpp…")
    model = engine()(path, threads)
    choices, divergences, at, seconds, fed = [], [], 0, 0.0, 0
    for i, answer in enumerate(given):
        tell(i / len(given), f"answer {i + 1} of {len(given)}")
        model.forget()
        found = [model.first(answer["prompt_ids"])]
        for j, token in enumerate(answer["ids"]):
            divergences.append(divergence(expected[at + j], model.logits()))
            if j + 1 < len(answer["ids"]):
                began = time.perf_counter()
                found.append(model.next(token))
                seconds, fed = seconds + time.perf_counter() - began, fed + 1
        choices.append(found)
        at += len(answer["ids"])
    return {
        "choices": choices,
        "kl": float(np.median(divergences)),
        "tokens_per_second": fed / seconds if seconds else 0.0,
    }


def divergence(log_p, logits) -> float:
    """KL(p ‖ q) in nats, of log-probabilities and logits over one vocabulary; a file may pad its vocabulary."""
    import numpy as np

    log_p = np.asarray(log_p, np.float64)
    q = np.asarray(logits, np.float64)[: len(log_p)]
    log_q = q - q.max() - np.log(np.exp(q - q.max()).sum())
    p = np.exp(log_p)
    return max(0.0, float((p / p.sum() * (log_p - log_q)).sum()))
