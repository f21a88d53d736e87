"""Export of real runs: the demo model merged, converted, quantized and run in llama.cpp; what goes wrong; cancel."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from exporting import left_behind, make_run
from training import wait

from kto_core import checkpoints, child, export, gguf, merging
from kto_core.errors import BusyError, Cancelled, DiskError, ExportError, HardwareError

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ["What is the capital of France?", "Name three colours.", "How do I boil an egg?"]
QUANTS = ["q4_k_m", "q5_k_m", "q8_0", "f16"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, demo_model):
    """The demo model with an adapter, merged and converted once: ``run``, ``files`` by kind, what ``progress`` said."""
    folder = tmp_path_factory.mktemp("exported")
    said: list[tuple] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KTO_STUDIO_RUNS", str(folder))
        run = make_run(folder / "demo-run", demo_model, "demo", scale=0.03)
        files = export.gguf(run, [q.upper() for q in QUANTS], progress=lambda f, text: said.append((f, text)))
    return SimpleNamespace(run=run, files=dict(zip(gguf.QUANTS, files, strict=True)), said=said)


@pytest.fixture(scope="module")
def merged(exported) -> Path:
    return exported.run.path / "exports" / "merged"


# ---- merge ----------------------------------------------------------------------------------------------------------


def test_merged_folder_is_a_plain_16_bit_model(exported, merged):
    from safetensors import safe_open

    names = {p.name for p in merged.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja", "manifest.json"} <= names  # fmt: skip
    with safe_open(merged / "model.safetensors", "pt") as f:
        assert {f.get_slice(k).get_dtype() for k in f.keys()} == {"F16"}  # noqa: SIM118
        assert not [k for k in f.keys() if "lora" in k]  # noqa: SIM118
    config = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float16"
    assert not checkpoints.problem(merged) and not left_behind(exported.run.path)
    assert oct((merged / "model.safetensors").stat().st_mode)[-3:] == "644"


def test_merged_model_says_what_base_and_adapter_say(exported, merged, demo_model):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)

    def logits(model):
        with torch.no_grad():
            return torch.log_softmax(model(ids).logits[0].double(), -1)

    base = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    plain = logits(base)
    tuned = logits(PeftModel.from_pretrained(base, exported.run.adapter))
    ours = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))

    def kl(p, q):
        return float((p.exp() * (p - q)).sum(-1).max())

    assert kl(tuned, ours) < 1e-4 < 1e-2 < kl(tuned, plain)  # and the adapter does change something


def test_progress_goes_up_to_one(exported):
    fractions = [f for f, _ in exported.said if f is not None]
    assert fractions[-1] == 1.0 and all(a <= b + 1e-9 for a, b in zip(fractions, fractions[1:], strict=False))
    words = " ".join(text for _, text in exported.said)
    for part in ("Loading the base model", "Merging: layer", "Converting to GGUF", "Quantizing to q4_k_m"):
        assert part in words


def test_a_second_call_makes_nothing(exported, merged, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("a child was started")

    monkeypatch.setattr(child, "call", forbidden)
    before = {p: p.stat().st_mtime_ns for p in merged.iterdir()}
    assert export.merge(exported.run) == merged
    assert export.gguf(exported.run, "F16, q4_k_m") == [exported.files["f16"], exported.files["q4_k_m"]]
    assert before == {p: p.stat().st_mtime_ns for p in merged.iterdir()}


def test_what_was_made_of_another_adapter_is_not_used(exported, tmp_path):
    other = tmp_path / "adapter"
    shutil.copytree(exported.run.adapter, other)
    base = exported.run.path  # any folder: only the adapter differs
    before = export._source(exported.run.adapter, base)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    assert export._source(other, base) != before
    assert not export._gguf_is_fresh(exported.files["f16"], "another source")
    assert not export._merge_is_fresh(exported.run.path / "exports" / "merged", "another source")


def test_a_damaged_merge_is_not_used(exported, merged, tmp_path):
    copy = tmp_path / "merged"
    shutil.copytree(merged, copy)
    source = export.merged_facts(copy)["source"]
    assert export._merge_is_fresh(copy, source)
    with open(copy / "model.safetensors", "r+b") as f:
        f.seek(1_000_000)
        f.write(b"xxxx")
    assert not export._merge_is_fresh(copy, source)


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def test_files_have_what_users_expect(exported, merged):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    sizes = []
    for quant, path in exported.files.items():
        facts = gguf.read_facts(path)
        assert path.name == f"SmolLM2-135M-Instruct-kto-{quant}.gguf" and facts.file_type == quant
        assert facts.template == tokenizer.chat_template and facts.pre == "smollm"
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert (facts.bos, facts.eos, facts.pad) == ids and facts.eos_text == "<|im_end|>"
        assert facts.name == "SmolLM2-135M-Instruct KTO" and facts.architecture == "llama"
        sizes.append(path.stat().st_size)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[-1]  # f16, q8_0, q5_k_m, q4_k_m


def test_f16_says_word_for_word_what_transformers_says(exported, merged):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
        expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        found = export.check_gguf(exported.files["f16"], question)
        assert found["text"] == expected
        assert found["stopped_at_eos"] == (out[0, -1].item() == tokenizer.eos_token_id)


@pytest.mark.parametrize("quant", ["q8_0", "q5_k_m", "q4_k_m"])
def test_quantized_files_run(exported, quant):
    found = export.check_gguf(exported.files[quant], QUESTIONS[0])
    assert found["ok"] and found["file_type"] == quant and found["chat_template"] and found["same_token_ids"]
    assert found["text"].strip() and 0 < found["tokens"] <= export.CHECK_TOKENS
    assert found["stopped_at_eos"] == (found["tokens"] < export.CHECK_TOKENS)
    assert "<|im_" not in found["text"]


def test_modelfile_lies_beside_its_file(exported):
    path = export.modelfile(exported.run, exported.files["q4_k_m"])
    text = path.read_text()
    assert path.name == "Modelfile-q4_k_m" and path.parent == exported.files["q4_k_m"].parent
    assert "\nFROM ./SmolLM2-135M-Instruct-kto-q4_k_m.gguf\n" in text
    assert '\nTEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n' in text
    assert 'PARAMETER stop "<|im_end|>"' in text and "differently" not in text


def test_check_refuses_what_is_no_gguf(exported, tmp_path):
    with pytest.raises(ExportError, match="There is no file"):
        export.check_gguf(tmp_path / "none.gguf", "Hi")
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 4000)
    with pytest.raises(ExportError, match="junk.gguf"):
        export.check_gguf(junk, "Hi")
    cut = tmp_path / "cut.gguf"
    with open(exported.files["q4_k_m"], "rb") as f:
        cut.write_bytes(f.read(20_000_000))
    with pytest.raises(ExportError, match=r"cut\.gguf"):
        export.check_gguf(cut, "Hi")


def test_cancel_of_a_conversion_leaves_nothing(merged, tmp_path):
    cancel = threading.Event()
    with pytest.raises(Cancelled):
        gguf.convert(merged, tmp_path / "x.gguf", "f16", "x", cancel=cancel,
                     progress=lambda f, text: cancel.set() if f else None)  # fmt: skip
    assert not list(tmp_path.glob("x.gguf*"))


# ---- before anything is made ----------------------------------------------------------------------------------------


def test_unknown_kinds_are_named_with_the_known(exported):
    with pytest.raises(ExportError, match=r"q9.*Known are f16, q8_0, q5_k_m, q4_k_m"):
        export.gguf(exported.run, ["q9", "q8_0"])
    with pytest.raises(ExportError, match="at least one"):
        export.gguf(exported.run, [])


@pytest.fixture
def small(tmp_path, tiny_model):
    """A run of the two-layer model that reads bytes."""
    return make_run(tmp_path / "small-run", tiny_model, str(tiny_model))


def test_a_run_without_adapter(small):
    shutil.rmtree(small.path / "adapter")
    for verb in (lambda: export.merge(small), lambda: export.gguf(small, ["f16"])):
        with pytest.raises(ExportError, match="no finished adapter"):
            verb()


def test_a_full_disk_is_said_with_numbers(small, monkeypatch):
    usage = shutil.disk_usage(small.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50_000_000))
    for verb in (lambda: export.merge(small), lambda: export.gguf(small, ["q8_0"])):
        with pytest.raises(DiskError, match=r"0\.1 GB; free in .*: 0\.1 GB"):
            verb()
    assert not (small.path / "exports" / "merged").exists()


def test_too_little_memory_is_said_with_numbers(small, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5e8))
    with pytest.raises(HardwareError, match=r"about 1\.0 GB .* 0\.5 GB are free"):
        export.merge(small)


@pytest.mark.parametrize("architecture", ["GPTNeoXForCausalLM", "OPTForCausalLM"])
def test_models_that_llama_cpp_does_not_run_are_refused_before_the_merge(small, tiny_model, architecture, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    values = small.config().config.model_copy(update={"model": str(base)})
    run = SimpleNamespace(id="x", path=small.path, adapter=small.adapter, config=lambda: SimpleNamespace(config=values))
    with pytest.raises(ExportError, match="cannot be exported to GGUF"):
        export.gguf(run, ["f16"])
    assert not (small.path / "exports" / "merged").exists()


def test_one_export_of_a_run_at_a_time(small):
    with export.only_one(small), pytest.raises(BusyError, match="Another export"):
        export.merge(small)


# ---- cancel, kill ---------------------------------------------------------------------------------------------------


def test_cancel_of_a_merge_leaves_nothing(small):
    cancel = threading.Event()

    def progress(fraction, text):
        if text.startswith("Merging"):
            cancel.set()

    with pytest.raises(Cancelled):
        export.merge(small, progress=progress, cancel=cancel)
    assert sorted(p.name for p in (small.path / "exports").iterdir()) == [".lock"]


def test_a_killed_export_leaves_no_child_and_is_done_again(small):
    part = small.path / "exports" / "merged.part"
    code = f"from kto_core import export, run; export.merge(run.find({str(small.path)!r}))"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        children = wait(lambda: part.exists() and _children(parent.pid), 120)
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    wait(lambda: not any(_alive(c) for c in children), 30)
    assert not (small.path / "exports" / "merged").exists()
    folder = export.merge(small)
    assert not checkpoints.problem(folder) and not left_behind(small.path)


def _children(pid: int) -> list[int]:
    import psutil

    return [p.pid for p in psutil.Process(pid).children(recursive=True)]


def _alive(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


# ---- bases and rounding ---------------------------------------------------------------------------------------------


def test_a_tokenizer_that_llama_cpp_does_not_know_is_said(small):
    with pytest.raises(ExportError, match="does not know this model's tokenizer"):
        export.gguf(small, ["f16"])
    assert (small.path / "exports" / "merged").is_dir() and not list((small.path / "exports").rglob("*.gguf"))


def merge_here(base: Path, run, part: Path, monkeypatch) -> dict:
    """The child's work, in this process."""
    monkeypatch.setattr(merging, "tell", lambda *_: None)
    part.mkdir()
    return merging.merge(str(base), str(run.adapter), str(part), "owner/base", {})


def weights(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def delta(run, name: str):
    """scale · B·A of one layer of the adapter."""
    from safetensors.torch import load_file

    tensors = load_file(run.adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"].float() for x in "AB")
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    return config["lora_alpha"] / config["r"] * (b @ a)


def test_small_steps_survive_a_bf16_base(tmp_path, tiny_model, monkeypatch):
    """The change is a tenth of bf16's resolution: rounding to nearest would lose nearly all of it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    run = make_run(tmp_path / "run", base, str(base), scale=3e-5)
    facts = merge_here(base, run, tmp_path / "part", monkeypatch)
    assert facts["dtype"] == "bfloat16" and 0.8 < facts["kept"] < 1.2

    name = "model.layers.0.self_attn.q_proj"
    before, after = weights(base)[f"{name}.weight"].float(), weights(tmp_path / "part")[f"{name}.weight"].float()
    wanted = delta(run, name)

    def kept(result):
        return float(((result - before) * wanted).sum() / (wanted * wanted).sum())

    assert 0.7 < kept(after) < 1.3
    assert kept((before + wanted).bfloat16().float()) < 0.6  # what rounding to nearest keeps
    untouched = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(weights(base)[untouched], weights(tmp_path / "part")[untouched])


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_stochastic_rounding_is_right_on_average_and_leaves_the_grid_alone(kind):
    import torch

    dtype, generator = getattr(torch, kind), torch.Generator().manual_seed(0)
    grid = torch.cat([torch.randn(5000), torch.randn(5000) * 1e-6, torch.zeros(10)]).to(dtype)
    assert torch.equal(merging.round_to(grid.float(), dtype, generator), grid)
    values = torch.tensor([0.1, -0.017, 3.3e-6, -1e-3, 100.07]).repeat_interleave(40_000)
    rounded = merging.round_to(values, dtype, generator).float()
    step = (values.to(dtype).float() - values).abs().amax() + values.abs() * 2.0**-7
    assert bool(((rounded - values).abs() <= step).all())
    mean = rounded.view(5, -1).mean(1)
    spread = rounded.view(5, -1).std(1) / 200
    assert bool(((mean - values.view(5, -1)[:, 0]).abs() <= 5 * spread + 1e-12).all())


def test_a_4_bit_base_is_dequantized_not_rounded_again(tmp_path, tiny_model, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    base = tmp_path / "base-bnb-4bit"
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
    quantized = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=how, dtype=torch.bfloat16,
                                                     device_map={"": "cpu"})  # fmt: skip
    quantized.save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    assert "quantization_config" in json.loads((base / "config.json").read_text())
    run = make_run(tmp_path / "run", base, str(base), base_dir=tiny_model)
    facts = merge_here(base, run, tmp_path / "part", monkeypatch)

    config = json.loads((tmp_path / "part" / "config.json").read_text())
    assert "quantization_config" not in config and facts["dtype"] == "bfloat16" and facts["kept"] > 0.8
    name = "model.layers.1.mlp.down_proj"
    plain = AutoModelForCausalLM.from_pretrained(base, device_map={"": "cpu"}).dequantize()
    expected = plain.get_submodule(name).weight.float() + delta(run, name)
    found = weights(tmp_path / "part")[f"{name}.weight"].float()
    assert bool(((found - expected).abs() <= expected.abs() * 2.0**-7 + 1e-8).all())
    assert len(found.unique()) > 100  # a 4-bit row would have 16 values a block


def test_the_sentencepiece_file_comes_along(tmp_path, tiny_model, monkeypatch):
    """transformers does not save it, and the converter reads it."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "tokenizer.model").write_bytes(b"pieces")
    run = make_run(tmp_path / "run", tiny_model, str(tiny_model))
    merge_here(base, run, tmp_path / "part", monkeypatch)
    assert (tmp_path / "part" / "tokenizer.model").read_bytes() == b"pieces"


def test_weights_that_are_not_finite_are_refused(tmp_path, tiny_model, monkeypatch):
    run = make_run(tmp_path / "run", tiny_model, str(tiny_model), scale=float("inf"))
    with pytest.raises(ExportError, match="training diverged"):
        merge_here(tiny_model, run, tmp_path / "part", monkeypatch)


def test_an_adapter_of_another_model_is_refused(tmp_path, tiny_model, monkeypatch):
    from kto_core.errors import ModelError

    run = make_run(tmp_path / "run", tiny_model, str(tiny_model))
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    (run.adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    with pytest.raises(ModelError):
        merge_here(tiny_model, run, tmp_path / "part", monkeypatch)
