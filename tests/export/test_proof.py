"""The check of a GGUF file: right files pass, and every planted fault is found and named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from kto_core.errors import ExportError
from kto_core.export.gguf import layout, proof, tensors, writing
from kto_core.guards import child, confine
from tests.support import gguf_edits as edit

QUESTION = "Name three colours."


@pytest.fixture(scope="module")
def merged(tmp_path_factory, demo_model) -> Path:
    """A small model with the demo's tokenizer that is sure of what it says."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("proof") / "merged"
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.15, bos_token_id=1, eos_token_id=2,
        max_position_embeddings=2048,
    ))  # fmt: skip
    model.half().save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(demo_model / file, folder / file)
    return folder


@pytest.fixture(scope="module")
def made(merged, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    f16, q4 = folder / "m-f16.gguf", folder / "m-q4_k_m.gguf"
    writing.convert(merged, f16, "f16", "m")
    writing.quantize(f16, q4, "q4_k_m")
    return {"f16": f16, "q4_k_m": q4}


@pytest.fixture
def prove(merged, made, monkeypatch):
    """`proof.prove` with what the merged model says kept from one file to the next, and the weights compared here."""
    monkeypatch.setattr(confine, "close_in", lambda *_: None)
    monkeypatch.setattr(tensors, "tell", lambda *_: None)
    call = child.call

    def inline(module, function, arguments, **how):
        return (
            tensors.compare(**arguments)
            if module == "export.gguf.tensors"
            else call(module, function, arguments, **how)
        )

    monkeypatch.setattr(child, "call", inline)
    kept = made["f16"].parent / proof.REFERENCE

    def check(file: Path, kind: str = "f16") -> dict:
        if kept.is_file() and file.parent != kept.parent:
            shutil.copyfile(kept, file.parent / proof.REFERENCE)
        return proof.prove(file, QUESTION, merged=merged, key="k", kind=kind)

    return check


def test_right_files_pass(prove, made):
    found = prove(made["f16"])
    assert found["ok"] and not found["problems"] and [c["ok"] for c in found["checks"]] == [True] * 5, found["checks"]
    same = found["agreement"]
    assert same["same"] == same["of"] >= 60
    assert f"{same['of']} of {same['of']} places" in found["checks"][3]["text"]
    first = found["reference_text"].split()[:3]
    assert found["text"].split()[:3] == first and first
    quantized = prove(made["q4_k_m"], "q4_k_m")
    assert quantized["checks"][2]["ok"] and quantized["agreement"]["same"] <= same["of"]
    kept = json.loads((made["f16"].parent / proof.REFERENCE).read_text())
    assert kept["question"] == QUESTION and len(kept["expected"]["answers"]) > 5


def test_without_the_merged_model_only_the_file_is_looked_at(made):
    found = proof.prove(made["f16"], QUESTION, merged=None)
    assert found["ok"] and {c["ok"] for c in found["checks"]} == {None} and found["reference_text"] is None


def permuted(w):
    return w.reshape(2, -1, *w.shape[1:]).swapaxes(0, 1).reshape(w.shape)


def swapped(w):
    w[[5, 77]] = w[[77, 5]]
    return w


def a_bit(w):
    w.view(np.uint16)[10, 10] ^= 0x4000
    return w


def at_random(w):
    return np.random.default_rng(0).normal(0, 0.15, w.shape)


def a_nan(w):
    w[3, 3] = np.nan
    return w


Q, K, UP = "blk.{}.attn_q.weight", "blk.{}.attn_k.weight", "blk.{}.ffn_up.weight"
LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
FAULTS = {
    "another template": (lambda f: edit.text(f, "tokenizer.chat_template", LLAMA3), "Chat template"),
    "no generation prompt": (
        lambda f: edit.rename(f, "add_generation_prompt", "add_generation_prXmpt"), "Chat template"),
    "tokens in another order": (edit.swap_tokens, "Tokens"),
    "another pre-tokenizer": (lambda f: edit.text(f, "tokenizer.ggml.pre", "falcon"), "Tokens"),
    "a BOS that training has not": (lambda f: edit.patch(f, "tokenizer.ggml.add_bos_token", "B", 1), "Tokens"),
    "another end token": (lambda f: edit.patch(f, "tokenizer.ggml.eos_token_id", "I", 5000), "End of an answer"),
    "two rows exchanged": (lambda f: edit.tensor(f, Q.format(1), swapped), "Weights"),
    "queries and keys permuted": (
        lambda f: [edit.tensor(f, n.format(i), permuted) for n in (Q, K) for i in (0, 1)], "Weights"),
    "an exponent bit": (lambda f: edit.tensor(f, UP.format(0), a_bit), "Weights"),
    "one NaN": (lambda f: edit.tensor(f, UP.format(0), a_nan), "Weights"),
    "a layer's MLP zeroed": (lambda f: edit.tensor(f, UP.format(1), np.zeros_like), "Weights"),
    "random weights": (
        lambda f: [edit.tensor(f, UP.format(i), at_random) for i in (0, 1)],
        "Weights"),
    "the adapter not merged": (lambda f: edit.tensor(f, Q.format(0), lambda w: w * np.float16(1.01)), "Weights"),
    "another rope base": (lambda f: edit.patch(f, "llama.rope.freq_base", "f", 100.0), "Answers"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named(fault, prove, made, merged, tmp_path):
    plant, name = FAULTS[fault]
    file = Path(shutil.copyfile(made["f16"], tmp_path / "m-f16.gguf"))
    plant(file)
    if name == "Weights":  # without llama.cpp, which takes longer
        verdict = proof._weights(tensors.compare(str(file), str(merged), "f16"), "f16")
        assert verdict["ok"] is False and "differ from your model's" in verdict["text"]
        return
    found = prove(file)
    assert not found["ok"] and any(p.startswith(name) for p in found["problems"]), found["checks"]


def test_a_file_of_another_kind_is_named(prove, made, tmp_path):
    prove(made["f16"])
    file = Path(shutil.copyfile(made["q4_k_m"], tmp_path / "m-f16.gguf"))
    assert any(p.startswith("Weights") for p in prove(file)["problems"])


@pytest.mark.parametrize("fault", ["no template", "cut in the header", "cut at 90 %", "cut by a megabyte"])
def test_a_file_that_cannot_be_used_is_refused_in_a_sentence(fault, prove, made, tmp_path):
    raw = made["f16"].read_bytes()
    file = tmp_path / "m-f16.gguf"
    cuts = {"cut in the header": 5000, "cut at 90 %": int(0.9 * len(raw)), "cut by a megabyte": len(raw) - 10**6}
    file.write_bytes(raw[: cuts.get(fault, len(raw))])
    if fault == "no template":
        edit.rename(file, "tokenizer.chat_template", "tokenizer.chat_templatX")
    with pytest.raises(ExportError, match=r"no chat template|not a complete GGUF|cannot load m-f16.gguf"):
        prove(file)


def test_the_layout_is_what_ggufs_own_reader_says(made):
    import gguf

    ours, theirs = layout.read(made["q4_k_m"]), gguf.GGUFReader(made["q4_k_m"])
    assert set(ours.fields) == {k for k in theirs.fields if not k.startswith("GGUF.")}
    for name, value in ours.fields.items():
        assert value == theirs.fields[name].contents(), name
    assert [(t.name, t.start, t.kind) for t in ours.tensors] == [
        (t.name, t.data_offset, t.tensor_type.value) for t in theirs.tensors
    ]
    assert [list(t.shape) for t in ours.tensors] == [list(map(int, reversed(t.shape))) for t in theirs.tensors]


@pytest.mark.parametrize("junk", [b"", b"GGUF", b"GGML" + bytes(40), b"GGUF\x03\0\0\0" + b"\xff" * 16 + bytes(40),
                                  b"GGUF\x03\0\0\0" + bytes(8) + b"\x01" + bytes(7) + b"\xff" * 8])  # fmt: skip
def test_what_is_no_gguf_is_a_value_error(junk, tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(junk)
    with pytest.raises(ValueError):  # noqa: PT011 - the caller words it
        layout.read(file)
