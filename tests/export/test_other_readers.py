"""What is exported is read rightly by others: the base's tokenizer files travel, config.json has older keys too."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer

from kto_core.export import config_keys, merging, publish
from kto_core.export.gguf import header, layout, writing
from kto_core.models import tokenizer as tokenizers
from tests.support.exporting import make_run

TURNS = ["<start_of_turn>", "<end_of_turn>"]


# ---- tokenizer files ------------------------------------------------------------------------------------------------


def pieces(folder: Path, marks: list[str]) -> None:
    """A SentencePiece model with these marks as pieces of its own, as Gemma's has."""
    import sentencepiece

    text = folder / "text.txt"
    text.write_text(
        "\n".join(f"{i} the quick brown fox jumps over lazy dogs and cats {chr(97 + i % 26)}" for i in range(400))
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="bpe", byte_fallback=True,
        user_defined_symbols=marks, pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2, character_coverage=1.0,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
    )  # fmt: skip
    text.unlink()
    words = [line.split("\t")[0] for line in (folder / "tokenizer.vocab").read_text().splitlines()]
    (folder / "tokenizer.vocab").unlink()
    fast(words, marks).save(str(folder / "tokenizer.json"))


def fast(words: list[str], marks: list[str]):
    """The same vocabulary for the tokenizers library."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocabulary = {word: i for i, word in enumerate(words)}
    merges = [(w[:i], w[i:]) for w in words for i in range(1, len(w)) if w[:i] in vocabulary and w[i:] in vocabulary]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Replace("▁", " ")
    made.add_special_tokens([AddedToken(mark, special=True) for mark in ("<pad>", "<eos>", "<bos>", *marks)])
    return made


def added(id_: int, text: str, **more) -> dict:
    return {str(id_): {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                       "special": True} | more}  # fmt: skip


def settings(folder: Path, **values) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


@pytest.fixture
def gemma(tmp_path) -> Path:
    folder = tmp_path / "gemma"
    folder.mkdir()
    pieces(folder, TURNS)
    decoder = added(0, "<pad>") | added(1, "<eos>") | added(2, "<bos>") | added(4, TURNS[0]) | added(5, TURNS[1])
    settings(folder, tokenizer_class="GemmaTokenizer", add_bos_token=True, add_eos_token=False, bos_token="<bos>",
             eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", added_tokens_decoder=decoder,
             chat_template="{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}"
             "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")  # fmt: skip
    return folder


@pytest.fixture
def chatml(tmp_path) -> Path:
    """Turn marks added to a SentencePiece base, in a file of their own."""
    folder = tmp_path / "chatml"
    folder.mkdir()
    pieces(folder, [])
    opened = Tokenizer.from_file(str(folder / "tokenizer.json"))
    opened.add_special_tokens(["<|im_end|>", "<|im_start|>"])
    opened.save(str(folder / "tokenizer.json"))
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 300, "<|im_start|>": 301}))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<bos>", "eos_token": "<|im_end|>", "unk_token": "<unk>"})
    )
    decoder = added(1, "<eos>") | added(2, "<bos>") | added(300, "<|im_end|>") | added(301, "<|im_start|>")
    settings(folder, tokenizer_class="LlamaTokenizer", add_bos_token=False, bos_token="<bos>", eos_token="<|im_end|>",
             unk_token="<unk>", added_tokens_decoder=decoder)  # fmt: skip
    return folder


def saved(base: Path, out: Path):
    tokenizer = tokenizers.open_tokenizer(base, "x")
    out.mkdir()
    tokenizers.save_tokenizer(tokenizer, out)
    return tokenizer, json.loads((out / "tokenizer_config.json").read_text())


def test_what_the_base_brings_travels_as_it_is(gemma, tmp_path):
    _, config = saved(gemma, tmp_path / "out")
    before = json.loads((gemma / "tokenizer_config.json").read_text())
    assert config == before
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (gemma / "tokenizer.model").read_bytes()
    assert not (tmp_path / "out" / "chat_template.jinja").exists()  # it is in the configuration


def test_only_what_was_chosen_here_is_changed(chatml, tmp_path):
    """No padding token, no template: the base's end token and ChatML are written, the rest stays."""
    tokenizer, config = saved(chatml, tmp_path / "out")
    before = json.loads((chatml / "tokenizer_config.json").read_text())
    assert config == before | {"pad_token": "<|im_end|>"}
    assert json.loads((tmp_path / "out" / "special_tokens_map.json").read_text())["pad_token"] == "<|im_end|>"
    assert (tmp_path / "out" / "added_tokens.json").read_bytes() == (chatml / "added_tokens.json").read_bytes()
    again = tokenizers.open_tokenizer(tmp_path / "out", "x")
    assert again.chat_template == tokenizer.chat_template and "im_start" in again.chat_template
    text = "<|im_start|>user\nthe quick fox<|im_end|>"
    assert again(text).input_ids == tokenizer(text).input_ids


def test_a_class_that_only_transformers_5_knows_is_named_as_4_does(demo_model, tmp_path):
    _, config = saved(demo_model, tmp_path / "out")
    assert json.loads((demo_model / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "is_local" not in config
    listed = tokenizers._for_all_readers({"extra_special_tokens": ["<a>"]})
    assert listed == {"additional_special_tokens": ["<a>"]}
    named = {"extra_special_tokens": {"image_token": "<i>"}, "tokenizer_class": "GPT2Tokenizer"}
    assert tokenizers._for_all_readers(named) == named


@pytest.mark.parametrize("kind", ["gemma", "chatml"])
def test_turn_marks_are_tokens_in_the_gguf(kind, request, tmp_path):
    """As the converter reads the folder: marks are control tokens or pieces of their own, and no BOS is made up."""
    import torch
    from transformers import AutoModelForCausalLM, GemmaConfig, MistralConfig

    base = request.getfixturevalue(kind)
    sizes = {"vocab_size": 302, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}  # fmt: skip
    config = (GemmaConfig if kind == "gemma" else MistralConfig)(**sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(base)
    run = SimpleNamespace(adapter=make_adapter(base, tmp_path))
    part = tmp_path / "merged"
    part.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "tell", lambda *_: None)
        merging.merge(str(base), str(run.adapter), str(part), "owner/base", {})
    file = tmp_path / "m.gguf"
    writing.convert(part, file, "f16", "m")
    fields = layout.read(file).fields
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    for mark in TURNS if kind == "gemma" else ["<|im_start|>", "<|im_end|>"]:
        assert types[tokens.index(mark)] in (3, 4), "control, or user-defined"
    facts = header.read_facts(file)
    assert facts.add_bos == (kind == "gemma")
    assert facts.eos_text == ("<eos>" if kind == "gemma" else "<|im_end|>")


def make_adapter(base: Path, folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    tuned.save_pretrained(folder / "adapter")
    return folder / "adapter"


# ---- config.json ----------------------------------------------------------------------------------------------------

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192, "rope_theta": 500000.0}  # fmt: skip


def test_older_keys_stand_beside_the_newer():
    found = config_keys.both({"dtype": "bfloat16", "rope_parameters": LLAMA3})
    assert found["torch_dtype"] == "bfloat16" and found["rope_theta"] == 500000.0
    assert found["rope_scaling"] == {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    plain = config_keys.both({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    assert plain["rope_theta"] == 1e6 and plain["rope_scaling"] is None
    two = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
           "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
    nested = config_keys.both({"text_config": {"rope_parameters": two, "dtype": "bfloat16"}})["text_config"]
    assert (nested["rope_theta"], nested["rope_local_base_freq"]) == (1e6, 1e4)
    assert nested["rope_scaling"] == {"rope_type": "linear", "factor": 8.0} and nested["torch_dtype"] == "bfloat16"


def test_what_the_base_says_is_kept_but_not_how_it_was_stored(tmp_path):
    from transformers import AutoConfig

    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir(), out.mkdir()
    theirs = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 2, "torch_dtype": "bfloat16",
              "unused": 7, "quantization_config": {"load_in_4bit": True},
              "auto_map": {"AutoModel": "evil.py"}}  # fmt: skip
    (base / "config.json").write_text(json.dumps(theirs))
    made = {k: theirs[k] for k in ("model_type", "hidden_size", "num_attention_heads")}
    made |= {"dtype": "float16", "rope_parameters": LLAMA3}
    (out / "config.json").write_text(json.dumps(made))
    config_keys.write_both(out, base)
    found = json.loads((out / "config.json").read_text())
    assert found["unused"] == 7 and found["torch_dtype"] == found["dtype"] == "float16"
    assert not {"quantization_config", "auto_map"} & set(found)
    assert AutoConfig.from_pretrained(out).rope_parameters == LLAMA3


# ---- what is published ----------------------------------------------------------------------------------------------


def test_no_folder_of_this_machine_is_published(tmp_path, tiny_model):
    run = make_run(tmp_path / "run", tiny_model, str(tiny_model))
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tiny_model)
    (run.adapter / "adapter_config.json").write_text(json.dumps(config))
    files = publish._adapter_files(run, run.adapter, publish.public_base(run), "adapter/")
    sent = {name: path for path, name in files}
    assert json.loads(sent["adapter/adapter_config.json"].read_text())["base_model_name_or_path"] == tiny_model.name
    for path in sent.values():
        if path.suffix in (".json", ".jinja"):
            assert str(tmp_path.parent) not in path.read_text() and str(tiny_model.parent) not in path.read_text()
    assert json.loads((run.adapter / "adapter_config.json").read_text()) == config, "the run's own is as it was"


def test_draft_layers_are_left_out_of_the_conversion(tmp_path):
    from kto_core.export.gguf import native

    for config, left_out in (
        ({"model_type": "qwen3_5_text"}, True),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}, False),
        ({"model_type": "x", "text_config": {"model_type": "qwen3_next"}}, True),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert native._lacks_draft_head(tmp_path) == left_out
