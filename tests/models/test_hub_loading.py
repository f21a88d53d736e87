"""Models of the Hub: downloads, what is taken of a repository, and stops."""

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

from kto_core.errors import ModelError
from kto_core.models import facts as model_info
from kto_core.models import load
from tests.support.training import resolved

ROOT = Path(load.__file__).parents[2]


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
from kto_core.models import load as model, hub_files as model_files, facts as model_info
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


# ---- the Hub ---------------------------------------------------------------------------------------------------------


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
    assert out["me/none"].startswith("ModelError: Model me/none does not exist on the Hub")
    assert out["me/gated"].startswith("ModelError: me/gated is gated") and "HF_TOKEN" in out["me/gated"]
    assert "no safetensors" in out["me/pickles"]
    assert out["cancelled"] == "Cancelled" and out["before"] == "None"
    assert out["good"] == out["again"] and (Path(out["good"]) / "model.safetensors").is_file()
    assert not (Path(out["good"]) / "consolidated.safetensors").exists()
    assert out["said"][-1][0] == 1.0 and "GB" in out["said"][-1][1]
    assert out["facts"] == model_info.model_facts(str(tiny)).parameters

    offline = (
        "from kto_core.models import load as model, facts as model_info; print(model_info.local_folder('me/good')); "
    )
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
    from kto_core.planning.choices import choose_engine

    asked = []
    monkeypatch.setattr("builtins.input", lambda *a: asked.append(a) or "y")
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | strange))
    with contextlib.suppress(ModelError):
        load.load_tokenizer(str(folder))
    with contextlib.suppress(Exception):
        choose_engine(resolved(folder, "x.jsonl", engine="auto").config)
    assert not (tmp_path / "ran").exists() and not asked


def test_page_locked_memory_is_given_back_too(monkeypatch):
    import torch

    from kto_core.models.load import free_memory

    asked = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("GPU"))
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: asked.append("host"))
    free_memory()
    assert asked == ["GPU", "host"]
