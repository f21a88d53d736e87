"""The sweep of benchmarks/learning.py on a CPU: the product's step, resumable, its measures, its report."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.training import make_data

ROOT = Path(__file__).resolve().parent.parent
SWEEP = [sys.executable, str(ROOT / "benchmarks" / "learning.py"), "sweep"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model) -> Path:
    """A tiny model and 120 rows, a tenth of the questions held out; a plan of three trainings."""
    import learning_inputs

    folder = tmp_path_factory.mktemp("inputs")
    data = make_data(folder / "rows.jsonl", 120)
    listed = learning_inputs.prepare(folder, {"tiny": tiny_model}, {"sums": data}, {}, [], {}, 256)
    listed["plan"] = {"rates": [1e-3, 1e-2, 1e-1], "seeds": [0], "changes": False}
    (folder / "settings.json").write_text(json.dumps(listed))
    (folder / "models").mkdir()
    (folder / "models" / "tiny").symlink_to(tiny_model)
    return folder


def job(**other):
    from learning_plan import Job

    return Job("tiny-sums", "base", **{"rate": 1e-2, "seed": 5, "batch": 8, "r": 4, "alpha": 8, **other})


@pytest.fixture
def loaded(inputs, tiny_model, tmp_path):
    import learning_model

    defaults = json.loads((inputs / "settings.json").read_text())["defaults"]
    model = learning_model.Model(tiny_model, "float32", 4, 8, defaults, tmp_path / "cache")
    return model, learning_model.Data.load(inputs / "tiny-sums.npz"), defaults


def test_a_training_of_the_sweep_is_the_products(loaded, tiny_model, tmp_path):
    """Loss for loss, and the same adapter in the end as `PackedKTOTrainer` with the product's arguments."""
    import learning_run
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from kto_core.config import resolving
    from kto_core.engine import PackedKTOTrainer
    from kto_core.models.load import lora_config
    from kto_core.training import trainer

    model, data, defaults = loaded
    found = learning_run.train(model, data.train, job(), defaults)
    cfg = resolving.RunConfig(
        model=str(tiny_model), per_device_train_batch_size=8, gradient_accumulation_steps=1, learning_rate=1e-2, seed=5,
        r=4, lora_alpha=8, load_in_4bit=False, data="rows.jsonl", max_length=256,
    )  # fmt: skip
    args = trainer.arguments(cfg, tmp_path / "run", rate=1e-2, precompute=False, checkpointing=None, evaluate=False)
    args.save_strategy = "no"
    rows = data.train
    columns = {
        "prompt_ids": [r.tolist() for r in map(rows.prompt.__getitem__, range(len(rows)))],
        "completion_ids": [r.tolist() for r in map(rows.completion.__getitem__, range(len(rows)))],
        "label": rows.labels.tolist(),
    }
    ours = {n: p.detach().clone() for n, p in model.parameters.items()}
    model.reset(5, "B=0")
    start = {n: p.detach().clone() for n, p in model.parameters.items()}
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    product = PackedKTOTrainer(
        base, args=args, train_dataset=Dataset.from_dict(columns),
        peft_config=lora_config(cfg, base), reference_cache=False,
    )  # fmt: skip
    theirs = {n: p for n, p in product.model.named_parameters() if p.requires_grad}
    assert theirs.keys() == start.keys()
    for name, p in theirs.items():
        p.data.copy_(start[name])
    product.train()
    losses = [h["loss"] for h in product.state.log_history if "loss" in h]
    assert len(losses) == found["steps"] > 4
    assert found["losses"] == pytest.approx(losses, abs=2e-4)
    for name, p in theirs.items():
        assert torch.allclose(p, ours[name], atol=1e-6), name
    assert max((ours[n] - start[n]).abs().max() for n in ours) > 1e-3  # it did move
    assert found["rate_first"] == 0 and found["rate_sum"] > 0


def test_either_matrix_may_begin_at_zero_and_neither_changes_the_model(loaded):
    from learning_held import HeldOut

    model, data, _ = loaded
    held = HeldOut(model, data)
    for start, zero in (("B=0", "lora_B"), ("A=0", "lora_A")):
        model.reset(1, start)
        assert all((not p.any()) == (zero in name) for name, p in model.parameters.items())
        values, gains = held.measure(model, 0.1)
        assert np.abs(gains).max() < 1e-4 and values["moved"] < 1e-4
        assert values["loss"] == pytest.approx(0.5, abs=1e-4)
        assert held.changed(model)[0] == 0


def test_a_changed_answer_is_seen_without_generating(loaded):
    """Teacher forcing along the base's answers says the same of each as generating anew."""
    from learning_held import HeldOut
    from learning_run import train

    model, data, defaults = loaded
    held = HeldOut(model, data)
    train(model, data.train, job(rate=0.05), defaults)
    again = held.greedy(model)
    assert 0 < held.changed(model)[0] == sum(a != b for a, b in zip(again, held.answers, strict=True))


def test_measures_are_what_their_names_say():
    from learning_held import measures

    labels = np.array([True, True, False, False])
    own, other = np.array([2.0, 1.0, -1.0, -3.0]), np.array([1.0, 3.0, -4.0, -2.0])
    got = measures(own, other, labels, np.array([0, 0, 1, 1]), np.array([1, 2, 3, 4]), np.array([0, 2]), 0.5)
    z0 = [2.0, 2.0, 0.0, 0.0]  # the second group's mean is below zero
    loss = [1 / (1 + np.exp(s * 0.5 * (r - z))) for s, r, z in zip([1, 1, -1, -1], own, z0, strict=True)]
    assert got["loss"] == pytest.approx(np.mean(loss))
    assert (got["chosen"], got["rejected"], got["margin"]) == pytest.approx((0.75, -1.0, 1.75))
    assert (got["auc"], got["accuracy"], got["moved"], got["moved_token"]) == pytest.approx((1, 1, 1.75, 0.7))
    assert (got["drift"], got["kl"]) == pytest.approx((-0.5, 1.0))
    assert got["margin_se"] == pytest.approx(np.sqrt(0.125 / 2 + 0.5 / 2))
    alone = measures(own, other, labels, np.arange(4), np.ones(4), np.array([0]), 0.5)
    assert alone["margin_se_question"] == pytest.approx(got["margin_se"] * np.sqrt(4 / 3 * 0.5))


def test_no_question_lies_on_both_sides():
    from learning_inputs import question, split

    from kto_core.data.records.rows import Row

    rows = [
        Row([{"role": "system", "content": str(i)}, {"role": "user", "content": asked}], [], True, i)
        for i in range(50)
        for asked in (f"What is {i % 20}?", f" what IS\n{i % 20}? ")
    ]
    train, held = split(rows, 0.1)
    assert sorted(train + held) == list(range(100)) and 0 < len(held) <= 10
    assert not {question(rows[i]) for i in train} & {question(rows[i]) for i in held}


def test_the_list_is_ordered_by_worth_and_waits_for_the_base_curve():
    from learning_plan import CHANGES, RATES, stages

    settings = {"a": {"rows": 5000}, "b": {"rows": 250}}
    first = stages(settings, {})
    assert [len(jobs) for _, jobs in first[:5]] == [20, 20, 20, 2, 20]
    assert not any(jobs for _, jobs in first[5:])
    done = {j.id: {"loss": abs(RATES.index(j.rate) - 6) * 0.1} for j in first[0][1]}
    later = stages(settings, done)
    ids = [j.id for _, jobs in later for j in jobs]
    assert len(ids) == len(set(ids))
    changes = [jobs for name, jobs in later if name in {f"{c[0]}, seed 0" for c in CHANGES}]
    assert all({j.setting for j in jobs} <= {"a", "b"} and len(jobs) in (4, 8) for jobs in changes)
    assert {j.setting for jobs in changes for j in jobs if "rows" in j.change and j.batch == 32} == {"a"}
    assert [j.rate for j in changes[0] if j.setting == "a"] == [5e-5, 1e-4, 2e-4, 5e-4]


def test_a_torn_line_is_not_a_result_and_does_not_spoil_the_next(tmp_path):
    from learning import append, read

    file = tmp_path / "results.jsonl"
    append(file, {"id": "one", "loss": 1})
    with open(file, "a") as f:
        f.write('{"id": "two", "lo')
    append(file, {"id": "three", "loss": 3})
    append(file, {"id": "one", "loss": 4})
    assert {k: r["loss"] for k, r in read(file).items()} == {"one": 1, "three": 3}


@pytest.mark.timeout(1500)
def test_a_sweep_that_is_killed_goes_on_without_loss_or_repetition(inputs, tmp_path):
    import learning_report

    work = tmp_path / "work"
    command = [*SWEEP, "--inputs", str(inputs), "--work", str(work), "--workers", "2"]
    results = work / "results.jsonl"
    sweep = subprocess.Popen(command, start_new_session=True)
    end = time.monotonic() + 500
    while not (results.exists() and results.read_bytes().count(b"\n")) and time.monotonic() < end:
        time.sleep(0.01)
    assert results.exists(), (work / "worker-0.log").read_text()[-2000:]
    os.killpg(sweep.pid, signal.SIGKILL)
    sweep.wait()
    first = results.read_bytes()
    assert 1 <= first.count(b"\n") <= 3
    subprocess.run(command, check=True, timeout=500)
    after = results.read_bytes()
    assert after.startswith(first[: first.rindex(b"\n") + 1])
    records = [json.loads(line) for line in after.splitlines()]
    assert sorted(r["rate"] for r in records) == [1e-3, 1e-2, 1e-1]
    assert not (work / "errors.jsonl").exists()
    gains = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    assert {len(g["gain"]) for g in gains} == {records[0]["held_rows"]}
    assert {g["id"] for g in gains} == {r["id"] for r in records}
    subprocess.run(command, check=True, timeout=500)  # nothing is left
    assert results.read_bytes() == after

    out = tmp_path / "docs"
    assert learning_report.main(["--inputs", str(inputs), "--results", str(results), "--out", str(out)]) == 0
    text = (out / "learning.md").read_text()
    assert "tiny-sums" in text and "0.01" in text
    for name in text.split("](")[1:]:
        assert (out / name.split(")")[0]).exists()
