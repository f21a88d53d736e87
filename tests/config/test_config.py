"""Configuration: presets' contract values, origins, all problems at once, config.yaml and back."""

import json
import math
import re

import pytest
import yaml

from kto_core import paths
from kto_core.config import resolving as C
from kto_core.config.remarks import remarks
from kto_core.errors import ConfigError
from kto_core.hardware import gpus
from kto_core.models import shape
from kto_core.planning import checks, memory

CONTRACT = {  # preset: batch, accumulation, r, alpha, beta, max length
    "demo": (4, 2, 16, 32, 0.5, 512),
    "3b": (8, 4, 32, 64, 0.1, 2048),
    "4b": (8, 4, 32, 64, 0.1, 2048),
    "7b": (4, 8, 64, 128, 0.1, 2048),
    "8b": (4, 8, 64, 128, 0.1, 2048),
    "13b": (2, 16, 64, 128, 0.1, 2048),
    "14b": (2, 16, 64, 128, 0.1, 2048),
    "20b": (4, 8, 128, 256, 0.05, 4096),
    "27b": (2, 16, 16, 32, 0.1, 2048),
    "30b-a3b": (2, 16, 32, 64, 0.1, 2048),
}


def problems(preset="demo", **overrides) -> list[str]:
    with pytest.raises(ConfigError) as e:
        checks.check_length(C.resolve(preset, overrides).config)
    return e.value.problems


@pytest.mark.parametrize("name", CONTRACT)
def test_shipped_preset(name):
    c = C.resolve(name).config
    assert (
        c.per_device_train_batch_size, c.gradient_accumulation_steps, c.r, c.lora_alpha, c.beta, c.max_length
    ) == CONTRACT[name]  # fmt: skip
    assert c.preset == name
    assert (c.lr_scheduler_type, c.warmup_ratio, c.optim, c.seed, c.num_train_epochs) == (
        "cosine", 0.1, "adamw_8bit", 3407, 1.0
    )  # fmt: skip
    assert (c.desirable_weight, c.undesirable_weight) == (1, 1)
    assert c.target_modules == "all-linear"
    assert (c.bnb_4bit_quant_type, c.bnb_4bit_use_double_quant, c.gradient_checkpointing) == ("nf4", True, "auto")
    if name == "demo":
        assert (c.model, c.load_in_4bit, c.learning_rate) == ("demo", False, 1e-4)
    else:
        assert c.learning_rate == "auto" and c.load_in_4bit
        assert c.alternatives and all(re.fullmatch(r"[\w.-]+/[\w.-]+", m) for m in [c.model, *c.alternatives])
        sizes = [shape.find(m) for m in [c.model, *c.alternatives]]
        assert all(s and s.exact and s.max_position_embeddings >= c.max_length for s in sizes)


@pytest.mark.parametrize("name", [name for name in CONTRACT if name != "demo"])
def test_a_preset_says_what_its_models_need_in_24_gib(name, monkeypatch):
    """Rows as long as it takes, by the plan; the default model fits, and the packed engine has a place for its type."""
    monkeypatch.setattr(gpus, "memory_gib", lambda: (64.0, 50.0))
    c = C.resolve(name).config
    text = (paths.PRESETS / f"{name}.yaml").read_text(encoding="utf-8")
    length, low, high = re.search(r"rows of ([\d,]+) tokens .* foretells ([\d.]+) to ([\d.]+) GiB", text).groups()
    assert int(length.replace(",", "")) == c.max_length
    plans = [
        memory.plan(c.model_copy(update={"model": m}), [c.max_length] * 320, device=gpus.imagined(24))
        for m in [c.model, *c.alternatives]
    ]
    assert plans[0].verdict == "fits"
    needs = [p.predicted_gib for p in plans]
    assert (min(needs), max(needs)) == pytest.approx((float(low), float(high)), abs=0.2)


@pytest.mark.parametrize("name", [name for name in CONTRACT if name != "demo"])
def test_the_packed_engine_serves_a_presets_models(name):
    from transformers import CONFIG_MAPPING

    from kto_core.engine import available

    c = C.resolve(name).config
    for model in [c.model, *c.alternatives]:
        ok, why = available(CONFIG_MAPPING[shape.find(model).architecture](), c.max_length)
        assert ok, why


@pytest.mark.parametrize("name", CONTRACT)
def test_every_key_of_a_preset_has_a_comment(name):
    lines = (paths.PRESETS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    keys = [i for i, line in enumerate(lines) if re.match(r"\w+:", line)]
    assert len(keys) >= 9
    assert all(lines[i - 1].startswith("# ") for i in keys)


def test_a_preset_holds_only_what_it_decides():
    defaults = C.RunConfig()
    for name, values in C.presets().items():
        same = {k for k, v in values.items() if k != "description" and getattr(defaults, k) == v}
        stated = {"per_device_train_batch_size", "gradient_accumulation_steps", "r", "lora_alpha", "beta", "max_length"}
        assert same <= stated | {"model"}, f"{name}: {same} only repeat the default"
    assert list(C.presets()) == ["demo", "3b", "4b", "7b", "8b", "13b", "14b", "20b", "27b", "30b-a3b"]
    assert all(v["description"] for v in C.presets().values())


def test_default_preset_follows_the_gpu(monkeypatch):
    monkeypatch.setattr(gpus, "devices", list)
    assert C.resolve().config.preset == "demo"
    monkeypatch.setattr(gpus, "devices", lambda: ["a GPU"])
    assert C.resolve("").config.preset == "7b"


def test_origins():
    r = C.resolve("7b", {"learning_rate": "1e-6", "beta": 0.1, "max_steps": None}, "user interface")
    assert r.origins["learning_rate"] == "user interface"
    assert r.origins["beta"] == "preset 7b"  # the same value again changes nothing
    assert r.origins["r"] == "preset 7b"
    assert r.origins["seed"] == r.origins["max_steps"] == "default"
    assert set(r.origins) == set(C.RunConfig.model_fields)


def test_text_from_the_command_line_becomes_values():
    c = C.resolve(
        "demo",
        {
            "learning_rate": "5e-7", "per_device_train_batch_size": " 8 ", "gradient_checkpointing": "true",
            "load_in_4bit": "false", "target_modules": "q_proj, v_proj", "num_train_epochs": "0.5", "engine": "trl",
        },
    ).config  # fmt: skip
    assert c.learning_rate == 5e-7 and c.per_device_train_batch_size == 8 and c.num_train_epochs == 0.5
    assert c.gradient_checkpointing is True and c.load_in_4bit is False
    assert c.target_modules == ["q_proj", "v_proj"]
    assert C.resolve("demo", {"target_modules": "all-linear"}).config.target_modules == "all-linear"


def test_all_problems_at_once_each_naming_field_and_range():
    found = problems(
        learning_rate="fast", beta=-1, per_device_train_batch_size=1, gradient_accumulation_steps=1,
        target_modules="q_proj,lm_head", max_steps=0, loss_type="dpo", r=0, desirable_weight=0, learning_rat=1,
    )  # fmt: skip
    text = "\n".join(found)
    for field, valid in {
        "learning_rate": "above 0 and at most 0.1", "beta": "above 0 and at most 10", "r": "from 1 to 1024",
        "desirable_weight": "above 0", "loss_type": "kto, apo_zero_unpaired", "max_steps": "at least 1",
        "per_device_train_batch_size": "at least 2", "target_modules": "q_proj",
    }.items():  # fmt: skip
        assert any(p.startswith(f"{field}: ") and valid in p for p in found), (field, text)
    assert any("Did you mean learning_rate?" in p for p in found)
    assert len(found) == 9, text


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("learing_rate", "learning_rate"), ("batch_size", "per_device_train_batch_size"), ("max_seq_length", "max_length"),
     ("lr", "learning_rate"), ("lora_rank", "r"), ("warmup_ration", "warmup_ratio")],
)  # fmt: skip
def test_unknown_keys_are_refused_with_the_nearest_name(typed, meant):
    assert problems(**{typed: 1}) == [f"{typed}: unknown setting. Did you mean {meant}?"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}, "per_device_train_batch_size"),
        ({"per_device_train_batch_size": 1, "kl_group": "microbatch"}, "per_device_train_batch_size"),
        ({"per_device_train_batch_size": 1, "engine": "trl"}, "per_device_train_batch_size"),
        ({"target_modules": "lm_head"}, "target_modules"),
        ({"target_modules": "model.embed_tokens,q_proj"}, "target_modules"),
        ({"target_modules": ""}, "target_modules"),
        ({"target_modules": "all-linear,q_proj"}, "target_modules"),
        ({"undesirable_weight": 0}, "undesirable_weight"),
        ({"num_train_epochs": math.inf}, "num_train_epochs"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"engine": "unsloth", "worker": "thread"}, "worker"),
        ({"num_gpus": 2, "worker": "thread"}, "worker"),
        ({"num_gpus": 2, "engine": "unsloth"}, "num_gpus"),
        ({"engine": "packed", "precompute_ref_log_probs": "false"}, "precompute_ref_log_probs"),
        ({"max_length": 8193}, "max_length"),  # the demo model's positions end at 8192
        ({"model": ""}, "model"),
        ({"run_name": "../x"}, "run_name"),
    ],
)
def test_refused(changes, field):
    found = problems(**changes)
    assert len(found) == 1 and found[0].startswith(f"{field}: "), found


@pytest.mark.parametrize(
    "changes",
    [
        {"per_device_train_batch_size": 1},  # 1 × 2: the KL group is the whole step
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "num_gpus": 2},
        {"per_device_train_batch_size": 1, "engine": "trl", "loss_type": "apo_zero_unpaired"},
        {"max_length": 8192},
        {"desirable_weight": 1.33},
    ],
)
def test_accepted(changes):
    C.resolve("demo", changes)


def test_max_length_is_compared_with_the_models_own_configuration(tmp_path):
    sizes = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 1024}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    (found,) = problems(model=str(tmp_path), max_length=1025)
    assert "16 to 1024" in found
    checks.check_length(C.resolve("demo", {"model": str(tmp_path), "max_length": 1024}).config)
    unknown = C.resolve("demo", {"model": "nobody/unheard-of", "max_length": 100_000}).config
    checks.check_length(unknown)  # nothing is known, nothing refused


def test_worker_follows_engine_and_gpus():
    r = C.resolve("7b", {"engine": "unsloth"})
    assert r.config.worker == "process" and r.origins["worker"] == "because of engine"
    r = C.resolve("7b", {"num_gpus": 2})
    assert r.config.worker == "process" and r.origins["worker"] == "because of num_gpus"
    assert C.resolve("7b").config.worker == "thread"
    assert C.RunConfig(engine="unsloth").worker == "process"


def test_remarks_on_two_weights():
    assert not remarks(C.resolve("demo", {"desirable_weight": 1.3}).config)
    (remark,) = remarks(C.resolve("demo", {"desirable_weight": 1.3, "undesirable_weight": 2}).config)
    assert "0.65" in remark


@pytest.mark.parametrize(
    ("without_effect", "with_effect"),
    [
        ({"lora_dropout": 0.1}, {"lora_dropout": 0}),
        ({"lora_dropout": 0.1, "engine": "packed"}, {"engine": "packed"}),
        ({"warmup_ratio": 0.3, "lr_scheduler_type": "constant"}, {"warmup_ratio": 0.3}),
        ({"kl_group": "microbatch", "loss_type": "apo_zero_unpaired"}, {"kl_group": "microbatch"}),
        ({"wandb_project": "x", "report_to": "tensorboard"}, {"wandb_project": "x", "report_to": "trackio"}),
    ],
)
def test_a_setting_without_effect_is_named(without_effect, with_effect):
    (remark,) = remarks(C.resolve("demo", without_effect).config)
    assert remark.startswith(next(iter(without_effect))) and "no effect" in remark
    assert not remarks(C.resolve("demo", with_effect).config)


def test_round_trip_is_exact(tmp_path):
    r = C.resolve(
        "7b",
        {"learning_rate": 1.23456789012345e-7, "run_name": "a: b # c 'd' 👍", "data": "yes",
         "target_modules": "all-linear", "gradient_checkpointing": "false", "num_gpus": 2, "data_split": "1e3"},
    )  # fmt: skip
    path = tmp_path / "config.yaml"
    C.save_config(r, path)
    assert C.load_config(path) == r
    whole = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for kept in range(2, len(whole)):  # wherever it is cut: what is missing never becomes a default
        path.write_text("".join(whole[:kept]), encoding="utf-8")
        with pytest.raises(ConfigError):
            C.load_config(path)
    path.write_text("".join(whole), encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]  # written beside and renamed
    lines = path.read_text(encoding="utf-8").splitlines()
    assert "r: 64  # preset 7b" in lines and "seed: 3407  # default" in lines
    again = C.resolve(str(path), {"beta": 0.2})  # a run's settings as a preset
    assert again.config.learning_rate == r.config.learning_rate and again.origins["beta"] == "command line"


def test_a_broken_file_is_one_clear_error(tmp_path):
    path = tmp_path / "config.yaml"
    with pytest.raises(ConfigError, match=r"cannot be read.*Check its name"):
        C.load_config(path)
    path.write_text("r: [1, 2")
    with pytest.raises(ConfigError, match="no valid YAML"):
        C.load_config(path)
    path.write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match="name: value"):
        C.resolve(str(path))
    path.write_text("r: 16\nlora_alfa: 32\nbeta: 99\n")
    with pytest.raises(ConfigError) as e:
        C.load_config(path)
    assert len(e.value.problems) == 2 and all("config.yaml" in p for p in e.value.problems)
    with pytest.raises(ConfigError) as e:
        C.resolve("7", {})
    assert "demo, 3b, 4b, 7b, 8b, 13b, 14b, 20b, 27b, 30b-a3b" in str(e.value)


def test_a_faulty_preset_file_can_be_mended_by_an_override(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("r: 0\nbeta: 0.3\n")
    with pytest.raises(ConfigError, match=r"^r: must be"):
        C.resolve(str(path))
    r = C.resolve(str(path), {"r": 8})
    assert (r.config.r, r.config.beta, r.origins["r"]) == (8, 0.3, "command line")


def test_as_trl_has_the_contract_names():
    found = C.as_trl(C.resolve("7b").config)
    json.dumps(found)
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "beta", "max_length",
                 "lr_scheduler_type", "optim", "r", "lora_alpha", "warmup_ratio", "seed", "loss_type"):  # fmt: skip
        assert name in found
    assert found["effective_batch_size"] == 32


def test_names_are_those_of_trl_and_peft():
    import dataclasses

    from peft import LoraConfig
    from trl import KTOConfig

    kto = {f.name for f in dataclasses.fields(KTOConfig)}
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "num_train_epochs",
                 "max_steps", "max_length", "beta", "desirable_weight", "undesirable_weight", "loss_type", "optim",
                 "lr_scheduler_type", "weight_decay", "max_grad_norm", "seed", "eval_steps", "logging_steps",
                 "save_steps", "save_total_limit", "gradient_checkpointing", "precompute_ref_log_probs", "report_to",
                 "run_name", "warmup_steps"):  # fmt: skip
        assert name in kto and name in C.as_trl(C.RunConfig()), name
    lora = {f.name for f in dataclasses.fields(LoraConfig)}
    assert {"r", "lora_alpha", "lora_dropout", "target_modules"} <= lora


def test_controls_cover_every_field_once():
    controls = C.cli_fields()
    assert [c.name for c in controls] == list(C.RunConfig.model_fields)
    flags = [f for c in controls for f in c.flags]
    assert len(flags) == len(set(flags))
    wanted = {"--batch-size", "--gradient-accumulation", "--learning-rate", "--num-epochs", "--max-steps",
              "--max-seq-length", "--beta", "--desirable-weight", "--undesirable-weight", "--engine", "--worker",
              "--model", "--output-dir", "--data", "--local-file", "--dataset-name", "--model-size", "--wandb",
              "--wandb-project", "--preset"}  # fmt: skip
    assert wanted <= set(flags)
    by_name = {c.name: c for c in controls}
    assert by_name["beta"].type is float and by_name["beta"].maximum == 10
    assert by_name["engine"].choices == ("auto", "packed", "unsloth", "trl")
    assert by_name["gradient_checkpointing"].choices == ("auto", True, False)
    assert by_name["target_modules"].type is list and by_name["load_in_4bit"].type is bool
    assert all(c.description.endswith(".") and c.help for c in controls)


def test_shipped_files_are_plain_yaml():
    for path in paths.PRESETS.glob("*.yaml"):
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["description"]
