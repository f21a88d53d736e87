"""Models: the demo model's five mends, facts without torch, tokenizers without a template, the Hub, adapters."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kto_core.config import resolving
from kto_core.errors import Cancelled, ConfigError, ModelError
from kto_core.models import demo_model, load
from kto_core.models import facts as model_info
from tests.support.training import make_other, resolved

ROOT = Path(load.__file__).parents[2]


# ---- the demo model --------------------------------------------------------------------------------------------------


def test_demo_tokenizer_is_mended(demo_model):
    tokenizer = load.load_tokenizer("demo")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert (tokenizer.bos_token, tokenizer.unk_token) == ("<|im_start|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 8192
    assert tokenizer.clean_up_tokenization_spaces is False
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.decode(tokenizer("Hello , you 's !").input_ids) == "Hello , you 's !"


def test_demo_model_answers(demo_model):
    import torch

    loaded = load.load_base(resolving.resolve("demo", {}).config, for_training=False)
    tokenizer = load.load_tokenizer("demo")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = loaded.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
    assert loaded.dtype == torch.float32 and not loaded.training


def test_demo_is_made_once_and_a_broken_one_is_made_again(demo_model, tmp_path, monkeypatch):
    assert demo_model == model_info.demo_model_dir() == Path(model_info.resolve_model("demo"))
    copy = tmp_path / "demo" / demo_model.name
    shutil.copytree(demo_model, copy, ignore=shutil.ignore_patterns("model.safetensors"))
    (copy / "model.safetensors").write_bytes(b"cut")
    monkeypatch.setenv("KTO_STUDIO_CACHE", str(tmp_path))
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        model_info.demo_model_dir(cancel=cancel)
    assert not list((tmp_path / "demo").glob("*.part"))


def test_demo_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv("KTO_STUDIO_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    said = []
    with pytest.raises(ModelError, match="Check the network"):
        model_info.demo_model_dir(lambda fraction, text: said.append(text))
    assert said and not list(tmp_path.rglob("*.part"))
    monkeypatch.setattr(demo_model, "SPACE", 1 << 60)
    with pytest.raises(Exception, match="GiB are free"):
        model_info.demo_model_dir()


# ---- facts and names -------------------------------------------------------------------------------------------------


def test_facts_need_no_torch(demo_model):
    code = (
        "import sys, json; from kto_core.models.facts import model_facts; f = model_facts('demo').to_dict(); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; print(json.dumps(f))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    facts = json.loads(out.stdout)
    assert facts["parameters"] == 134_515_008 and facts["shape"]["layers"] == 30
    assert facts["shape"]["vocabulary"] == 49_152 and facts["shape"]["max_position_embeddings"] == 8192
    assert facts["quantized"] == ""


@pytest.mark.parametrize(
    ("change", "expected"),
    [  # counted from the published shapes of Qwen2.5-7B and Llama-3.1-8B
        ({"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
          "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
         7_615_616_512),
        ({"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
          "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
         8_030_261_248),
    ],
)  # fmt: skip
def test_parameters_from_shapes(tmp_path, change, expected):
    (tmp_path / "config.json").write_text(json.dumps(change))
    assert model_info.model_facts(str(tmp_path)).parameters == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "No model is selected"),
        ("nothing", "neither a local folder nor a Hub id"),
        ("two words/x", "neither a local folder nor a Hub id"),
        (str(ROOT), "no config.json"),
    ],
)
def test_names_that_are_no_model(name, words):
    with pytest.raises(ModelError, match=words):
        model_info.resolve_model(name)


def test_broken_folders_are_explained(tiny, tmp_path):
    broken = shutil.copytree(tiny, tmp_path / "cut")
    with open(broken / "model.safetensors", "r+b") as f:
        f.truncate(1000)
    with pytest.raises(ModelError, match="cut"):
        load.load_base(resolved(broken, "").config, for_training=True)
    pickles = shutil.copytree(tiny, tmp_path / "pickle", ignore=shutil.ignore_patterns("*.safetensors"))
    (pickles / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(ModelError, match="safetensors"):
        load.load_base(resolved(pickles, "").config, for_training=True)
    (pickles / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config.json"):
        model_info.model_facts(str(pickles))
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="tokenizer"):
        load.load_tokenizer(str(broken))


def test_a_model_without_a_template_speaks_chatml(tiny, tmp_path):
    plain = shutil.copytree(tiny, tmp_path / "plain", ignore=shutil.ignore_patterns("chat_template.jinja"))
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    settings.pop("pad_token"), settings.pop("chat_template", None)
    settings["eos_token"] = "<|endoftext|>"
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load.load_tokenizer(str(plain))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"  # known to the model: its turns end there
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


# ---- adapters --------------------------------------------------------------------------------------------------------


def test_adapters(tiny, tmp_path):
    import torch

    settings = resolved(tiny, "").config
    base = load.load_base(settings, for_training=True)
    adapted = load.add_adapter(base, settings)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all(p.dtype == torch.float32 and "lora_" in n for n, p in trained.items())
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.01)
    adapted.save_pretrained(tmp_path / "adapter")
    again = load.load_adapter(load.load_base(settings, for_training=False), tmp_path / "adapter")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, adapted(ids).logits)

    with pytest.raises(ConfigError, match="lm_head"):
        load.lora_config(settings.model_copy(update={"target_modules": ["q_proj", "lm_head"]}), base)
    with pytest.raises(ModelError, match="target_modules"):
        load.add_adapter(
            load.load_base(settings, for_training=True), settings.model_copy(update={"target_modules": ["nope"]})
        )
    with pytest.raises(ModelError, match="does not contain an adapter"):
        load.load_adapter(base, tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load.load_adapter(load.load_base(settings, for_training=False), tmp_path / "adapter")


@pytest.mark.parametrize("double", [True, False])
def test_nf4_on_a_cpu(tiny, double):
    from bitsandbytes.nn import Linear4bit

    settings = resolved(tiny, "", load_in_4bit=True, bnb_4bit_use_double_quant=double).config
    loaded = load.load_base(settings, for_training=True)
    quantized = [m for m in loaded.modules() if isinstance(m, Linear4bit)]
    assert len(quantized) == 14  # seven projections in two layers, not the head
    assert {m.weight.quant_type for m in quantized} == {"nf4"}
    assert {m.weight.quant_state.nested for m in quantized} == {double}


def test_four_bits_stay_trainable_on_every_cpu(tiny, monkeypatch):
    """As on a CPU for which bitsandbytes has products of their own, which pass no gradient on."""
    from bitsandbytes.nn import modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    settings = resolved(tiny, "", load_in_4bit=True).config
    for training in (True, False):
        loaded = load.load_base(settings, for_training=training)
        marks = [m.support_avx512bf16_for_cpu for m in loaded.modules() if isinstance(m, modules.Linear4bit)]
        assert len(marks) == 14 and any(marks) != training


def test_a_capped_attention_is_loaded_with_its_cap(tiny_model, tmp_path):
    """SDPA would leave it out: Gemma 2's chat, evaluation and TRL's step were another model's."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = make_other(tmp_path / "capped", tiny_model, "gemma2", attn_logit_softcapping=0.01, initializer_range=1.0)
    model = load.load_base(resolved(folder, "none", load_in_4bit=False).config, for_training=False)
    ids = torch.arange(40)[None] + 3
    capped, uncapped = (
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation=a).eval()(ids).logits
        for a in ("eager", "sdpa")
    )
    assert torch.allclose(model(ids).logits, capped, atol=1e-4) and not torch.allclose(capped, uncapped, atol=1e-2)

    said = json.loads((folder / "config.json").read_text())
    del said["attn_logit_softcapping"]  # the architecture's own default is a cap, too
    (folder / "config.json").write_text(json.dumps(said))
    again = load.load_base(resolved(folder, "none", load_in_4bit=False).config, for_training=False)
    assert again.config._attn_implementation == "eager"
