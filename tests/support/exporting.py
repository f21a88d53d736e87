"""Helpers of the export tests: a run with an adapter that moves the model, without a training."""

import json
from pathlib import Path

from kto_core import files
from kto_core.config import resolving
from kto_core.runs import folders
from kto_core.runs.events import EventLog


def make_run(folder: Path, model, name: str, *, base_dir: Path | None = None, targets=("q_proj", "v_proj", "down_proj"),
             scale=0.01):  # fmt: skip
    """A finished run of ``model`` whose LoRA adapter has random weights: large enough to change answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from kto_core.models.load import load_tokenizer

    resolved = resolving.resolve(
        "demo", {"model": name, "data": "rows.jsonl", "output_dir": str(folder)}, origin="test"
    )
    made = folders.create(resolved)
    base = AutoModelForCausalLM.from_pretrained(base_dir or model)
    torch.manual_seed(1)
    tuned = get_peft_model(base, LoraConfig(r=8, target_modules=list(targets), task_type="CAUSAL_LM"))
    for key, weight in tuned.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=scale)
    adapter = made.path / "adapter"
    tuned.save_pretrained(adapter)
    (adapter / "README.md").unlink(missing_ok=True)
    load_tokenizer(str(model)).save_pretrained(adapter)
    files.seal(adapter)
    log = EventLog(made.path / "events.jsonl")
    log.status("training", total_steps=3)
    log.metric(3, loss=0.4321, kl=0.01, **{"rewards/margins": 0.25})
    log.status("finished", total_steps=3)
    facts = {
        "source": str(folder / "private place" / "rows.jsonl"),
        "sha256": "ab" * 32,
        "report": {"rows": 12, "kept": 10},
        "train": {"rows": 8, "desirable": 5, "undesirable": 3},
        "test": {"rows": 2, "desirable": 1, "undesirable": 1},
    }
    (made.path / "dataset.json").write_text(json.dumps(facts))
    return made


def left_behind(folder: Path) -> list[str]:
    """Names of half-made things below a folder."""
    return sorted(p.name for p in folder.rglob("*") if p.name.endswith((".part", ".old", ".tmp")))
