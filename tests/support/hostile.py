"""Spoil a model or an adapter of a stranger, and load it; nothing that is refused may be loaded or unpickled first."""

import json
import struct
from pathlib import Path

import pytest

from kto_core.models import load as model
from tests.support.training import resolved


@pytest.fixture(autouse=True)
def no_weights(monkeypatch, request):
    """What is refused is refused before transformers is asked for weights; nothing unpickles."""
    import torch

    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("something was unpickled"))
    if "loads" in request.keywords:
        return
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def load(folder: Path):
    return model.load_base(resolved(folder, "").config, for_training=False)


def header(file: Path, change_header) -> None:
    """Rewrite the header of a safetensors file."""
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    new = json.dumps(change_header(json.loads(raw[8 : 8 + size]))).encode()
    file.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + size :])
