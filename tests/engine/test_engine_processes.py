"""Two processes with half the rows each train as one process with all of them."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kto_core.runs import ranks
from tests.support.training import state, wait

ROOT = Path(__file__).resolve().parents[2]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests.support import oracle
from tests.support import packed as t
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({model!r})
tokenizer.pad_token_id = 0
world, out = int(os.environ.get("WORLD_SIZE", 1)), Path({out!r})
for kl_group in ("batch", "microbatch"):
    args = t.arguments(out, per_device_train_batch_size=4 // world)
    trainer = t.packed(out, tokenizer, t.dataset(17), args=args, kl_group=kl_group, reference_cache=False)
    trainer.train()
    assert trainer.model_wrapped is trainer.model  # its forward passes would go past DDP, whose buckets cost memory
    if int(os.environ.get("RANK", 0)) == 0:
        for m in t.metrics(trainer):
            print("STEP", *(m[k] for k in ("loss", "kl", "grad_norm", "logps/chosen", "num_tokens")))
"""
END = """
if world > 1:  # else its threads may outlive what they use
    torch.distributed.destroy_process_group()
"""


def lines(tmp_path, demo_model, launcher):
    script = tmp_path / "run.py"
    names = {"root": ROOT, "model": demo_model, "out": tmp_path}
    script.write_text(SCRIPT.format(**{k: str(v) for k, v in names.items()}) + END)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, str(script)], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return [[float(x) for x in found.split()] for found in re.findall(r"^STEP (.*)", done.stdout, re.M)]


def test_two_processes_equal_one(tmp_path, demo_model):
    one = lines(tmp_path, demo_model, [sys.executable])
    two = lines(tmp_path, demo_model, TWO)
    assert len(one) == len(two) == 12
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)


ALIKE = """
import torch, torch.distributed as dist
import sys
sys.path.insert(0, {root!r})
from kto_core.engine.adapters import broadcast_values
dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
p = torch.nn.Parameter(torch.randn(3))
before, found = p.data.clone(), [torch.empty(3), torch.empty(3)]
broadcast_values({{"a": p}})
dist.all_gather(found, p.data)
assert torch.equal(*found) and (dist.get_rank() > 0) != torch.equal(p.data, before)
dist.destroy_process_group()
"""


def test_adapters_begin_alike(tmp_path):
    script = tmp_path / "alike.py"
    script.write_text(ALIKE.format(root=str(ROOT)))
    done = subprocess.run([*TWO, str(script)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("engine", ["packed", "trl"])
def test_a_run_on_two_processes_ends_well(tmp_path, tiny_model, engine):
    """The product's worker under a launcher: one tells the story, both end with 0, and the log-probs are all there."""
    from kto_core.runs import folders
    from tests.support.training import make_data, resolved

    data = make_data(tmp_path / "rows.jsonl", 32)
    one = folders.create(resolved(tiny_model, data, max_steps=3, engine=engine, output_dir=str(tmp_path / "run")))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT),
           "KTO_STUDIO_CACHE": str(tmp_path / "cache")}  # fmt: skip
    command = [*TWO, "-m", "kto_core.worker", str(one.path), "--lock-fd", "-1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    ended = one.state()
    assert ended.state == "finished" and ended.step == 3 and len(ended.metrics) == 3 and one.adapter


def begun(tmp_path, tiny_model, **overrides):
    """A run on two processes, started as `run_workers` does: (run, the launcher)."""
    from kto_core.runs import folders
    from tests.support.training import make_data, resolved

    data = make_data(tmp_path / "rows.jsonl", 32)
    one = folders.create(resolved(tiny_model, data, output_dir=str(tmp_path / "run"), **overrides))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT),
           "KTO_STUDIO_CACHE": str(tmp_path / "cache")}  # fmt: skip
    command = [*TWO, "-m", "kto_core.worker", str(one.path), "--lock-fd", "-1"]
    with open(one.path / "worker.log", "ab") as log:
        return one, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)


def workers(run) -> list[psutil.Process]:
    found = []
    for p in psutil.process_iter(["cmdline"]):
        line = p.info["cmdline"] or []
        if "kto_core.worker" in line and str(run.path) in line and "torch.distributed.run" not in line:
            found.append(p)
    return found


def test_a_killed_launcher_takes_its_processes_along(tmp_path, tiny_model):
    run, launcher = begun(tmp_path, tiny_model, max_steps=100_000, num_train_epochs=1)
    wait(lambda: state(run.path).step >= 2 or state(run.path).terminal, 200)  # nobody holds the run's lock here
    assert len(workers(run)) == 2 and not state(run.path).terminal
    launcher.kill()
    launcher.wait()
    wait(lambda: not workers(run), 20)
    assert not workers(run)


def test_a_stop_before_the_first_step_is_told_by_the_main_process(tmp_path, tiny_model):
    from kto_core.runs import run as runs
    from kto_core.runs.events import read

    run, launcher = begun(tmp_path, tiny_model, max_steps=100)
    (run.path / "stop").touch()
    assert launcher.wait(200) == 0, (run.path / "worker.log").read_text()[-3000:]
    found = read(run.path / "events.jsonl")[0]
    assert [e["state"] for e in found if e["kind"] == "status"][-1] == "stopped"
    assert not [e for e in found if e["kind"] == "error"] and runs.Run(run.path).state().state == "stopped"


def test_the_first_error_is_the_one_that_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    ranks.note_error(tmp_path, "The disk is full.")
    assert ranks.first_error(tmp_path) == "The disk is full."
    assert ranks.first_error(tmp_path, time.time() + 5) == ""  # an earlier start's
    ranks.forget_errors(tmp_path)
    assert ranks.first_error(tmp_path) == ""
    log = """
[rank1]: ValueError: rows went missing
  raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
kto_core.worker FAILED
------------------------------------------------------------
============================================================
"""
    assert ranks.said_last(log) == "[rank1]: ValueError: rows went missing"
    assert ranks.said_last("one\ntwo\n") == "two" and ranks.said_last("") == ""
