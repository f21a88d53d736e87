"""Export of real runs: the demo model merged, converted, quantized and run in llama.cpp; what goes wrong; cancel."""

import dataclasses
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

from kto_core import files
from kto_core.errors import BusyError, Cancelled, DiskError, ExportError, HardwareError
from kto_core.export import export, sources
from kto_core.export.gguf import header, proof, writing
from kto_core.guards import child
from tests.support.exporting import left_behind, make_run
from tests.support.training import wait

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "What is the capital of France?"
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
    return SimpleNamespace(run=run, files=dict(zip(QUANTS[::-1], files, strict=True)), said=said)


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
    assert not files.problem(merged) and not left_behind(exported.run.path)
    assert oct((merged / "model.safetensors").stat().st_mode)[-3:] == "644"


def test_merged_model_says_what_base_and_adapter_say(exported, merged, demo_model):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    messages = [{"role": "user", "content": QUESTION}]
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
    for part in ("Reading the base model", "Merging: layer", "Converting to GGUF", "Quantizing to q4_k_m"):
        assert part in words


def test_a_second_call_makes_nothing(exported, merged, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("a child was started")

    monkeypatch.setattr(child, "call", forbidden)
    before = {p: p.stat().st_mtime_ns for p in merged.iterdir()}
    assert export.merge(exported.run) == merged
    assert export.gguf(exported.run, "F16, q4_k_m") == [exported.files["f16"], exported.files["q4_k_m"]]
    assert before == {p: p.stat().st_mtime_ns for p in merged.iterdir()}


def made_from(run, **other):
    """What the run's exports are made from, but for ``other``."""
    return dataclasses.replace(sources.Sources.of(run), **other)


def test_what_was_made_of_another_adapter_is_not_used(exported, tmp_path):
    other = tmp_path / "adapter"
    shutil.copytree(exported.run.adapter, other)
    base = exported.run.path  # any folder: only the adapter differs
    before = sources.key_of(exported.run.adapter, base)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    assert sources.key_of(other, base) != before
    assert not made_from(exported.run, key="another source").gguf_is_fresh(exported.files["f16"])
    assert not made_from(exported.run, key="another source").merge_is_fresh()


def test_a_damaged_merge_is_not_used(exported, merged, tmp_path):
    copy = tmp_path / "merged"
    shutil.copytree(merged, copy)
    source = sources.merged_facts(copy)["source"]
    assert made_from(exported.run, key=source, merged=copy).merge_is_fresh()
    with open(copy / "model.safetensors", "r+b") as f:
        f.seek(1_000_000)
        f.write(b"xxxx")
    assert not made_from(exported.run, key=source, merged=copy).merge_is_fresh()


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def test_files_have_what_users_expect(exported, merged):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    sizes = []
    for quant, path in exported.files.items():
        facts = header.read_facts(path)
        assert path.name == f"SmolLM2-135M-Instruct-kto-{quant}.gguf" and facts.file_type == quant
        assert facts.template == tokenizer.chat_template and facts.pre == "smollm"
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert (facts.bos, facts.eos, facts.pad) == ids and facts.eos_text == "<|im_end|>"
        assert facts.name == "SmolLM2-135M-Instruct KTO" and facts.architecture == "llama"
        sizes.append(path.stat().st_size)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[-1]  # f16, q8_0, q5_k_m, q4_k_m


def test_f16_says_word_for_word_what_transformers_says(exported, merged):
    """As it is asked here; `gguf.proof` compares place by place."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    messages = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    found = export.check_gguf(exported.files["f16"], QUESTION)
    assert found["text"] == found["reference_text"] == expected
    assert found["stopped_at_eos"] == (out[0, -1].item() == tokenizer.eos_token_id)


@pytest.mark.parametrize("quant", ["q8_0", "q5_k_m", "q4_k_m"])
def test_quantized_files_run(exported, quant):
    found = export.check_gguf(exported.files[quant], QUESTION)
    assert found["ok"] and found["file_type"] == quant and found["chat_template"]
    assert found["text"].strip() and 0 < found["tokens"] <= proof.TOKENS
    assert found["stopped_at_eos"] == (found["tokens"] < proof.TOKENS)
    assert "<|im_" not in found["text"]


def test_a_verdict_is_kept_and_a_failed_one_exits_with_1(exported, monkeypatch, capfd):
    from kto_core import cli

    file = exported.files["q4_k_m"]
    command = ["export", "check", str(exported.run.path), "--quant", "q4_k_m", "--prompt", QUESTION]
    assert cli.main(command) == 0
    said = capfd.readouterr().out
    assert "ok     Weights: all 272 tensors are your model's" in said and "your model:        The capital" in said
    assert sources.records(file.parent)[file.name]["check"]["ok"] is True
    bad = {"ok": False, "checks": [], "problems": ["Weights: x"], "agreement": None, "text": "", "reference_text": None}
    monkeypatch.setattr(proof, "prove", lambda *args, **how: bad)
    assert cli.main([*command, "--json"]) == 1
    assert json.loads(capfd.readouterr().out)["checks"][0]["problems"] == ["Weights: x"]
    assert sources.records(file.parent)[file.name]["check"]["ok"] is False
    made = export.gguf_and_check(exported.run, ["q4_k_m"])
    assert made[0]["path"] == file and made[0]["modelfile"].is_file() and not made[0]["check"]["ok"]


def test_files_are_compared_with_the_merged_model(exported):
    some = [exported.files["q4_k_m"], exported.files["f16"]]
    rows = export.compare(exported.run, some)
    assert [row["path"] for row in rows] == some[::-1]  # the largest first
    whole, small = rows
    assert whole["agreement"]["same"] >= 0.99 * whole["agreement"]["of"] > 10 and whole["kl"] < 1e-3
    assert small["bytes"] < whole["bytes"] and 10 * whole["kl"] < small["kl"] < 1
    assert all(row["tokens_per_second"] > 0 for row in rows) and sum(row["taken"] for row in rows) == 1
    assert not left_behind(exported.run.path)
    with pytest.raises(ExportError, match="has no GGUF files to compare"):
        export.compare(exported.run, [])


def test_modelfile_lies_beside_its_file(exported):
    written = export.modelfile(exported.run, exported.files["q4_k_m"])
    path, text = written.path, written.path.read_text()
    assert path.name == "Modelfile-q4_k_m" and path.parent == exported.files["q4_k_m"].parent
    assert "\nFROM ./SmolLM2-135M-Instruct-kto-q4_k_m.gguf\n" in text
    assert '\nTEMPLATE """{{ if $.System }}<|im_start|>system\n{{ $.System }}<|im_end|>\n' in text
    assert 'PARAMETER stop "<|im_end|>"' in text and written.remarks == []
    assert "\nPARAMETER num_ctx 4096\n" in text and '\nLICENSE """apache-2.0"""\n' in text
    assert sources.records(path.parent)[exported.files["q4_k_m"].name]["remarks"] == []


def test_check_refuses_what_is_no_gguf(exported, tmp_path):
    with pytest.raises(ExportError, match="none.gguf does not exist"):
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
        writing.convert(merged, tmp_path / "x.gguf", "f16", "x", cancel=cancel,
                     progress=lambda f, text: cancel.set() if f else None)  # fmt: skip
    assert not list(tmp_path.glob("x.gguf*"))


# ---- before anything is made ----------------------------------------------------------------------------------------


def test_unknown_kinds_are_named_with_the_known(exported):
    with pytest.raises(ExportError, match=r"q9.*Choose from f16, q8_0, q6_k, q5_k_m, q4_k_m, "):
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
    code = (
        "from kto_core.export import export; from kto_core.runs import folders; "
        f"export.merge(folders.find({str(small.path)!r}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        children = wait(lambda: part.exists() and _children(parent.pid), 120)
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    wait(lambda: not any(_alive(c) for c in children), 30)
    assert not (small.path / "exports" / "merged").exists()
    folder = export.merge(small)
    assert not files.problem(folder) and not left_behind(small.path)


def _children(pid: int) -> list[int]:
    import psutil

    return [p.pid for p in psutil.Process(pid).children(recursive=True)]


def _alive(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_tokenizer_that_llama_cpp_does_not_know_is_said(small):
    with pytest.raises(ExportError, match="does not know this model's tokenizer"):
        export.gguf(small, ["f16"])
    assert (small.path / "exports" / "merged").is_dir() and not list((small.path / "exports").rglob("*.gguf"))
