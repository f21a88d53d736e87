"""Models of strangers: one sentence before anything is loaded, and only safetensors are ever read."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest

from kto_core.errors import ModelError
from kto_core.models import facts, hub_files, model_gate
from kto_core.models import load as model
from tests.models.test_hub_loading import Hub
from tests.support.hostile import change, header, load, no_weights  # noqa: F401 (a fixture)
from tests.support.training import resolved


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    """A good model that a test may spoil."""
    return shutil.copytree(tiny_model, tmp_path / "stranger")


# ---- weights ---------------------------------------------------------------------------------------------------------


def index(folder: Path, weight_map) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def good_map(folder: Path, name: str) -> dict:
    return dict.fromkeys(model_gate.tensor_header(folder / "model.safetensors"), name)


@pytest.mark.parametrize(
    "name",
    ["weights.txt", "pytorch_model.bin", "../other/model.safetensors", "/etc/model.safetensors", "a/b.safetensors",
     "..\\b.safetensors", ".hidden.safetensors", "x.safetensors\n", "", 7, None, ["model-1.safetensors"], {}],
)  # fmt: skip
def test_an_index_names_safetensors_files_beside_it_only(folder, name):
    import torch

    weights = good_map(folder, "model-1.safetensors")
    first = sorted(weights)[0]
    index(folder, weights | {first: name})
    for file in ("weights.txt", "pytorch_model.bin"):
        torch.save({first: torch.zeros(1)}, folder / file)
    with pytest.raises(ModelError, match="not a safetensors file in the same folder"):
        load(folder)
    with pytest.raises(ModelError, match="not a safetensors file in the same folder"):
        facts.local_folder(str(folder))


@pytest.mark.parametrize("weight_map", [None, [], {}, "model.safetensors", 3])
def test_an_index_without_a_map(folder, weight_map):
    index(folder, weight_map)
    with pytest.raises(ModelError, match="names no weights"):
        load(folder)


def test_an_index_that_lies_about_a_file(folder):
    index(folder, good_map(folder, "model-1.safetensors") | {"model.more.weight": "model-1.safetensors"})
    with pytest.raises(ModelError, match=r"1 weights that the index .*model\.more\.weight"):
        load(folder)
    index_file = folder / "model.safetensors.index.json"
    change(index_file, weight_map={"a": "model-2.safetensors"})
    with pytest.raises(ModelError, match=r"lacks model-2\.safetensors"):
        load(folder)


@pytest.mark.loads
def test_a_good_index_loads(folder):
    index(folder, good_map(folder, "model-1.safetensors"))
    assert load(folder).num_parameters() > 0


def test_links_out_of_the_folder(folder, tmp_path):
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(ModelError, match="link to another place"):
        load(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")  # to itself
    with pytest.raises(ModelError, match="link to another place"):
        load(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match=r"tokenizer\.json .* link to another place"):
        model.load_tokenizer(str(folder))


@pytest.mark.loads
def test_links_of_the_hubs_cache_are_followed(folder, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    for n, file in enumerate(folder.iterdir()):
        file.rename(blobs / str(n))
        (snapshot / file.name).symlink_to(f"../../blobs/{n}")
    assert load(snapshot).num_parameters() > 0


def test_headers_that_lie(folder):
    file = folder / "model.safetensors"
    good = file.read_bytes()
    deep = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    entry = {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}
    broken = {
        "length 2^63": struct.pack("<Q", 1 << 63) + b"{}",
        "longer than the file": struct.pack("<Q", 1000) + b"{}",
        "deep": struct.pack("<Q", len(deep)) + deep,
        "a list": struct.pack("<Q", 2) + b"[]",
        "huge shape": struct.pack("<Q", len(json.dumps({"a": entry}))) + json.dumps({"a": entry}).encode() + b"1234",
        "empty": b"",
        "cut": good[: len(good) // 2],
    }
    for what, raw in broken.items():
        file.write_bytes(raw)
        with pytest.raises(ModelError, match="not a complete safetensors file"):
            load(folder)
        assert facts.model_facts(str(folder)).parameters > 0, what  # from the shapes: planning goes on


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 1}, r"leaves out \(model\.layers\.1\..*fewer layers"),
        ({"hidden_size": 32}, "do not fit its config.json"),
        ({"vocab_size": 100}, "do not fit its config.json: .*embed_tokens"),
        ({"intermediate_size": 99}, "do not fit its config.json: .*mlp"),
        ({"model_type": "nothing"}, "No model can be built"),
        ({"num_attention_heads": "four"}, "config.json"),
        ({"num_attention_heads": 0}, "num_attention_heads: 0"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ({"text_config": [1]}, "wrong kinds"),
        ({"quantization_config": [1]}, "quantized as"),
        ({"quantization_config": {"quant_method": "evil"}}, "quantized as 'evil'"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "quantized as 'gptq'"),
    ],
)
def test_configurations_that_lie(folder, values, words):
    change(folder / "config.json", **values)
    with pytest.raises(ModelError, match=words):
        load(folder)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "{", "\x00", '{"a":' * 100_000, "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_settings_that_are_none(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(ModelError, match=name):
        load(folder)
    with pytest.raises(ModelError, match=name):
        model.load_tokenizer(str(folder))


@pytest.mark.loads
def test_weights_without_a_place_are_named_and_legitimate_ones_load(folder, caplog):
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    more = {"lm_head.weight": tensors["model.embed_tokens.weight"], "mtp.fc.weight": tensors["model.norm.weight"]}
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": tensors["model.norm.weight"].clone()}
    save_file({n: t.clone() for n, t in (tensors | more | rotary).items()}, file, metadata={"format": "pt"})
    assert load(folder).num_parameters() > 0
    assert "mtp.fc.weight" in caplog.text and "not used" in caplog.text and "inv_freq" not in caplog.text


# ---- settings that choose code ---------------------------------------------------------------------------------------


@pytest.mark.loads
def test_keys_that_choose_code_are_dropped_and_named(folder, tmp_path, monkeypatch):
    from transformers.integrations import hub_kernels

    asked = []
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *a, **k: asked.append(a), raising=False)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    evil = {"auto_map": {"AutoConfig": "evil.Evil"}, "_attn_implementation": "owner/kernel"}
    change(folder / "config.json", **evil, _attn_implementation_internal="owner/kernel", transformers_weights="x.bin",
           text_settings={"experts_implementation": "owner/kernel"})  # fmt: skip
    change(folder / "generation_config.json", custom_generate="owner/repository")
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "some/other"}')
    said = []
    loaded = model.load_base(resolved(folder, "").config, for_training=False, progress=lambda f, t: said.append(t))
    assert loaded.config._attn_implementation == "sdpa" and not asked and not (tmp_path / "ran").exists()
    named = next(t for t in said if "chooses code" in t)
    for key in ("config.json: auto_map", "_attn_implementation", "_attn_implementation_internal",
                "transformers_weights", "text_settings.experts_implementation", "tokenizer_config.json: auto_map",
                "generation_config.json: custom_generate", "adapter_config.json"):  # fmt: skip
        assert key in named
    given = facts.local_folder(str(folder))
    assert given != folder and given == facts.local_folder(str(folder)) == facts.local_folder(str(given))
    assert not {"evil.py", "adapter_config.json"} & {p.name for p in given.iterdir()}
    assert not any(key in (given / "config.json").read_text() for key in model_gate.CODE_KEYS)
    assert model.load_tokenizer(str(folder)).eos_token == "<|im_end|>"


def test_nothing_is_said_of_a_good_model(tiny_model):
    assert model.remarks(str(tiny_model)) == [] and facts.local_folder(str(tiny_model)) == tiny_model


def test_only_what_is_needed_is_fetched():
    for name in ("config.json", "tokenizer.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja",
                 "model.safetensors.index.json"):  # fmt: skip
        assert model_gate.wanted(name)
    for name in ("weights.txt", "pytorch_model.bin", "evil.py", "adapter_config.json", "training_args.bin",
                 "model.safetensors.txt", "original/config.json", "optimizer.json", "README.md"):  # fmt: skip
        assert not model_gate.wanted(name)


def test_a_hub_model_is_fetched_by_its_index(folder, tmp_path):
    """Over HTTP: what the index does not name stays there, and an index that names a pickle ends the download."""
    import http.server
    import subprocess
    import sys
    import threading

    index(folder, good_map(folder, "model-1.safetensors"))
    for name in ("weights.txt", "extra.safetensors", "evil.py", "pytorch_model.bin", "other.json"):
        (folder / name).write_bytes(b"x")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"folder": folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from kto_core.models import facts as model_info, hub_files as model_files\n"
        "from kto_core.errors import KTOError\n"
        "print(sorted(p.name for p in model_info.tokenizer_folder('me/good').iterdir()))\n"
        "try: print(sorted(p.name for p in model_info.local_folder('me/good').iterdir()))\n"
        "except KTOError as e: print(e)"
    )

    def fetched(home: str) -> list[str]:
        env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / home),
                            "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}  # fmt: skip
        done = subprocess.run([sys.executable, "-c", code], cwd=facts.__file__.rsplit("/", 3)[0], env=env,
                              capture_output=True, text=True, timeout=240)  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()

    try:
        alone, whole = fetched("one")
        change(folder / "model.safetensors.index.json", weight_map={"a": "weights.txt"})
        _, refused = fetched("two")
    finally:
        server.shutdown()
        server.server_close()
    assert "model-1.safetensors" not in alone and "tokenizer.json" in alone
    assert "model-1.safetensors" in whole
    assert not any(n in whole for n in ("weights.txt", "extra", "evil.py", "pytorch_model", "other.json"))
    assert "names 'weights.txt'" in refused
    assert hub_files.cached_folder("no such id") is None
