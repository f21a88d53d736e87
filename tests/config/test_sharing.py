"""A configuration as YAML and as a command line: `train` makes the same one of either."""

import shlex

import pytest

from kto_core import cli
from kto_core.cli import train
from kto_core.config import resolving, sharing
from kto_core.errors import ConfigError

SETTINGS = [
    {},
    {"beta": 0.3, "learning_rate": "auto", "max_steps": 7, "verdict": False, "lora_dropout": 0.1},
    {"run_name": "-x; rm 'a' \"b\" $HOME", "data": "/tmp/a b/ro'ws.jsonl", "target_modules": ["q_proj", "v_proj"]},
    {"num_gpus": 2},
    {"num_gpus": 2, "shard": True, "worker": "process"},
    {"engine": "unsloth", "map": "prompt=question,label=rating", "good_from": 4.0, "bad_to": -1.5},
    {"model": "owner/name", "data": "trl-lib/kto-mix-14k", "data_split": "test", "test_size": 0.0},
    {"run_name": "yes", "wandb_project": "1e3", "precompute_ref_log_probs": False, "gradient_checkpointing": "auto"},
    {"run_name": "über: # ☃"},
]


@pytest.fixture(params=SETTINGS, ids=range(len(SETTINGS)))
def config(request):
    return resolving.resolve("7b", request.param).config


def same(config):
    return config.model_dump(exclude={"alternatives"})


def from_file(tmp_path, text: str, preset=None, **overrides):
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return resolving.resolve_file(file, preset, overrides)


def test_yaml_and_back(config, tmp_path):
    assert same(from_file(tmp_path, sharing.as_yaml(config)).config) == same(config)


def test_a_command_line_and_back(config):
    program, line = "python -m kto_core ", sharing.as_command(config)
    assert line.startswith(program)
    words = shlex.split(line)[3:]
    args = cli.parser(words).parse_args(words)
    assert same(train._resolved(args).config) == same(config)


def test_the_output_folder_is_never_taken_along(tmp_path):
    config = resolving.resolve("demo", {"output_dir": str(tmp_path)}).config
    assert "output" not in sharing.as_yaml(config) and "output" not in sharing.as_command(config)


def test_settings_of_a_preset_that_is_a_file_are_all_said(tmp_path):
    preset = tmp_path / "own.yaml"
    preset.write_text("beta: 0.3\nr: 8\nmodel: a/b\n")
    config = resolving.resolve(str(preset), {}).config
    found = from_file(tmp_path, sharing.as_yaml(config)).config
    assert found.preset == "demo"
    assert found.model_dump(exclude={"preset", "alternatives"}) == config.model_dump(exclude={"preset", "alternatives"})


# ---- train --config


def test_options_go_before_the_file_and_the_file_before_the_preset(tmp_path):
    found = from_file(tmp_path, "preset: 3b\nbeta: 0.3\nr: 8\n", r="16", lora_alpha=None)
    assert (found.config.preset, found.config.beta, found.config.r) == ("3b", 0.3, 16)
    assert (found.origins["beta"], found.origins["r"]) == ("file mine.yaml", "command line")
    assert found.origins["lora_alpha"] in ("default", "preset 3b")
    assert from_file(tmp_path, "preset: 3b\nbeta: 0.3\n", "7b").config.preset == "7b"


def test_a_runs_own_settings_are_such_a_file(tmp_path):
    resolved = resolving.resolve("3b", {"beta": 0.3, "data": "x.jsonl"})
    resolving.save_config(resolved, tmp_path / "config.yaml")
    found = resolving.resolve_file(tmp_path / "config.yaml")
    assert same(found.config) == same(resolved.config) and found.origins["beta"] == "file config.yaml"
    assert sharing.changed(found) == {"beta": "0.3"}


@pytest.mark.parametrize("text", ["batchsize: 3\n", "beta: [1]\n", "- 1\n", "preset: [a]\n", "preset: nope\n",
                                  "a: &a 1\n", "beta: 1\n  r: 2"])  # fmt: skip
def test_a_file_that_is_wrong_is_refused(tmp_path, text):
    with pytest.raises(ConfigError):
        from_file(tmp_path, text)


def test_what_is_said_of_a_data_set():
    names = {"/a/b/rows.jsonl": "rows.jsonl", "owner/name": "owner/name", "": "", "owner/name.v2": "owner/name.v2"}
    for data, said in names.items():
        assert sharing.data_name(resolving.resolve("demo", {"data": data}).config) == said
    hub = resolving.resolve("demo", {"data": "owner/name", "data_split": "test"}).config
    assert sharing.data_name(hub) == "owner/name, split test"
