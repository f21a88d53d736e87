"""What a merge takes of main memory, measured in a process of its own, and what is said of it before."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kto_core.errors import HardwareError
from kto_core.export import checks
from kto_core.export.merge import tensor_files
from kto_core.models.facts import model_facts
from tests.support.exporting import make_run

ROOT = Path(__file__).resolve().parents[2]
CHILD = (
    "import re, sys; from kto_core.export import merging; merging.tell = lambda *_: None; "
    "facts = merging.merge(sys.argv[1], sys.argv[2], sys.argv[3], 'owner/base', {}); "
    "most = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]; "  # ru_maxrss counts the parent's, too
    "print(facts['layers'], int(most) * 1024)"
)
WIDE, DEEP, FILES = 1024, 24, 3


def make_large(folder: Path, tiny: Path) -> Path:
    """A checkpoint of several files whose weights are one piece of noise again and again: 0.5 GB each in bf16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").unlink()
    config = AutoConfig.from_pretrained(tiny, hidden_size=WIDE, intermediate_size=8 * WIDE, num_hidden_layers=DEEP,
                                        num_attention_heads=8, num_key_value_heads=8, head_dim=128,
                                        dtype="bfloat16", tie_word_embeddings=False)  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    entries = [tensor_files.Entry(n, "BF16", tuple(p.shape)) for n, p in model.named_parameters()]
    shards = tensor_files.in_shards(entries, sum(e.size for e in entries) // FILES + 20_000_000)
    named = dict(zip(tensor_files.names_of(len(shards)), shards, strict=True))
    noise = torch.randn(2**20).bfloat16() * 0.02

    def tensor(entry):
        return noise.repeat(entry.numbers // len(noise) + 1)[: entry.numbers].view(entry.shape)

    for name, some in named.items():
        tensor_files.write(folder / name, some, tensor)
    tensor_files.write_index(folder, named)
    return folder


def make_adapter(folder: Path) -> Path:
    """LoRA on all linear layers of `make_large`, written without a model."""
    import torch
    from safetensors.torch import save_file

    sizes = {"self_attn.q_proj": (WIDE, WIDE), "mlp.down_proj": (WIDE, 8 * WIDE), "mlp.gate_proj": (8 * WIDE, WIDE)}
    tensors = {}
    for i in range(DEEP):
        for name, (outputs, inputs) in sizes.items():
            key = f"base_model.model.model.layers.{i}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(8, inputs) * 0.01
            tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, 8) * 0.01
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    names = sorted(name.rpartition(".")[2] for name in sizes)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": names})
    )
    return folder


def peak(base: Path, adapter: Path, part: Path) -> tuple[int, int]:
    """(layers merged, greatest resident bytes of the process)."""
    part.mkdir()
    out = subprocess.run([sys.executable, "-c", CHILD, str(base), str(adapter), str(part)], cwd=ROOT, check=True,
                         capture_output=True, text=True)  # fmt: skip
    layers, bytes_ = out.stdout.split()[-2:]
    return int(layers), int(bytes_)


def test_a_merge_takes_less_than_its_largest_file(tmp_path, tiny_model):
    base, adapter = make_large(tmp_path / "base", tiny_model), make_adapter(tmp_path / "adapter")
    files = sorted(p.stat().st_size for p in base.glob("*.safetensors"))
    assert len(files) == FILES and sum(files) > 1.3e9
    small = make_run(tmp_path / "run", tiny_model, str(tiny_model))
    _, libraries = peak(tiny_model, small.adapter, tmp_path / "small")
    layers, whole = peak(base, adapter, tmp_path / "part")
    assert layers == 3 * DEEP
    assert whole - libraries < 1.3 * files[-1]
    assert whole < checks.LIBRARIES + checks.shard_need(adapter)  # what is asked for before


def test_what_is_needed_depends_on_the_largest_weight_and_not_on_the_model(tmp_path, tiny_model, monkeypatch):
    import psutil

    adapter = make_adapter(tmp_path / "adapter")
    numbers = sum(8 * (a + b) for a, b in ((WIDE, WIDE), (WIDE, 8 * WIDE), (8 * WIDE, WIDE))) * DEEP
    assert checks.shard_need(adapter) == 4 * numbers + checks.COPIES * 8 * WIDE * WIDE
    facts = model_facts(str(tiny_model))
    plain = SimpleNamespace(model_type="llama", quantized="bitsandbytes", parameters=13e9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4e9))
    checks.require_memory(tiny_model, adapter, plain)
    whole = SimpleNamespace(model_type="gpt_oss", quantized="bitsandbytes", parameters=21e9)
    monkeypatch.setattr(checks, "model_facts", lambda _: whole)
    with pytest.raises(HardwareError, match=r"about \d+\.\d GB .* 4\.0 GB are free"):
        checks.require_memory(tiny_model, adapter, whole)
    assert not checks.loaded_whole(facts)
