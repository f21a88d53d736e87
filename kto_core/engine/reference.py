"""Reference log-probs: scored once, kept on disk by content, shared between runs.

One SQLite file below the cache folder. The key of a value is a hash of what the number depends on, and of nothing else:
the base model's weights and their quantization, the reference adapter, the number format it was scored in, and the
token ids of prompt and completion. Learning rate, beta, seed, rank and the rest of the data set do not change a key.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kto_core import jobs, paths
from kto_core.errors import Cancelled, DiskError
from kto_core.jobs import Progress, check_cancel, no_progress

logger = logging.getLogger(__name__)
FORMAT = b"kto-reference-2"
LOOKUP = 500  # keys of one query
PHASE = "Computing reference log-probs"  # how the progress begins
NO_NUMBERS = {
    "architectures", "attn_implementation", "output_attentions", "output_hidden_states", "quantization_config",
    "return_dict", "transformers_version", "use_cache",
}  # fmt: skip


def folder(cache_dir: Path | None = None) -> Path:
    return Path(cache_dir or paths.cache_dir()) / "reference"


def cache_size(cache_dir: Path | None = None) -> int:
    """Bytes of the cache on disk."""
    return sum(f.stat().st_size for f in folder(cache_dir).glob("logps.sqlite*") if f.is_file())


def clear_cache(cache_dir: Path | None = None) -> int:
    """Delete the cache; returns the bytes that became free. Runs in progress go on with a new one."""
    size = cache_size(cache_dir)
    for file in folder(cache_dir).glob("logps.sqlite*"):
        file.unlink(missing_ok=True)
    return size


class ReferenceCache:
    """A persistent dict of bytes -> float. A file that is broken is set aside as useless and begun anew.

    Raises:
        DiskError: the folder cannot be written.
    """

    def __init__(self, cache_dir: Path | None = None):
        self.path = folder(cache_dir) / "logps.sqlite"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise DiskError(f"The cache folder {self.path.parent} cannot be created ({e.strerror}).") from e

    @contextlib.contextmanager
    def _open(self):
        connection = sqlite3.connect(self.path, timeout=60)
        try:
            connection.execute("CREATE TABLE IF NOT EXISTS logps (key BLOB PRIMARY KEY, value REAL) WITHOUT ROWID")
            yield connection
            connection.commit()
        finally:
            connection.close()

    def get(self, keys: Iterable[bytes]) -> dict[bytes, float]:
        """The known values; whatever cannot be read is not known."""
        keys = list(dict.fromkeys(keys))
        found: dict[bytes, float] = {}
        try:
            with self._open() as db:
                for a in range(0, len(keys), LOOKUP):
                    part = keys[a : a + LOOKUP]
                    marks = ",".join("?" * len(part))
                    found.update(db.execute(f"SELECT key, value FROM logps WHERE key IN ({marks})", part))
        except sqlite3.OperationalError as e:  # locked, or no permission
            logger.warning(
                "The reference log-prob cache %s is unreadable (%s). Its values are recomputed.", self.path, e
            )
            return {}
        except sqlite3.DatabaseError:
            self._discard()
            return {}
        return {k: v for k, v in found.items() if isinstance(v, float) and math.isfinite(v)}

    def add(self, values: dict[bytes, float]) -> None:
        """Add values, all of them or none. A disk that is full or read-only costs the cache, not the run."""
        rows = [(k, float(v)) for k, v in values.items() if math.isfinite(v)]
        for attempt in (1, 2):
            try:
                with self._open() as db:
                    db.executemany("INSERT OR REPLACE INTO logps VALUES (?, ?)", rows)
                return
            except sqlite3.OperationalError as e:
                logger.warning("Reference log-probs cannot be saved to disk: %s (%s).", e, self.path)
                return
            except sqlite3.DatabaseError:
                if attempt == 1:
                    self._discard()

    def _discard(self) -> None:
        logger.warning("The reference log-prob cache %s is damaged. It is deleted and rebuilt.", self.path)
        for file in self.path.parent.glob("logps.sqlite*"):
            file.unlink(missing_ok=True)


# ---- what a value depends on -----------------------------------------------------------------------------------------


def row_key(scorer: bytes, prompt: np.ndarray, completion: np.ndarray) -> bytes:
    """16 bytes for log pi_ref(completion | prompt); ids int32."""
    h = hashlib.blake2b(scorer, digest_size=16)
    h.update(len(prompt).to_bytes(8, "little"))
    h.update(prompt.tobytes())
    h.update(completion.tobytes())
    return h.digest()


def scorer_key(model, adapter: bytes, scoring_dtype: str) -> bytes:
    """Hash of the frozen model: every weight outside the adapters, quantization state included, and the configuration's
    numbers that the forward pass computes with (windows, soft caps, RoPE's scaling, …).

    Args:
        adapter: hash of the reference adapter (`adapter_key`), b"" for none. scoring_dtype: e.g. "bfloat16".
    """
    h = hashlib.blake2b(FORMAT + adapter + scoring_dtype.encode(), digest_size=16)
    h.update(json.dumps(_numbers(model.config.get_text_config()), sort_keys=True, default=str).encode())
    for name, tensor in _frozen(model):
        h.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        h.update(checksum(tensor))
    return h.digest()


def _numbers(config) -> dict:
    """What of a model's configuration its forward pass may depend on: all but names, versions and token ids."""
    return {
        key: value
        for key, value in config.to_dict().items()
        if not key.startswith("_") and not key.endswith(("_token_id", "dtype")) and key not in NO_NUMBERS
    }


def adapter_key(state: dict, scaling: dict) -> bytes:
    """Hash of adapter tensors and ``scaling``, what they are multiplied with; b"" for an adapter that changes nothing
    (B = 0)."""
    b = [t for name, t in state.items() if "lora_B" in name or "lora_embedding_B" in name]
    others = [name for name in state if "lora_A" not in name and "lora_B" not in name and "lora_embedding" not in name]
    if b and not others and not any(t.any() for t in b):
        return b""
    h = hashlib.blake2b(repr(sorted(scaling.items())).encode(), digest_size=16)
    for name in sorted(state):
        h.update(f"{name} {tuple(state[name].shape)} {state[name].dtype}".encode())
        h.update(checksum(state[name]))
    return h.digest()


def _frozen(model):
    from kto_core.engine.layers.sharding import whole

    for name, p in sorted(model.named_parameters(remove_duplicate=False), key=lambda item: item[0]):
        if "lora_" in name or ".original_module." in name or ".modules_to_save." in name:
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        yield name, whole(p)
        state = getattr(p, "quant_state", None)  # bitsandbytes: scales belong to the weight
        while state is not None:
            yield f"{name} {getattr(state, 'quant_type', '')} {state.blocksize}", state.absmax
            state = getattr(state, "state2", None)
    for name, b in sorted(model.named_buffers(), key=lambda item: item[0]):
        if "lora_" not in name:
            yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), b


def checksum(tensor) -> bytes:
    """16 bytes that change with any byte of the tensor and with their order; computed where the tensor lies."""
    import torch

    flat = tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor.new_zeros(0)
    whole = flat.numel() // 4 * 4
    words = flat[:whole].view(torch.int32) if whole else flat.new_zeros(0, dtype=torch.int32)
    total = mixed = 0
    size = 1 << 22
    weights = torch.arange(1, min(size, max(1, words.numel())) + 1, device=flat.device, dtype=torch.int64) * 2654435761
    for number, part in enumerate(words.split(size)):
        part = part.to(torch.int64)
        total += int(part.sum())
        mixed += (2 * number + 1) * int((part * weights[: len(part)]).sum())
    for byte in flat[whole:].tolist():
        total, mixed = total * 257 + byte + 1, mixed * 257 + byte + 1
    return (total % 2**64).to_bytes(8, "little") + (mixed % 2**64).to_bytes(8, "little")


# ---- computing what is missing ---------------------------------------------------------------------------------------


class ReferenceScores:
    """log pi_ref for (row, row whose completion) pairs, from memory, disk or the model.

    Args:
        rows: the data set (`plan.TokenRows`). scorer: `scorer_key`. cache: None keeps nothing on disk.
        score: ``score(prompts, completions, done)`` computes log-probs under the reference (`step.Engine.score`).
        share: with several processes, ``share(n)`` gives this one's slice of n and a function that joins their
            dicts: ``(values, whether this one was stopped)`` -> ``(all values, whether one of them was)``.
    """

    def __init__(self, rows, scorer: bytes, score, cache: ReferenceCache | None, share=None):
        self.rows, self.scorer, self.score, self.cache, self.share = rows, scorer, score, cache, share
        self._values: dict[tuple[int, int], float] = {}

    def prepare(
        self,
        pairs: Iterable[tuple[int, int]],
        progress: Progress = no_progress,
        cancel: threading.Event | None = None,
    ) -> dict[str, int]:
        """Make the pairs known. Returns counts: ``pairs``, ``cached``, ``computed``.

        Raises:
            Cancelled: what was computed until then is kept.
        """
        pairs = [p for p in dict.fromkeys(pairs) if p not in self._values]
        keys = {p: row_key(self.scorer, self.rows.prompt[p[0]], self.rows.completion[p[1]]) for p in pairs}
        known = self.cache.get(keys.values()) if self.cache else {}
        if self.share is not None:  # one process may have found what another wrote just now: all go by the same list
            known, _ = self.share(0)[1](known, False)
        missing: dict[bytes, tuple[int, int]] = {}
        for pair, key in keys.items():
            if key in known:
                self._values[pair] = known[key]
            else:
                missing.setdefault(key, pair)
        computed, join = len(missing), None
        todo = sorted(missing.items(), key=lambda item: self.rows.prompt[item[1][0]].astype(">i4").tobytes())
        if self.share is not None:
            part, join = self.share(len(todo))
            todo = todo[part]
        fresh: dict[bytes, float] = {}
        done_count, stopped = 0, None

        def done(numbers, values):
            nonlocal done_count
            done_count += len(numbers)
            batch = {todo[i][0]: float(v) for i, v in zip(numbers, values, strict=True)}
            fresh.update(batch)
            if self.cache:
                self.cache.add(batch)
            progress(done_count / len(todo), f"{PHASE}: {done_count:,} of {len(todo):,} answers")
            check_cancel(cancel)

        if missing:  # a process without a part takes part all the same: the others may gather layers from it
            if todo:
                progress(0.0, f"{PHASE}: 0 of {len(todo):,} answers")
            prompts = [self.rows.prompt[p[0]] for _, p in todo]
            completions = [self.rows.completion[p[1]] for _, p in todo]
            try:
                self.score(prompts, completions, done)
            except Cancelled as e:
                stopped = e
        if join is not None:  # also when stopped: the others wait here, and then all of them stop
            fresh, one_stopped = join(fresh, stopped is not None)
            if one_stopped and stopped is None:
                stopped = Cancelled(jobs.STOPPED)
        if stopped is not None:
            raise stopped
        for pair, key in keys.items():
            if key in fresh:
                self._values[pair] = fresh[key]
        return {"pairs": len(pairs), "cached": len(keys) - computed, "computed": computed}

    def values(self, pairs: Iterable[tuple[int, int]]) -> np.ndarray:
        """fp64 ``[n]``; the pairs were prepared before."""
        return np.array([self._values[p] for p in pairs])
