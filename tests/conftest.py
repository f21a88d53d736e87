"""Shared by all tests: a runs folder of their own, no telemetry, and the demo model made once."""

import contextlib
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def runs_dir(tmp_path, monkeypatch):
    """Every test has its own runs folder."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("KTO_STUDIO_RUNS", str(folder))
    return folder


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Folder of the converted SmolLM2-135M-Instruct; the first call on a machine takes about half a minute."""
    from kto_core.demo_model import demo_model_dir

    return demo_model_dir()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The development data sets that lie beside a developer's checkout; a plain clone has none."""
    if not SHARED.is_dir():
        pytest.skip("the development data is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, demo_model) -> Path:
    """A two-layer model that reads bytes: see `training.make_tiny`."""
    from training import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny"), demo_model)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A browser test that fails says what its page showed: where it fails on another machine, that is all there is."""
    report = yield
    if report.when == "call" and report.failed and "page" in item.funcargs:
        with contextlib.suppress(Exception):
            shown = item.funcargs["page"].evaluate("document.body.innerText")
            report.sections.append(("the page at the failure", shown[:6000]))
    return report
