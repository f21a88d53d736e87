"""Frozen weights divided over two processes: the same numbers, half the weights each, whatever the rows of each."""

import os
import subprocess

import pytest
from test_engine_processes import ROOT, TWO

SCRIPT = """
import contextlib
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from functools import partial
import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from training import resolved
from kto_core import model as models
from kto_core.engine import memory, sharding
from kto_core.engine.reference import scorer_key
from kto_core.engine.step import Engine, Group
from kto_core.errors import Cancelled

torch.set_num_threads(1)
PartialState()
rank, four_bits = dist.get_rank(), {four_bits}
config = resolved({model!r}, "", load_in_4bit=four_bits).config
load = partial(models.load_base, config, for_training=True)
whole = load()
divided = sharding.load_divided(partial(load, in_main_memory=True), models.training_device())
sizes = [p.numel() for p in whole.model.layers.parameters() if p.ndim > 1]
assert sum(sharding.local(p).numel() for p in divided.model.layers.parameters() if p.ndim > 1) == sum(sizes) // 2
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

settings = dict(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0, rows=5, reduce=total)
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
"""


@pytest.mark.parametrize("four_bits", [True, False])
def test_divided_weights_give_the_same_numbers(tmp_path, tiny_model, four_bits):
    script = tmp_path / "divided.py"
    names = {"root": str(ROOT), "tests": str(ROOT / "tests"), "model": str(tiny_model), "four_bits": four_bits}
    script.write_text(SCRIPT.format(**names))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run([*TWO, str(script)], capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0 and done.stdout.count("well") == 2, done.stderr[-6000:]
