"""A merge tensor by tensor gives what a merge of the loaded model gives, goes on where it was killed, and takes little
memory."""

import json
import shutil
from pathlib import Path

import pytest

from kto_core import files
from kto_core.errors import Cancelled, ExportError, KTOError, ModelError
from kto_core.export import export, merging
from kto_core.export.merge import plan, shards, tensor_files
from kto_core.guards import child
from kto_core.models.model_gate import tensors_of
from tests.support import oracle
from tests.support.exporting import left_behind
from tests.support.mixtures import make_mixture
from tests.support.training import make_wrapper

KINDS = ["llama", "llama tied", "llama as fp32", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gemma3 with images",
         "qwen2.5_vl", "mistral3", "qwen3_5", "lfm2", "qwen3_moe", "qwen3_moe nf4", "granite"]  # fmt: skip


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(merging, "tell", lambda *_: None)


def make_base(folder: Path, tiny: Path, kind: str) -> Path:
    """A checkpoint of an architecture: random weights in bf16, with the tokenizer of ``tiny``."""
    import torch
    from transformers import AutoModelForCausalLM

    name, _, how = kind.partition(" as ")
    if name in oracle.WRAPPERS:
        make_wrapper(folder, tiny, name)
    elif name.startswith("qwen3_moe"):
        return make_mixture(folder, tiny, "qwen3_moe", nf4=name.endswith("nf4"))
    else:
        shutil.copytree(tiny, folder)
        (folder / "model.safetensors").unlink()
        dtype = torch.float32 if how else torch.bfloat16
        torch.manual_seed(0)
        config = oracle.config_of(name.removesuffix(" tied"), tie_word_embeddings=name.endswith("tied"))
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "do_sample": False}))
    return folder


def make_adapter(folder: Path, base: Path, **extra) -> Path:
    """A LoRA of the language model's linear layers whose steps are about as large as bf16's."""
    import torch
    from peft import LoraConfig, get_peft_model

    from kto_core.models.language.targets import excluded, given
    from kto_core.models.whole import bare

    model = bare(base)
    how = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | extra
    if how["target_modules"] == "all-linear":
        how |= {"target_modules": given(model, "all-linear"), "exclude_modules": excluded(model, "all-linear")}
    tuned = get_peft_model(model, LoraConfig(**how))
    for name, module in tuned.named_modules():
        if "lora_" in name:
            module.to_empty(device="cpu", recurse=False)
    torch.manual_seed(2)
    for weight in tuned.parameters():
        if weight.requires_grad and weight.device.type != "meta":
            torch.nn.init.normal_(weight, std=0.02)
    tuned.save_pretrained(folder)
    return folder


def merge(base: Path, adapter: Path, part: Path, source: str = "") -> dict:
    part.mkdir(exist_ok=True)
    return merging.merge(str(base), str(adapter), str(part), "owner/base", {"source": source})


def weights(folder: Path) -> dict:
    from safetensors.torch import load_file

    files = sorted({file for file, _, _ in tensors_of(folder).values()})
    return {name: value for file in files for name, value in load_file(folder / file).items()}


def whole_only(monkeypatch):
    """Merges from here on load the model."""
    monkeypatch.setattr(plan, "plan", lambda *_: None)


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_give_the_same_bits(kind, tmp_path, tiny_model, monkeypatch):
    import torch

    base = make_base(tmp_path / "base", tiny_model, kind)
    adapter = make_adapter(tmp_path / "adapter", base)
    monkeypatch.setattr(shards, "SHARD", 50_000)
    made = plan.plan(base, str(adapter), lambda *_: None)
    assert made is not None and made.layers
    ours = merge(base, adapter, tmp_path / "ours")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    whole_only(monkeypatch)
    theirs = merge(base, adapter, tmp_path / "theirs")
    mine, other = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    assert mine.keys() == other.keys()
    for name, value in other.items():
        assert mine[name].dtype == value.dtype and torch.equal(mine[name], value), name
    assert ours.pop("kept") == pytest.approx(theirs.pop("kept"), rel=1e-6) and ours == theirs and ours["layers"]
    for file in ("config.json", "generation_config.json"):
        one, two = (json.loads((tmp_path / side / file).read_text()) for side in ("ours", "theirs"))
        assert {k: v for k, v in one.items() if v is not False} == {k: v for k, v in two.items() if v is not False}
    left = {p.name for p in (tmp_path / "ours").iterdir() if not p.name.startswith("model")}
    assert left == {p.name for p in (tmp_path / "theirs").iterdir() if not p.name.startswith("model")}
    names = {n for n in weights(base) if "weight." not in n} if "nf4" not in kind else mine.keys()
    assert mine.keys() == names  # also what others look for


def test_a_4_bit_base_in_several_files_is_opened_weight_by_weight(tmp_path, tiny_model, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "model.safetensors").unlink()
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
    AutoModelForCausalLM.from_pretrained(
        tiny_model, quantization_config=how, dtype=torch.bfloat16, device_map={"": "cpu"}
    ).save_pretrained(base, max_shard_size=50_000)
    assert len(list(base.glob("*.safetensors"))) > 1
    adapter = make_adapter(tmp_path / "adapter", tiny_model, use_rslora=True, rank_pattern={"q_proj": 8})
    assert plan.plan(base, str(adapter), lambda *_: None) is not None
    merge(base, adapter, tmp_path / "ours")
    whole_only(monkeypatch)
    merge(base, adapter, tmp_path / "theirs")
    mine, other = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    assert mine.keys() == other.keys() and all(torch.equal(mine[n], other[n]) for n in other)
    assert (tmp_path / "ours" / "config.json").read_bytes() == (tmp_path / "theirs" / "config.json").read_bytes()


@pytest.mark.parametrize("extra", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_more_than_two_matrices_a_layer_need_the_loaded_model(extra, tmp_path, tiny_model):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **extra)).save_pretrained(
        tmp_path / "adapter"
    )
    assert plan.plan(tiny_model, str(tmp_path / "adapter"), lambda *_: None) is None
    assert merge(tiny_model, tmp_path / "adapter", tmp_path / "part")["layers"]


def killed_in_the_third(made: list[str]):
    """In place of `tensor_files.write`: names of the files that it wrote go to ``made``; the third stays half done."""
    write = tensor_files.write

    def killed(path, entries, tensor):
        if len(made) == 2:
            path.with_name(path.name + ".part").write_bytes(b"half")
            raise KeyboardInterrupt
        made.append(path.name)
        return write(path, entries, tensor)

    return killed


def test_what_a_killed_merge_finished_is_used_and_nothing_else(tmp_path, tiny_model, monkeypatch):
    import torch

    base = make_base(tmp_path / "base", tiny_model, "llama")
    adapter = make_adapter(tmp_path / "adapter", base)
    monkeypatch.setattr(shards, "SHARD", 50_000)
    merge(base, adapter, tmp_path / "once", "key")
    write, made = tensor_files.write, []
    killed = killed_in_the_third(made)

    part = tmp_path / "part"
    monkeypatch.setattr(tensor_files, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        merge(base, adapter, part, "key")
    times = {name: (part / name).stat().st_mtime_ns for name in made}
    (part / made[1]).write_bytes((part / made[1]).read_bytes()[:-9])  # cut off: made again
    monkeypatch.setattr(tensor_files, "write", write)
    facts = merge(base, adapter, part, "key")
    after = {name: (part / name).stat().st_mtime_ns for name in made}
    assert [after[name] == times[name] for name in made] == [True, False]
    assert {p.name for p in part.iterdir()} == {p.name for p in (tmp_path / "once").iterdir()}
    mine, other = weights(part), weights(tmp_path / "once")
    assert mine.keys() == other.keys() and all(torch.equal(mine[n], other[n]) for n in other)
    assert facts == json.loads((tmp_path / "once" / "export.json").read_text())

    monkeypatch.setattr(tensor_files, "write", killed)
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        merge(base, adapter, tmp_path / "other", "key")
    before = (tmp_path / "other" / made[0]).stat().st_mtime_ns
    monkeypatch.setattr(tensor_files, "write", write)
    merge(base, adapter, tmp_path / "other", "another key")
    assert (tmp_path / "other" / made[0]).stat().st_mtime_ns != before


def test_a_missing_or_damaged_file_of_the_base_is_one_sentence(tmp_path, tiny_model):
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(base, max_shard_size=50_000)
    adapter = make_adapter(tmp_path / "adapter", base)
    second = sorted(base.glob("*.safetensors"))[1]
    whole = second.read_bytes()

    def refused(what: str) -> None:
        shutil.rmtree(tmp_path / "part", ignore_errors=True)
        with pytest.raises(KTOError, match=what) as caught:
            merge(base, adapter, tmp_path / "part")
        assert isinstance(caught.value, ModelError) and "\n" not in str(caught.value)
        assert not list((tmp_path / "part").iterdir())

    second.unlink()
    refused("model-0")
    second.write_bytes(whole[:-5])
    refused("not a complete safetensors file")
    second.write_bytes(whole)
    tensors = load_file(second)
    name = next(n for n in tensors if tensors[n].dim() == 2)
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, second, {"format": "pt"})
    refused("has the shape")
    save_file({n: t for n, t in tensors.items() if n != name}, second, {"format": "pt"})
    refused("missing")


def test_an_adapter_that_is_not_finite_is_refused(tmp_path, tiny_model):
    from safetensors.torch import load_file, save_file

    adapter = make_adapter(tmp_path / "adapter", tiny_model)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[min(tensors)][0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match="training diverged"):
        merge(tiny_model, adapter, tmp_path / "part")


def test_written_files_are_what_safetensors_reads(tmp_path):
    import torch
    from safetensors.torch import load_file

    given = {
        "odd": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "é": torch.randn(2, 5).half().t(),
        "flag": torch.tensor([True, False]),
    }
    kinds = {"odd": "BF16", "scalar": "I64", "empty": "F32", "é": "F16", "flag": "BOOL"}
    entries = [tensor_files.Entry(n, kinds[n], tuple(t.shape)) for n, t in given.items()]
    size = tensor_files.write(tmp_path / "x.safetensors", entries, lambda e: given[e.name])
    assert (tmp_path / "x.safetensors").stat().st_size == size
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == given.keys() and all(torch.equal(read[n], t) for n, t in given.items())
    with pytest.raises(ValueError, match="bytes instead of"):
        tensor_files.write(tmp_path / "y.safetensors", entries, lambda e: given["odd"])
    assert not list(tmp_path.glob("y*"))


def test_an_export_keeps_what_a_killed_child_finished(run, monkeypatch):
    """And nothing of another adapter; a cancelled one leaves nothing."""
    exports = run.path / "exports"
    write, made, there = tensor_files.write, [], []
    killed = killed_in_the_third(made)

    def in_process(module, function, arguments, **_):
        there[:] = sorted(p.name for p in Path(arguments["part"]).iterdir())
        try:
            return merging.merge(**arguments)
        except KeyboardInterrupt:
            raise child.ChildFailed(child.Ended(-9, ""), "The merge") from None

    monkeypatch.setattr(shards, "SHARD", 50_000)
    monkeypatch.setattr(child, "call", in_process)
    monkeypatch.setattr(tensor_files, "write", killed)
    with pytest.raises(ExportError, match="memory ran out"):
        export.merge(run)
    first = exports / "merged.part" / made[0]
    stamp = first.stat().st_mtime_ns
    assert there == [] and {p.name for p in first.parent.iterdir()} == {*made, shards.STATE}
    monkeypatch.setattr(tensor_files, "write", write)
    folder = export.merge(run)
    assert there == sorted([*made, shards.STATE]) and (folder / made[0]).stat().st_mtime_ns == stamp
    assert not files.problem(folder) and not (folder / shards.STATE).exists() and not left_behind(run.path)

    settings = run.adapter / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"lora_alpha": 99}))
    made.clear()
    monkeypatch.setattr(tensor_files, "write", killed)
    with pytest.raises(ExportError):
        export.merge(run)
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"lora_alpha": 98}))
    monkeypatch.setattr(tensor_files, "write", lambda *_: (_ for _ in ()).throw(Cancelled("Stopped.")))
    with pytest.raises(Cancelled):
        export.merge(run)
    assert there == [] and not (exports / "merged.part").exists()
