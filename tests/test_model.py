"""Models: the demo model's five mends, facts without torch, tokenizers without a template, the Hub, adapters."""

import contextlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from training import make_tiny, resolved

from kto_core import config, demo_model, model, model_info
from kto_core.errors import Cancelled, ConfigError, ModelError
from kto_core.events import EventLog

ROOT = Path(model.__file__).parents[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, demo_model):
    return make_tiny(tmp_path_factory.mktemp("tiny"), demo_model)


# ---- the demo model --------------------------------------------------------------------------------------------------


def test_demo_tokenizer_is_mended(demo_model):
    tokenizer = model.load_tokenizer("demo")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert (tokenizer.bos_token, tokenizer.unk_token) == ("<|im_start|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 8192
    assert tokenizer.clean_up_tokenization_spaces is False
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.decode(tokenizer("Hello , you 's !").input_ids) == "Hello , you 's !"


def test_demo_model_answers(demo_model):
    import torch

    loaded = model.load_base(config.resolve("demo", {}).config, for_training=False)
    tokenizer = model.load_tokenizer("demo")
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
        "import sys, json; from kto_core.model_info import model_facts; f = model_facts('demo').to_dict(); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; print(json.dumps(f))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    facts = json.loads(out.stdout)
    assert facts["parameters"] == 134_515_008 and facts["layers"] == 30 and facts["vocabulary"] == 49_152
    assert facts["max_position_embeddings"] == 8192 and facts["quantized"] == ""


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
        ("", "No model is chosen"),
        ("nothing", "neither a folder here nor a Hub id"),
        ("two words/x", "neither a folder here nor a Hub id"),
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
        model.load_base(resolved(broken, "").config, for_training=True)
    pickles = shutil.copytree(tiny, tmp_path / "pickle", ignore=shutil.ignore_patterns("*.safetensors"))
    (pickles / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(ModelError, match="safetensors"):
        model.load_base(resolved(pickles, "").config, for_training=True)
    (pickles / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config.json"):
        model_info.model_facts(str(pickles))
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="tokenizer"):
        model.load_tokenizer(str(broken))


def test_a_model_without_a_template_speaks_chatml(tiny, tmp_path):
    plain = shutil.copytree(tiny, tmp_path / "plain", ignore=shutil.ignore_patterns("chat_template.jinja"))
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    settings.pop("pad_token"), settings.pop("chat_template", None)
    settings["eos_token"] = "<|endoftext|>"
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = model.load_tokenizer(str(plain))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"  # known to the model: its turns end there
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


# ---- adapters --------------------------------------------------------------------------------------------------------


def test_adapters(tiny, tmp_path):
    import torch

    settings = resolved(tiny, "").config
    base = model.load_base(settings, for_training=True)
    adapted = model.add_adapter(base, settings)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all(p.dtype == torch.float32 and "lora_" in n for n, p in trained.items())
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.01)
    adapted.save_pretrained(tmp_path / "adapter")
    again = model.load_adapter(model.load_base(settings, for_training=False), tmp_path / "adapter")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, adapted(ids).logits)

    with pytest.raises(ConfigError, match="lm_head"):
        model.lora_config(settings.model_copy(update={"target_modules": ["q_proj", "lm_head"]}))
    with pytest.raises(ModelError, match="target_modules"):
        model.add_adapter(
            model.load_base(settings, for_training=True), settings.model_copy(update={"target_modules": ["nope"]})
        )
    with pytest.raises(ModelError, match="no adapter"):
        model.load_adapter(base, tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match="does not load"):
        model.load_adapter(model.load_base(settings, for_training=False), tmp_path / "adapter")


@pytest.mark.parametrize("double", [True, False])
def test_nf4_on_a_cpu(tiny, double):
    from bitsandbytes.nn import Linear4bit

    settings = resolved(tiny, "", load_in_4bit=True, bnb_4bit_use_double_quant=double).config
    loaded = model.load_base(settings, for_training=True)
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
        loaded = model.load_base(settings, for_training=training)
        marks = [m.support_avx512bf16_for_cpu for m in loaded.modules() if isinstance(m, modules.Linear4bit)]
        assert len(marks) == 14 and any(marks) != training


# ---- the Hub ---------------------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's HTTP API as a download needs: one good model, a gated one, one of pickles."""

    folder: Path
    COMMIT = "0" * 39 + "1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.partition("?")[0]
        if "/gated/" in path or path.endswith("/gated"):
            return self.send(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
        if path in ("/api/models/me/good", "/api/models/me/pickles"):
            names = [p.name for p in self.folder.iterdir()] + ["consolidated.safetensors"]
            if path.endswith("pickles"):
                names = ["config.json", "pytorch_model.bin"]
            sizes = {n: (self.folder / n).stat().st_size if (self.folder / n).exists() else 1 << 60 for n in names}
            found = {
                "id": path[12:],
                "sha": self.COMMIT,
                "siblings": [{"rfilename": n, "size": s} for n, s in sizes.items()],
            }
            return self.send(200, json.dumps(found).encode(), body, {"Content-Type": "application/json"})
        if path.startswith("/me/good/resolve/"):
            file = self.folder / path.rsplit("/", 1)[1]
            if file.is_file():
                return self.send(200, file.read_bytes(), body, {"ETag": f'"{file.name}"', "X-Repo-Commit": self.COMMIT})
            return self.send(404, b"{}", body, {"X-Error-Code": "EntryNotFound"})
        return self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

    def send(self, code, content, body, headers):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


ASK = """
import json, sys, threading
from kto_core import model, model_files, model_info
from kto_core.errors import KTOError
said, out = [], {}
cancel = threading.Event()
def stop(fraction, text):
    cancel.set()
for name in ("me/none", "me/gated", "me/pickles"):
    try:
        out[name] = str(model_info.local_folder(name))
    except KTOError as e:
        out[name] = f"{type(e).__name__}: {e}"
try:
    model_info.local_folder("me/good", stop, cancel)
except KTOError as e:
    out["cancelled"] = type(e).__name__
out["before"] = str(model_files.cached_folder("me/good"))
out["facts"] = model_info.model_facts("me/good").parameters
out["good"] = str(model_info.local_folder("me/good", lambda f, t: said.append([f, t])))
out["said"] = said
out["again"] = str(model_files.cached_folder("me/good"))
print(json.dumps(out))
"""


def test_models_of_the_hub(tiny, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"folder": tiny}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    env.pop("HF_TOKEN", None)
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["me/none"].startswith("ModelError: There is no model me/none at the Hub")
    assert out["me/gated"].startswith("ModelError: me/gated is gated") and "HF_TOKEN" in out["me/gated"]
    assert "no safetensors" in out["me/pickles"]
    assert out["cancelled"] == "Cancelled" and out["before"] == "None"
    assert out["good"] == out["again"] and (Path(out["good"]) / "model.safetensors").is_file()
    assert not (Path(out["good"]) / "consolidated.safetensors").exists()
    assert out["said"][-1][0] == 1.0 and "GB" in out["said"][-1][1]
    assert out["facts"] == model_info.model_facts(str(tiny)).parameters

    offline = "from kto_core import model, model_info; print(model_info.local_folder('me/good')); "
    offline += "model.load_tokenizer('me/good')"
    offline += "\ntry: model_info.resolve_model('me/other')\nexcept Exception as e: print(type(e).__name__, e)"
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9"}  # what was fetched works without a network
    done = subprocess.run([sys.executable, "-c", offline], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.splitlines()[0] == out["good"], done.stderr
    assert "ModelError" in done.stdout and "cannot be reached" in done.stdout


@pytest.mark.parametrize(
    "name,strange",
    [
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
        ),
        ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}),
    ],
)
def test_code_in_a_models_folder_is_never_run_nor_asked_for(tiny_model, tmp_path, monkeypatch, name, strange):
    """transformers asks at the terminal whether to run it; the answer would be yes."""
    from kto_core.train_choices import choose_engine

    asked = []
    monkeypatch.setattr("builtins.input", lambda *a: asked.append(a) or "y")
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | strange))
    with contextlib.suppress(ModelError):
        model.load_tokenizer(str(folder))
    with contextlib.suppress(Exception):
        choose_engine(resolved(folder, "x.jsonl", engine="auto").config, EventLog(tmp_path / "events.jsonl"))
    assert not (tmp_path / "ran").exists() and not asked


def test_page_locked_memory_is_given_back_too(monkeypatch):
    import torch

    from kto_core.model import free_memory

    asked = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("GPU"))
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: asked.append("host"))
    free_memory()
    assert asked == ["GPU", "host"]
