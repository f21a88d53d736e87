"""A setting's rows, and a model with an adapter that is made anew for each training of the sweep.

The engine, its grouping and its reference cache are the product's; a model is loaded once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclass
class Data:
    """Rows of one setting as token ids (`engine.plan.TokenRows`). ``clusters``: the held-out rows' question, ``[n]``.
    ``ends``: token ids that end an answer."""

    train: object
    held: object
    clusters: np.ndarray
    ends: list[int]
    pad: int

    @classmethod
    def load(cls, file: Path) -> Data:
        from kto_core.engine.packing.groups import Ragged, TokenRows

        with np.load(file) as z:

            def rows(side):
                parts = (Ragged(z[f"{side}_{k}"], z[f"{side}_{k}_offsets"]) for k in ("prompt", "completion"))
                return TokenRows(*parts, z[f"{side}_labels"])

            return cls(rows("train"), rows("held"), z["clusters"], z["ends"].tolist(), int(z["pad"]))

    def some(self, count: int, seed: int):
        """``count`` training rows drawn with ``seed``, of which a smaller count takes a part; 0 takes all."""
        from kto_core.engine.packing.groups import Ragged, TokenRows

        if not count or count >= len(self.train):
            return self.train
        chosen = np.sort(np.random.default_rng([seed, 7]).permutation(len(self.train))[:count])
        parts = (Ragged.of([column[i] for i in chosen]) for column in (self.train.prompt, self.train.completion))
        return TokenRows(*parts, self.train.labels[chosen])


class Model:
    """A base model with one LoRA adapter, the engine over it, and the cache of its reference's scores."""

    def __init__(self, folder: Path, dtype: str, r: int, alpha: int, defaults: dict, cache: Path):
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        from kto_core.engine.adapters import trainable
        from kto_core.engine.reference import ReferenceCache
        from kto_core.engine.step import Engine

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cuda.enable_cudnn_sdp(False)  # as `hardware.prepare` does
        dtype = getattr(torch, dtype) if self.device.type == "cuda" else torch.float32
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(self.device)
        lora = LoraConfig(
            r=r, lora_alpha=alpha, target_modules=defaults["target_modules"], bias="none", task_type="CAUSAL_LM"
        )
        self.peft = get_peft_model(base, lora, autocast_adapter_dtype=True)
        self.parameters = trainable(self.peft)
        for p in self.parameters.values():
            p.data = p.data.float()
        self.engine = Engine(self.peft)
        # the product hashes the weights, which takes seconds on a shared GPU; here a model's name says which they are
        self.scorer = hashlib.blake2b(f"{folder.name} {dtype} {self.device.type}".encode(), digest_size=16).digest()
        self.cache, self.locks = ReferenceCache(cache), cache / "locks"
        self.locks.mkdir(parents=True, exist_ok=True)

    def autocast(self):
        import torch

        on = self.device.type == "cuda"  # on a CPU the product trains in fp32
        return torch.autocast("cuda", torch.bfloat16) if on else contextlib.nullcontext()

    def reset(self, seed: int, start: str) -> None:
        """A fresh adapter, all of it from ``seed``: PEFT's (B = 0), or the other way round (A = 0)."""
        import torch
        from transformers import set_seed

        set_seed(seed)
        for name, p in self.parameters.items():
            p.grad = None
            if f"lora_{start[0]}." in name:
                torch.nn.init.zeros_(p.data)
            else:
                torch.nn.init.kaiming_uniform_(p.data, a=math.sqrt(5))

    def fit(self, planner) -> None:
        """Passes as large as this process's memory has room for, as the trainer chooses them."""
        from kto_core.engine import limits
        from kto_core.engine.packing.batches import longest

        groups, row = limits.sample_groups(planner), longest(planner.rows)
        self.engine.limits = limits.choose(self.engine, groups, self.autocast, None, row, moments=2.1)

    def score(self, prompts, completions, budget: int, done=None) -> np.ndarray:
        with self.autocast():
            return self.engine.score(prompts, completions, budget, done)

    def reference(self, rows, planner, steps: int):
        """`ReferenceScores` of what ``steps`` steps need. Of several processes one computes; the others read."""
        from kto_core.engine.packing.batches import planned_pairs
        from kto_core.engine.reference import ReferenceScores

        def score(prompts, completions, done):
            with self.peft.disable_adapter():
                self.score(prompts, completions, self.engine.limits.scoring_tokens, done)

        scores = ReferenceScores(rows, self.scorer, score, self.cache)
        with open(self.locks / f"{self.scorer.hex()}-{len(rows)}", "w") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            scores.prepare(planned_pairs(planner, steps))
        return scores
