"""Shared by all tests: a runs folder of their own, no telemetry, and the demo model made once."""

import contextlib
import os
import time
from pathlib import Path

import pytest

from tests.support.caches import worker_cache
from tests.support.gated import anonymous, local_site, owner, site, visitor  # noqa: F401 (fixtures of the tests of the gate)

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Runs of two workers must not wait for each other's turn at the card: its lock lies in the cache.
    os.environ["KTO_STUDIO_CACHE"] = worker_cache(worker)

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
    from kto_core.models.demo_model import demo_model_dir

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
    from tests.support.training import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny"), demo_model)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, demo_model) -> Path:
    """`tiny_model` of a module's own, which may spoil it."""
    from tests.support.training import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny"), demo_model)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A small data set for trainings that only have to run."""
    from tests.support.training import make_data

    return make_data(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture
def nothing_left():
    """No test leaves a training behind, whatever happens in it."""
    from kto_core.runs import folders

    yield
    for run in folders.list_runs():
        while run.alive():
            run.stop()
            time.sleep(0.05)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A browser test that fails says what its page showed: where it fails on another machine, that is all there is."""
    report = yield
    if report.when == "call" and report.failed and "page" in item.funcargs:
        with contextlib.suppress(Exception):
            shown = item.funcargs["page"].evaluate("document.body.innerText")
            report.sections.append(("the page at the failure", shown[:6000]))
    return report


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(demo_model)
    found.pad_token_id = 0
    return found
