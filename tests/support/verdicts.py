"""A run's folder with an adapter and a verdict on it."""

import json
from types import SimpleNamespace

from kto_core.verdict import keeping

RESULT = {
    "run": "r",
    "data": "validation rows of the run",
    "rows": 40,
    "desirable": 20,
    "undesirable": 20,
    "questions": 31,
    "left_out": 5,
    "too_long": 2,
    "unused": 4,
    "trained_on": 3,
    "moved": {"nats": 9.65, "nats_per_token": 0.38},
    "rewards/margins": 1.93,
    "margin_interval": [1.7, 2.1],
    "rewards/chosen": -0.48,
    "chosen_interval": [-0.6, -0.3],
    "rewards/rejected": -2.41,
    "answers": {"asked": 16, "changed": 13, "tokens_before": 58.0, "tokens_after": 20.4, "at_most": 128},
    "answer_lengths": {
        "good": {"asked": 8, "before": 60.0, "after": 18.4},
        "bad": {"asked": 8, "before": 56.0, "after": 22.4},
    },
    "accuracy": 0.95,
    "auc": 0.99,
    "kl": 0.1,
    "loss": 0.29,
    "lengths": {"good": 8.0, "bad": 42.0},
    "forgotten": {"perplexity_before": 20.0, "perplexity_after": 21.0, "tokens": 2000},
    "verdict": {"word": "better", "reasons": ["the reward margin is +1.93 and not chance"], "sentence": ""},
    "remarks": [],
    "samples": [{"prompt": "secret", "label": True, "base": "b", "tuned": "t"}],
}


def judged(folder, **changes):
    """What `keeping` needs of a run, with a verdict on its adapter."""
    adapter = folder / "adapter"
    adapter.mkdir(parents=True, exist_ok=True)
    (adapter / "manifest.json").write_text(json.dumps({"files": {"a": [1, 2]}}))
    keeping.write(folder, RESULT | changes, keeping.fingerprint(adapter))
    return SimpleNamespace(id=folder.name, path=folder, adapter=adapter, checkpoints=list)
