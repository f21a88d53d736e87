"""A run with an adapter, and a server that speaks the Hub's HTTP API."""

import shutil

import pytest

from tests.support.exporting import make_run
from tests.support.fake_hub import running


@pytest.fixture
def server(monkeypatch, tmp_path):
    with running() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        yield server


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KTO_STUDIO_RUNS", str(folder))
        return make_run(folder / "a-run", tiny_model, str(tiny_model))


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a trained run, so that each test has its own exports."""
    from kto_core.runs.folders import find

    shutil.copytree(trained.path, tmp_path / "a-run")
    return find(str(tmp_path / "a-run"))
