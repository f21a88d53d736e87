"""Two processes with half the rows each train as one process with all of them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
from pathlib import Path
import oracle
import test_engine_trainer as t
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({model!r})
tokenizer.pad_token_id = 0
world, out = int(os.environ.get("WORLD_SIZE", 1)), Path({out!r})
for kl_group in ("batch", "microbatch"):
    args = t.arguments(out, per_device_train_batch_size=4 // world)
    trainer = t.packed(out, tokenizer, t.dataset(17), args=args, kl_group=kl_group, reference_cache=False)
    trainer.train()
    if int(os.environ.get("RANK", 0)) == 0:
        for m in t.metrics(trainer):
            print("STEP", *(m[k] for k in ("loss", "kl", "grad_norm", "logps/chosen", "num_tokens")))
"""


def lines(tmp_path, demo_model, launcher):
    script = tmp_path / "run.py"
    names = {"root": ROOT, "tests": ROOT / "tests", "model": demo_model, "out": tmp_path}
    script.write_text(SCRIPT.format(**{k: str(v) for k, v in names.items()}))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, str(script)], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return [[float(x) for x in found.split()] for found in re.findall(r"^STEP (.*)", done.stdout, re.M)]


def test_two_processes_equal_one(tmp_path, demo_model):
    one = lines(tmp_path, demo_model, [sys.executable])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = lines(tmp_path, demo_model, launcher)
    assert len(one) == len(two) == 12
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("engine", ["packed", "trl"])
def test_a_run_on_two_processes_ends_well(tmp_path, tiny_model, engine):
    """The product's worker under a launcher: one tells the story, both end with 0, and the log-probs are all there."""
    from training import make_data, resolved

    from kto_core import run as runs

    data = make_data(tmp_path / "rows.jsonl", 32)
    one = runs.create(resolved(tiny_model, data, max_steps=3, engine=engine, output_dir=str(tmp_path / "run")))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT),
           "KTO_STUDIO_CACHE": str(tmp_path / "cache")}  # fmt: skip
    command = [*launcher, "-m", "kto_core.worker", str(one.path), "--lock-fd", "-1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    state = one.state()
    assert state.state == "finished" and state.step == 3 and len(state.metrics) == 3 and one.adapter
