"""The command line trains: progress, stops, resumes, and what a dry run says."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import called, command
from tests.support.training import make_tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory, demo_model) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), demo_model)


# ---- training


@pytest.mark.parametrize(
    "flags,words",
    [("--dtype float16", "float16"), ("--engine unsloth", "Unsloth"),
     ("--adapter /nowhere", "does not contain an adapter"),
     ("--preset 7b", "no NVIDIA GPU")],
)  # fmt: skip
def test_dry_run_refuses_what_the_run_would(capsys, rows_file, demo_model, flags, words, monkeypatch):
    monkeypatch.setattr("kto_core.hardware.gpus.devices", list)
    preset = [] if "--preset" in flags else ["--preset", "demo"]
    code, out, err = called(capsys, "train", *preset, "--data", rows_file, "--dry-run", "--json", *flags.split())
    assert code == 1 and words in err and "Traceback" not in err
    assert words in (json.loads(out).get("problem") or json.loads(out)["error"])


def test_dry_run_json(capsys, rows_file, demo_model, runs_dir):
    code, out, _ = called(
        capsys, "train", "--model-size", "demo", "--local-file", rows_file, "--batch-size", "2",
        "--gradient-accumulation", "2", "--max-seq-length", "128", "--dry-run", "--json",
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0 and found["steps"] == 4 and found["data"]["kept"] == 16
    assert found["config"]["per_device_train_batch_size"] == 2 and found["config"]["max_length"] == 128
    assert {
        "gradient_accumulation_steps",
        "learning_rate",
        "beta",
        "lr_scheduler_type",
        "optim",
        "r",
        "lora_alpha",
    } <= (found["config"].keys())
    assert {"predicted_gib", "available_gib", "verdict"} <= found["memory"].keys()
    assert not runs_dir.exists()


def test_train_then_look_and_delete(capsys, rows_file, tiny_model, runs_dir):
    done = command(
        "train", "--preset", "demo", "--model", tiny_model, "--data", rows_file, "--max-steps", 2, "--max-length", 128,
        "--engine", "trl", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)  # one object and nothing else
    assert summary["state"] == "finished" and summary["step"] == 2 and Path(summary["adapter"]).is_dir()
    assert re.search(r"step 2/2 .*loss 0\.\d+", done.stderr), done.stderr

    code, out, _ = called(capsys, "runs", "list", "--json")
    assert code == 0 and [r["id"] for r in json.loads(out)["runs"]] == [summary["id"]]
    code, out, _ = called(capsys, "runs", "list")
    assert "finished" in out and "2/2" in out
    code, out, _ = called(capsys, "runs", "show", runs_dir / summary["id"], "--json")
    shown = json.loads(out)
    assert (
        shown["origins"]["max_steps"] == "command line" and shown["config"]["r"] == 16 and shown["metrics"]["step"] == 2
    )
    assert called(capsys, "runs", "show", summary["id"])[0] == 0

    code, _, err = called(capsys, "runs", "stop", summary["id"])
    assert code == 1 and "is not running" in err
    code, _, err = called(capsys, "runs", "resume", summary["id"])
    assert code == 1 and "finished" in err
    assert called(capsys, "runs", "delete", summary["id"], "--yes")[0] == 0 and not (runs_dir / summary["id"]).exists()
    assert called(capsys, "runs", "show", summary["id"])[0] == 1


def test_a_prepared_run_is_trained_by_the_worker_alone(capsys, rows_file, tiny_model, tmp_path):
    """As README says for several machines, with one process."""
    code, out, _ = called(
        capsys, "train", "--preset", "demo", "--model", tiny_model, "--data", rows_file, "--max-steps", 2,
        "--max-length", 128, "--output-dir", tmp_path / "run", "--prepare",
    )  # fmt: skip
    assert code == 0 and Path(out.strip()) == tmp_path / "run" and not (tmp_path / "run" / "adapter").exists()
    worker = [sys.executable, "-m", "kto_core.worker", str(tmp_path / "run")]
    done = subprocess.run(worker, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    code, out, _ = called(capsys, "runs", "show", tmp_path / "run", "--json")
    assert json.loads(out)["state"] == "finished" and (tmp_path / "run" / "adapter").is_dir()


def test_ctrl_c_saves_and_the_same_command_goes_on(rows_file, tiny_model, tmp_path):
    folder, steps = tmp_path / "mine", 150  # seconds, for a signal that comes late on a busy machine
    line = [sys.executable, "-m", "kto_core", "train", "--preset", "demo", "--model", str(tiny_model), "--data",
            str(rows_file), "--output-dir", str(folder), "--max-steps", str(steps), "--max-length", "128",
            "--engine", "trl", "--save-steps", "1000"]  # fmt: skip
    running = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT)
    try:
        seen = ""
        for text in running.stderr:
            seen += text
            if text.startswith("step 1/"):
                running.send_signal(signal.SIGINT)
                break
        seen += running.stderr.read()
        assert running.wait(timeout=60) == 130, seen
    finally:
        running.kill()
    assert "Traceback" not in seen and "runs resume" in seen
    from kto_core.runs import folders

    stopped = folders.find(str(folder))
    assert stopped.state().state == "stopped" and stopped.checkpoints() and 1 <= stopped.state().step < steps
    again = subprocess.run([*line, "--learning-rate", "1e-3"], capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert again.returncode == 0, again.stderr
    assert "resuming from checkpoint-" in again.stderr and "Ignored" in again.stderr and "learning_rate" in again.stderr
    assert folders.find(str(folder)).state().step == steps


def test_a_failed_run_is_1(rows_file, tmp_path):
    done = command("train", "--preset", "demo", "--model", tmp_path, "--data", rows_file)
    assert done.returncode in (1, 2) and "config.json" in done.stderr and "Traceback" not in done.stderr


def test_worker_process(rows_file, tiny_model):
    done = command(
        "train", "--preset", "demo", "--model", tiny_model, "--data", rows_file, "--max-steps", 1, "--max-length", 128,
        "--engine", "trl", "--worker", "process",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        "Run 2" in done.stderr
        and "continues after this terminal is closed" in done.stderr
        and "Finished after 1 step" in done.stderr
    )
