"""Stand-ins for W&B, TensorBoard and Trackio: modules that note what they are told. None of these is installed here."""

from __future__ import annotations

import sys
from pathlib import Path

WANDB = """
class _Run:
    id = name = "fake"
    url = ""
    summary = {}
    def _label(self, **_): pass
class _Config(dict):
    def update(self, values, **_): dict.update(self, values)
run, config, logged, begun, finished = None, _Config(), [], [], []
def init(**keywords):
    global run
    run = _Run()
    begun.append(keywords)
def log(values): logged.append(dict(values))
def define_metric(*_, **__): pass
def finish():
    global run
    assert run is not None
    run = None
    finished.append(1)
"""
TRACKIO = (
    WANDB.replace("assert run is not None", 'if run is None: raise RuntimeError("Call trackio.init()")')
    + """
class context_vars:
    class current_space_id:
        get = staticmethod(lambda: begun[-1].get("space_id"))
"""
)
TENSORBOARD = """
logged, begun, finished = [], [], []
class SummaryWriter:
    def __init__(self, log_dir=None): begun.append({"log_dir": log_dir})
    def add_text(self, *_): pass
    def add_scalar(self, name, value, step): logged.append({name: value, "train/global_step": step})
    def flush(self): pass
    def close(self): finished.append(1)
"""
MODULES = {"wandb": ("wandb", WANDB), "trackio": ("trackio", TRACKIO), "tensorboard": ("tensorboardX", TENSORBOARD)}


def put(name: str, folder: Path, monkeypatch) -> str:
    """Make the stand-in importable for this test; the module's name."""
    module, source = MODULES[name]
    folder.mkdir()
    files = {f"{module}.py": source}
    if name == "wandb":  # transformers imports an error class of it
        inside = "sdk/lib/config_util.py"
        files = {"wandb/__init__.py": source, f"wandb/{inside}": "class ConfigError(Exception): pass"}
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, module, raising=False)
    return module
