"""Frozen weights divided over two processes: the same numbers, half the weights each, whatever the rows of each."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kto_core.errors import ConfigError
from kto_core.hardware import gpus
from kto_core.hardware.gpus import Device
from kto_core.planning import choices, memory
from tests.engine.test_engine_processes import ROOT, TWO
from tests.support.mixtures import make_mixture
from tests.support.training import FAST, PLACE, events, make_data, make_other, metrics, resolved, state

CARD = Device(0, "x", 24.0, 24.0, 0.0, (8, 6))
SCRIPT = """
import contextlib
import sys
sys.path.insert(0, {root!r})
from functools import partial
import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from tests.support.training import resolved
from kto_core.models import load as models
from kto_core.engine import limits as memory; from kto_core.engine.layers import sharding
from kto_core.engine.reference import scorer_key
from kto_core.engine.group import Group, Objective
from kto_core.engine.step import Engine
from kto_core.errors import Cancelled
from kto_core.runs.ranks import end_process

torch.set_num_threads(1)
PartialState()
rank, four_bits = dist.get_rank(), {four_bits}
config = resolved({model!r}, "", load_in_4bit=four_bits).config
load = partial(models.load_base, config, for_training=True)
whole = load()
divided = sharding.load_divided(partial(load, in_main_memory=True), models.training_device())
sizes = [p.nbytes for p in whole.model.layers.parameters() if p.ndim > 1]
assert sum(sharding.local(p).nbytes for p in divided.model.layers.parameters() if p.ndim > 1) == sum(sizes) // 2
assert all(p.dtype == torch.float32 for p in divided.model.layers.parameters())
held = {{p.untyped_storage().nbytes() for p in map(sharding.local, divided.model.layers.parameters())}}
assert max(held) == max(p.numel() * p.element_size() for p in whole.model.layers.parameters()) // 2

whole, divided = models.add_adapter(whole, config), models.add_adapter(divided, config)
models.keep_weights_trainable(whole)
for model in (whole, divided):
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
assert scorer_key(whole, b"", "float32") == scorer_key(divided, b"", "float32")

generator = np.random.default_rng(5)
rows = [[generator.integers(5, 90, n).astype(np.int32) for n in (12, 9, 10)] for _ in range(5)]

def total(tensor):
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor

def group(rows):
    ref = torch.full((len(rows),), -60.0, dtype=torch.float64)
    labels = torch.tensor([i % 2 == 0 for i in range(len(rows))])
    return Group([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], labels, ref, ref - 20)

def idle_z0():
    sums = total(torch.zeros(2, dtype=torch.float64))
    return float(sums[0] / sums[1])

settings = dict(objective=Objective(0.1), rows=5, reduce=total)
for lean in (True, False):
    for budget, layers in ((None, 0), (None, 9), (60, 0), (60, 9)):
        for split in (4, 5):  # rows of the first process; the other has one, or none at all
            mine, found = (rows[:split] if rank == 0 else rows[split:]), []
            for model in (whole, divided):
                engine = Engine(model, budget, layers)
                assert engine.divided == (model is divided) and len(engine.lean) > 10
                engine.lean = engine.lean if lean else []
                model.zero_grad()
                if mine:
                    result = engine.run(group(mine), backward=lambda loss: loss.backward(), **settings)
                    z0 = float(result.z0)
                else:
                    z0 = engine.stand_by(idle_z0, kl=True, backward=True)
                lora = [p for name, p in model.named_parameters() if "lora_" in name]
                found.append((z0, [total(p.grad if p.grad is not None else torch.zeros_like(p)) for p in lora]))
            (z0, gradients), (divided_z0, divided_gradients) = found
            assert z0 == divided_z0 > 1 and any(g.any() for g in gradients)
            for a, b in zip(gradients, divided_gradients, strict=True):
                assert torch.allclose(a, b, rtol=1e-5, atol=1e-7), (lean, budget, layers, split)

a, b = (memory.measure(Engine(m), contextlib.nullcontext) for m in (whole, divided))
assert a == b, (a, b)

# one process is stopped while the reference is scored: the other does not wait for it
passes = []
def done(numbers, values):
    passes.append(len(numbers))
    if rank == 0:
        raise Cancelled("Stopped as you asked.")
prompts, completions = [r[0] for r in rows], [r[1] for r in rows]
try:
    Engine(divided, 25).score(prompts, completions, 25, done)
    assert rank == 1
except Cancelled:
    assert rank == 0
assert passes == [1]
dist.destroy_process_group()
print("well")
end_process(0)
"""


HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "four_bits"), [("llama", True), ("llama", False), ("qwen3_moe", True), ("qwen3_5_text", False)]
)
def test_divided_weights_give_the_same_numbers(tmp_path, tiny_model, kind, four_bits):
    """Of a mixture the attention is divided; its experts in 4 bits stay whole."""
    script = tmp_path / "divided.py"
    if kind == "qwen3_moe":
        model = make_mixture(tmp_path / "model", tiny_model, kind)
    elif kind == "qwen3_5_text":
        model = make_other(tmp_path / "model", tiny_model, kind, **HYBRID)
    else:
        model = tiny_model
    names = {"root": str(ROOT), "model": str(model), "four_bits": four_bits}
    script.write_text(SCRIPT.format(**names))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run([*TWO, str(script)], capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0 and done.stdout.count("well") == 2, done.stderr[-6000:]


BYTES = """
import sys
sys.path.insert(0, {root!r})
import torch
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from kto_core.engine.layers.sharding import as_float32
from kto_core.runs.ranks import end_process

device, rank = PartialState().device, PartialState().process_index
pairs = torch.arange(2**16, dtype=torch.int32).to(torch.int16)  # every pattern of two bytes
for kind in (torch.uint8, torch.bfloat16, torch.float16):
    layer = torch.nn.Linear(1, 1, bias=False, device=device)
    layer.weight = torch.nn.Parameter(as_float32(pairs.view(kind).to(device)), requires_grad=False)
    fully_shard(layer, mesh=init_device_mesh(device.type, (2,)))
    layer.unshard()
    assert torch.equal(layer.weight.data.cpu().view(-1).view(torch.int16), pairs), kind
    layer.reshard()
torch.distributed.destroy_process_group()
print("well")
end_process(0)  # gloo's threads may outlive what they use
"""


def test_gathered_bytes_are_the_divided_ones(tmp_path):
    """On cards (KTO_TESTS_CARDS=1) NaNs would not be, had FSDP 16-bit floats to copy."""
    script = tmp_path / "bytes.py"
    script.write_text(BYTES.format(root=str(ROOT)))
    env = {**os.environ, "OMP_NUM_THREADS": "1", **PLACE}
    done = subprocess.run([*TWO, str(script)], capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 0 and done.stdout.count("well") == 2, done.stderr[-3000:]


SETTINGS = FAST | {"max_steps": 4, "save_steps": 2, "test_size": 0.2, "eval_steps": 3, "engine": "packed"}


def train(model, data, out: Path, cache: Path, **overrides):
    """The command line's own way, the processes on the CPU."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (SETTINGS | overrides).items()]
    flags += ["--preset", "demo", "--model", str(model), "--data", str(data), "--output-dir", str(out)]
    command = [sys.executable, "-m", "kto_core", "train", "--load-in-4bit", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "KTO_STUDIO_CACHE": str(cache)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=ROOT)


def same(a: list[dict], b: list[dict]) -> None:
    assert len(a) == len(b)
    for one, two in zip(a, b, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-4)


def test_a_divided_run_is_the_run_of_one_process_and_resumes(tmp_path, tiny_model):
    data = make_data(tmp_path / "rows.jsonl", 31)
    done = train(tiny_model, data, tmp_path / "one", tmp_path / "cache1")
    assert done.returncode == 0, done.stderr[-6000:]
    two = {"num_gpus": 2, "shard": "true", "gradient_accumulation_steps": 1}
    done = train(tiny_model, data, tmp_path / "two", tmp_path / "cache2", **two)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "sharded across 2 processes" in done.stderr
    same(metrics(tmp_path / "one"), metrics(tmp_path / "two"))
    adapters = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("one", "two")]
    assert close(*adapters)

    part = shutil.copytree(tmp_path / "two", tmp_path / "part")  # as if it had been killed after its third step
    shutil.rmtree(part / "checkpoints" / "checkpoint-4")
    shutil.rmtree(part / "adapter")
    lines = (part / "events.jsonl").read_text().splitlines(keepends=True)
    third = next(i for i, line in enumerate(lines) if '"step": 3' in line or '"step":3' in line)
    (part / "events.jsonl").write_text("".join(lines[: third + 1]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT),
           "KTO_STUDIO_CACHE": str(tmp_path / "cache2")}  # fmt: skip
    command = [*TWO, "-m", "kto_core.worker", str(part), "--lock-fd", "-1"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert again.returncode == 0 and state(part).state == "finished", again.stderr[-6000:]
    same(metrics(tmp_path / "one"), metrics(part))
    trained = [e["step"] for e in events(part) if e["kind"] == "metric" and "loss" in e]
    assert trained == [1, 2, 3, 3, 4]
    assert close(adapters[0], part / "adapter" / "adapter_model.safetensors")


def close(a: Path, b: Path) -> bool:
    import torch
    from safetensors.torch import load_file

    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], atol=1e-4) for n in a)


def large(**overrides):
    return resolved("meta-llama/Llama-2-70b-hf", "", r=8, lora_alpha=16, **overrides).config


def test_auto_divides_what_one_card_does_not_hold():
    def plan(device=CARD, **overrides):
        return memory.plan(large(engine="packed", load_in_4bit=True, **overrides), [200] * 16, device=device)

    one, two, four, whole = plan(), plan(num_gpus=2), plan(num_gpus=4), plan(num_gpus=4, shard=False)
    assert [p.sharded for p in (one, two, four, whole)] == [False, True, True, False]
    assert four.verdict == "fits" and whole.verdict == one.verdict == "does not fit"
    assert "Set shard to auto" in whole.advice
    packed = 0.5 * 70e9 / 2**30  # GiB of 4-bit numbers, whose scales stay whole
    assert one.parts["weights"] - two.parts["weights"] == pytest.approx(packed / 2, rel=0.05)
    assert one.parts["weights"] - four.parts["weights"] == pytest.approx(packed * 3 / 4, rel=0.05)
    assert four.parts["gathered layers"] == pytest.approx(3 * packed / four.layers, rel=0.05)
    assert not plan(Device(0, "x", 80.0, 80.0, 0.0, (9, 0)), num_gpus=2).sharded
    assert plan(Device(0, "x", 80.0, 80.0, 0.0, (9, 0)), num_gpus=2, shard=True).sharded
    trl = memory.plan(large(engine="trl", load_in_4bit=True, num_gpus=4), [200] * 16, device=CARD)
    assert not trl.sharded and trl.verdict == "does not fit"


def test_who_divides(monkeypatch):
    def used(config, engine="packed"):
        return choices.use_sharding(config, engine, memory.plan(config, [200] * 16))

    monkeypatch.setattr(gpus, "devices", lambda: [CARD, CARD])
    two = {"num_gpus": 2, "engine": "auto", "load_in_4bit": True}
    assert not used(large(**two))  # one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert used(large(**two)) and used(large(**two, shard=True)) and not used(large(**two, shard=False))
    assert not used(large(**two), "trl")
    with pytest.raises(ConfigError, match="only the packed engine can shard"):
        used(large(**two, shard=True), "trl")


@pytest.mark.parametrize("wrong", [{"num_gpus": 1}, {"num_gpus": 2, "engine": "trl"}])
def test_shard_is_refused_where_it_cannot_be(tiny_model, wrong):
    with pytest.raises(ConfigError) as e:
        resolved(tiny_model, "", **{"engine": "packed", "shard": "true", **wrong})
    assert [p for p in e.value.problems if p.startswith("shard: must be auto or false with")]
