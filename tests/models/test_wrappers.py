"""Models that also take images: loaded without their towers, trained, answered with and merged as what they are."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from kto_core.config import resolving
from kto_core.errors import ModelError
from kto_core.export import merging
from kto_core.models import load
from kto_core.models.language.part import decoder_of
from kto_core.models.language.targets import excluded, linear_layers, suffixes
from kto_core.models.shape import ATTENTION, FFN, from_config
from kto_core.planning.dry_run import dry_run
from kto_core.runs.events import fold, read
from tests.support import oracle
from tests.support.training import make_data, make_wrapper, resolved

ALL = list(oracle.WRAPPERS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("rows") / "data.jsonl")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, tiny_model):
    made = {}

    def folder(architecture):
        if architecture not in made:
            where = tmp_path_factory.mktemp("wrapper") / "model"
            made[architecture] = make_wrapper(where, tiny_model, architecture)
        return made[architecture]

    return folder


def whole(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("architecture", ALL)
def test_the_tower_is_left_out_and_the_text_stays_the_same(architecture, folder_of, data):
    folder = folder_of(architecture)
    config = resolved(folder, data).config
    model, theirs = load.load_base(config, for_training=False), whole(folder)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5)
    left = {name for name, _ in model.named_parameters()}
    assert len(left) < sum(1 for _ in theirs.parameters())
    assert all(".language_model." in n or n.startswith("lm_head") for n in left)

    adapted = load.add_adapter(model, config)
    adapters = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert adapters and all(".language_model." in n for n in adapters)
    with torch.no_grad():
        assert adapted.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


@pytest.mark.parametrize("architecture", ALL)
def test_the_whole_model_gets_adapters_in_its_language_model_only(architecture, folder_of, data):
    """With the tower in place, as in a dry run: by name, and by all-linear."""
    folder = folder_of(architecture)
    for targets in ("all-linear", ["q_proj", "down_proj"]):
        config = resolved(folder, data, target_modules=targets).config
        model = load.without_weights(config, folder)
        adapters = [n for n, p in model.named_parameters() if p.requires_grad]
        assert adapters and all(".language_model." in n for n in adapters)


@pytest.mark.parametrize(
    "architecture, engine",
    [
        ("gemma3 with images", "packed"),
        ("qwen3.5 with images", "auto"),
        pytest.param("gemma4", "auto", marks=pytest.mark.slow),
        pytest.param("ministral3", "trl", marks=pytest.mark.slow),
        pytest.param("qwen2.5_vl", "auto", marks=pytest.mark.slow),
    ],
)
def test_train_chat_and_merge(architecture, engine, folder_of, data, tmp_path, monkeypatch):
    from kto_core.chat.chat import Chat
    from kto_core.runs.run import Run
    from kto_core.training.train import train

    folder, place = folder_of(architecture), tmp_path / "run"
    place.mkdir()
    settings = resolved(folder, data, engine=engine, max_steps=2, learning_rate=0.01)
    resolving.save_config(settings, place / "config.yaml")
    train(settings.config, place)
    ended = fold(read(place / "events.jsonl")[0])
    assert ended.state == "finished", ended.error
    wanted = "trl" if engine == "trl" else "packed"
    plan = dry_run(settings.config)
    assert plan["adapter"]["share"] == 1 and not plan["problem"] and plan["engine"]["name"] == wanted
    assert ended.used["engine"] == wanted
    assert ended.metrics[0]["loss"] == pytest.approx(0.5, abs=1e-4)
    assert "LoRA adapters on 100% of the language model's linear weights." in [e["text"] for e in ended.logs]

    chat = Chat.load(Run(place))
    try:
        question = [{"role": "user", "content": "What is 2?"}]
        assert list(chat.stream(question, max_new_tokens=4)) is not None
    finally:
        chat.unload()

    monkeypatch.setattr(merging, "tell", lambda *_: None)
    processor = {"image_processor_type": "SomeProcessor", "auto_map": {"AutoProcessor": "code.Processor"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    part = tmp_path / "merged"
    part.mkdir()
    facts = merging.merge(str(folder), str(place / "adapter"), str(part), "owner/base", {})
    base, merged = names(folder), names(part)
    assert merged.keys() == base.keys() and facts["layers"] == len(linear_layers(whole(folder)))
    before, after = whole(folder).state_dict(), whole(part).state_dict()
    changed = {n for n in before if not torch.allclose(before[n].float(), after[n].float(), atol=1e-3)}
    assert changed and all(".language_model." in n for n in changed)
    theirs = json.loads((folder / "config.json").read_text())
    ours = json.loads((part / "config.json").read_text())
    assert json.loads((part / "preprocessor_config.json").read_text()) == {"image_processor_type": "SomeProcessor"}
    assert ours["architectures"] == theirs["architectures"] and ours["model_type"] == theirs["model_type"]


def names(folder) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_a_config_that_leaves_sizes_to_transformers_has_a_shape():
    """As Gemma 3's own: no heads, no vocabulary."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "sliding_window": 1024}  # fmt: skip
    shape = from_config({"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}}, "gemma")
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.hidden) == (8, 4, 256, 2560)
    assert shape.tied and 3.8e9 < shape.parameters < 4e9
    with pytest.raises(ModelError, match="num_attention_heads"):
        from_config({"model_type": "unknown", **{k: v for k, v in text.items() if k != "model_type"}}, "other")


def test_all_linear_is_the_seven_projections_where_rates_were_measured():
    """docs/learning.md measured them on SmolLM2 (Llama) and Gemma 3."""
    for architecture in ("llama", "gemma3", "qwen2", "qwen3", "mistral with a window", "gemma3 with images"):
        model = oracle.base_model(architecture)
        assert suffixes(model) == sorted([*ATTENTION, *FFN])
        assert len(linear_layers(model)) == 7 * 3 and excluded(model, list(ATTENTION)) == excluded(model, "all-linear")


def test_routers_experts_and_output_projections_of_mamba_are_left_alone():
    import re

    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = oracle.SIZES | {"num_hidden_layers": 2}
    jetmoe = {"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    hybrid = {"layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
              "shared_intermediate_size": 32, "mamba_n_heads": 8, "mamba_d_head": 16}  # fmt: skip
    models = {
        "jetmoe": jetmoe,
        "granitemoehybrid": hybrid,
        "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32},
    }
    for model_type, settings in models.items():
        config = AutoConfig.for_model(model_type, **sizes, **settings)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        kept, pattern = linear_layers(model), excluded(model, "all-linear")
        assert kept and not any("router" in n or "expert_gate" in n or "mamba.out_proj" in n for n in kept)
        assert not any(re.fullmatch(pattern, n) for n in kept)
        adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", exclude_modules=pattern))
        found = {n.split(".lora_A")[0] for n, _ in adapted.named_parameters() if ".lora_A" in n}
        assert found == {f"base_model.model.{n}" for n in kept}


def test_a_part_that_text_needs_stays(folder_of, data, monkeypatch):
    from kto_core.models.language import towers

    model = whole(folder_of("gemma3 with images"))
    true = type(model.model).forward
    monkeypatch.setattr(
        type(model.model), "forward", lambda self, *a, **k: self.vision_tower.config and true(self, *a, **k)
    )
    assert towers.leave_out_towers(model) == 0
    assert sum(p.numel() for p in model.model.vision_tower.parameters()) > 0
    monkeypatch.undo()
    assert towers.leave_out_towers(model) > 0 and decoder_of(model) is model.model.language_model
