"""The command line: exit codes, one JSON object on stdout, flags, and real runs of a tiny model."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kto_core import cli
from kto_core.cli import output, train
from kto_core.config import resolving
from kto_core.runs.events import RunState
from tests.support.commands import ROWS, called, command, processor_seconds

ROOT = Path(__file__).resolve().parents[2]


# ---- help and flags


def test_help_is_quick_and_imports_nothing_heavy():
    seconds = []
    for _ in range(3):
        done, took = processor_seconds(sys.executable, "-m", "kto_core", "--help")
        seconds.append(took)
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
    for field in resolving.cli_fields():
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


@pytest.mark.parametrize("more", [(), ("--dry-run", "--json")])
def test_a_length_beyond_the_models_positions_is_refused_before_anything_is_made(capsys, rows_file, runs_dir, more):
    line = ("--preset", "demo", "--local-file", rows_file, "--max-length", "8193")
    rc, out, err = called(capsys, "train", *line, *more)
    assert rc == 2 and "max_length: must be 16 to 8192, the context length of demo, not 8193." in (out if more else err)
    assert not list(runs_dir.glob("*"))


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
    assert code == 1 and json.loads(out)["desirable"] == 16 and "Add bad rows" in err
    code, out, err = called(capsys, "train", "--preset", "demo", "--data", path, "--dry-run", "--json")
    assert code == 1 and "Add bad rows" in err and json.loads(out)["data"]["desirable"] == 16


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
    assert "Conversation cleared." in done.stderr and "No system prompt." in done.stderr


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
