"""The command line: exit codes, one JSON object on stdout, flags, and real runs of a tiny model."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training import make_tiny

from kto_core import cli, config
from kto_core.cli import output, train
from kto_core.events import RunState

ROOT = Path(__file__).resolve().parent.parent
ROWS = [
    {"prompt": f"Question {i}?", "completion": "Yes." if i % 2 else "It depends on many things.", "label": i % 2 == 1}
    for i in range(16)
]


def command(*args, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "kto_core", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        **more,
    )


def called(capsys, *args) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command run in this process."""
    try:
        code = cli.main([str(a) for a in args])
    except SystemExit as e:
        code = e.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def rows_file(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    return path


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory, demo_model) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), demo_model)


# ---- help and flags


def test_help_is_quick_and_imports_nothing_heavy():
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = command("--help")
        seconds.append(time.perf_counter() - began)
        assert done.returncode == 0
        for name in ("data", "train", "runs", "chat", "export", "evaluate", "demo", "doctor"):
            assert f"\n    {name} " in done.stdout
    assert min(seconds) < 0.5
    code = "import sys; from kto_core import cli; cli.parser(['runs', 'list']); print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.split()
    heavy = {"torch", "transformers", "pandas", "datasets", "pydantic", "yaml", "numpy", "gradio", "huggingface_hub"}
    assert heavy.isdisjoint(loaded) and "kto_core.cli.train" in loaded


@pytest.mark.parametrize("name", ["data check", "data convert", "train", "runs list", "runs delete", "chat", "evaluate",
                                  "export gguf", "export push", "demo", "doctor"])  # fmt: skip
def test_every_command_has_help(capsys, name):
    code, out, _ = called(capsys, *name.split(), "--help")
    assert code == 0 and out.startswith(f"usage: python -m kto_core {name}")


def test_the_earlier_flags_are_there():
    text = """train --model-size demo --local-file rows.jsonl --output-dir out --batch-size 2 --gradient-accumulation 3
        --learning-rate 1e-5 --num-epochs 2 --max-steps 7 --max-seq-length 256 --beta 0.2 --desirable-weight 1.1
        --undesirable-weight 1.0 --engine trl --worker process --wandb --wandb-project mine --model m
        --dry-run --json"""
    line = text.split()
    args = cli.parser(line).parse_args(line)
    assert args.model_size == "demo" and args.dry_run and args.json
    assert train.overrides(args) == {
        "data": "rows.jsonl", "output_dir": "out", "per_device_train_batch_size": "2",
        "gradient_accumulation_steps": "3",
        "learning_rate": "1e-5", "num_train_epochs": "2", "max_steps": "7", "max_length": "256", "beta": "0.2",
        "desirable_weight": "1.1", "undesirable_weight": "1.0", "engine": "trl", "worker": "process",
        "report_to": "wandb", "wandb_project": "mine", "model": "m",
    }  # fmt: skip
    line = ["train", "--preset", "demo", "--dataset-name", "trl-lib/kto-mix-14k", "--resume"]
    assert train.overrides(cli.parser(line).parse_args(line)) == {"data": "trl-lib/kto-mix-14k"}


def test_every_field_has_a_flag_with_its_help(capsys):
    _, out, _ = called(capsys, "train", "--help")
    text = re.sub(r"\s+", " ", out)
    for field in config.cli_fields():
        if field.group != "Hidden":
            assert "--" + field.name.replace("_", "-") in out, field.name
            assert field.description in text or field.name in train.OWN, field.name


def test_boolean_flags_can_be_turned_off():
    line = ["train", "--no-load-in-4bit"]
    assert train.overrides(cli.parser(line).parse_args(line)) == {"load_in_4bit": False}


@pytest.mark.parametrize(
    "line",
    ["", "nonsense", "data check", "train --batch", "export gguf r --quant q9", "chat demo --json",
     "data convert a --to csv --out b", "train --data a --local-file b", "train --preset demo --model-size 3b",
     "chat demo --prompt hi --max-new-tokens 0", "chat demo --prompt hi --temperature -1", "chat demo --top-p 5",
     "chat demo --prompt hi --repetition-penalty 0", "data check a --max-length 64", "data check a --max-length -3",
     "train --preset demo --json", "train --json --local-file nope"],
)  # fmt: skip
def test_wrong_usage_is_2(capsys, line):
    code, out, err = called(capsys, *line.split())
    assert code == 2 and err and "Traceback" not in err
    assert not out or "error" in json.loads(out)


def test_all_wrong_settings_at_once_without_a_trace(capsys, rows_file):
    code, out, err = called(
        capsys, "train", "--preset", "demo", "--data", rows_file, "--batch-size", "0", "--beta", "x"
    )
    assert code == 2 and "per_device_train_batch_size" in err and "beta" in err and "Traceback" not in err and not out
    code, _, err = called(capsys, "train", "--preset", "nope", "--data", rows_file)
    assert code == 2 and "demo" in err


# ---- data


def test_data_check_json(capsys, shared_data):
    began = time.perf_counter()
    code, out, _ = called(capsys, "data", "check", shared_data / "nexus_behaviors.jsonl", "--json")
    assert time.perf_counter() - began < 3
    report = json.loads(out)
    assert code == 0 and (report["rows"], report["kept"]) == (4572, 4570) and sum(report["dropped"].values()) == 2
    assert {"format", "desirable", "undesirable", "duplicates", "conflicts", "weights", "lengths"} <= report.keys()


def test_data_check_counts_tokens(capsys, rows_file, demo_model):
    code, out, _ = called(capsys, "data", "check", rows_file, "--model", "demo", "--max-length", "24", "--json")
    report = json.loads(out)
    assert report["lengths_unit"] == "tokens" and report["truncated"] + report["too_long"] == 16
    assert code == (1 if report["too_long"] == 16 else 0)


def test_data_check_as_text(capsys, shared_data):
    code, out, _ = called(capsys, "data", "check", shared_data / "nexus_behaviors.jsonl")
    assert code == 0 and "kept 4,570" in out and "2: no assistant turn" in out


def test_one_label_is_1_and_the_report_is_shown(capsys, tmp_path):
    path = tmp_path / "good.jsonl"
    path.write_text("".join(json.dumps(r | {"label": True}) + "\n" for r in ROWS))
    code, out, err = called(capsys, "data", "check", path, "--json")
    assert code == 1 and json.loads(out)["desirable"] == 16 and "undesirable" in err
    code, out, err = called(capsys, "train", "--preset", "demo", "--data", path, "--dry-run", "--json")
    assert code == 1 and "undesirable" in err and json.loads(out)["data"]["desirable"] == 16


def test_a_missing_file_is_one_sentence(capsys, tmp_path):
    code, out, err = called(capsys, "data", "check", tmp_path / "nope.jsonl")
    assert code == 1 and not out and err.count("\n") == 1 and "Traceback" not in err
    code, out, _ = called(capsys, "data", "check", tmp_path / "nope.jsonl", "--json")
    assert code == 1 and "error" in json.loads(out)
    assert called(capsys, "train", "--local-file", tmp_path / "nope.jsonl")[0] == 2


def test_convert_there_and_back(capsys, rows_file, tmp_path):
    chatml, back = tmp_path / "chatml.jsonl", tmp_path / "trl.jsonl"
    assert called(capsys, "data", "convert", rows_file, "--to", "chatml", "--out", chatml)[0] == 0
    assert called(capsys, "data", "convert", chatml, "--to", "trl", "--out", back)[0] == 0
    rows = [json.loads(line) for line in back.read_text().splitlines()]
    assert [(r["prompt"][0]["content"], r["completion"][0]["content"], r["label"]) for r in rows] == [
        (r["prompt"], r["completion"], r["label"]) for r in ROWS
    ]


# ---- training


@pytest.mark.parametrize(
    "flags,words",
    [("--dtype float16", "float16"), ("--engine unsloth", "Unsloth"), ("--adapter /nowhere", "no adapter"),
     ("--preset 7b", "no NVIDIA GPU")],
)  # fmt: skip
def test_dry_run_refuses_what_the_run_would(capsys, rows_file, demo_model, flags, words, monkeypatch):
    monkeypatch.setattr("kto_core.hardware.devices", list)
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
    assert code == 1 and "does not run" in err
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
    from kto_core import run

    stopped = run.find(str(folder))
    assert stopped.state().state == "stopped" and stopped.checkpoints() and 1 <= stopped.state().step < steps
    again = subprocess.run([*line, "--learning-rate", "1e-3"], capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert again.returncode == 0, again.stderr
    assert (
        "going on from checkpoint-" in again.stderr and "Not used" in again.stderr and "learning_rate" in again.stderr
    )
    assert run.find(str(folder)).state().step == steps


def test_a_failed_run_is_1(rows_file, tmp_path):
    done = command("train", "--preset", "demo", "--model", tmp_path, "--data", rows_file)
    assert done.returncode in (1, 2) and "config.json" in done.stderr and "Traceback" not in done.stderr


def test_worker_process(rows_file, tiny_model):
    done = command(
        "train", "--preset", "demo", "--model", tiny_model, "--data", rows_file, "--max-steps", 1, "--max-length", 128,
        "--engine", "trl", "--worker", "process",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Run 2" in done.stderr and "outlives" in done.stderr and "Finished after 1 step" in done.stderr


# ---- chat


def test_chat_answers_once(capsys, demo_model):
    line = [
        "chat",
        "demo",
        "--prompt",
        "What is the capital of France?",
        "--temperature",
        "0",
        "--max-new-tokens",
        "12",
    ]
    code, out, _ = called(capsys, *line)
    assert code == 0 and "Paris" in out and len(out.strip().splitlines()) == 1
    code, as_json, _ = called(capsys, *line, "--json")
    found = json.loads(as_json)
    assert code == 0 and found["answer"].strip() == out.strip() and 0 < found["stats"]["tokens"] <= 12
    code, _, err = called(capsys, "chat", "nope", "--prompt", "x")
    assert code == 1 and err.count("\n") == 1


def test_a_conversation_in_the_terminal(demo_model):
    lines = "system Answer in one word.\nhello\nbase\nclear\n\nsystem\nquit\nnever read\n"
    done = command("chat", "demo", "--max-new-tokens", "4", input=lines)
    assert done.returncode == 0 and len(done.stdout.strip().splitlines()) == 1
    assert "System prompt: Answer in one word." in done.stderr and "no adapter" in done.stderr
    assert "The conversation starts anew." in done.stderr and "No system prompt." in done.stderr


# ---- the rest


def test_doctor(capsys):
    code, out, _ = called(capsys, "doctor", "--json")
    found = json.loads(out)
    assert found["ok"] is (code == 0) and any(c["name"] == "Python" for c in found["checks"])
    assert {"name", "ok", "value", "remedy"} <= found["checks"][0].keys()


def test_a_reader_that_goes_away_is_no_noise(runs_dir):
    pipe, write = os.pipe()
    os.close(pipe)
    done = subprocess.run(
        [sys.executable, "-m", "kto_core", "doctor"], stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    os.close(write)
    assert done.returncode == output.PIPE and "Broken" not in done.stderr and "Traceback" not in done.stderr


def test_what_libraries_print_does_not_reach_the_json(capfd):
    code = (
        "import argparse, os, sys\n"
        "from kto_core.cli import output\n"
        "def run(args):\n"
        "    print('python noise'); os.write(1, b'native noise\\n'); output.emit({'a': 1}); return 0\n"
        "sys.exit(output.guarded(argparse.Namespace(json=True, run=run)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and json.loads(done.stdout) == {"a": 1}
    assert "python noise" in done.stderr and "native noise" in done.stderr


def test_progress_line():
    from kto_core.cli.follow import progress_line

    assert (
        progress_line({"step": 3, "loss": 0.5, "kl": 0.01, "eta": 75}, 9)
        == "step 3/9  loss 0.5000  kl 0.010  eta 1 min 15 s"
    )
    assert progress_line({"step": 3}, 0) == "step 3/?"
    assert RunState().state == "preparing"


def test_cache_is_shown_and_cleared(tmp_path, monkeypatch, capsys):
    from kto_core.cli import main
    from kto_core.engine.reference import folder

    monkeypatch.setenv("KTO_STUDIO_CACHE", str(tmp_path))
    folder().mkdir(parents=True)
    (folder() / "logps.sqlite").write_bytes(b"x" * 5000)
    assert main(["cache", "--json"]) == 0 and json.loads(capsys.readouterr().out)["bytes"] == 5000
    assert main(["cache", "--clear", "--json"]) == 0 and json.loads(capsys.readouterr().out)["freed_bytes"] == 5000
    assert main(["cache"]) == 0 and capsys.readouterr().out.startswith("0.0 MB")
