"""A data folder of its own and a small data set in it, for tests of the Train tab without a browser."""

import pytest

from kto_studio.data import jobs as data_jobs
from kto_studio.shared import live
from tests.support.training import make_data


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A data folder of its own, and nothing remembered from the test before."""
    monkeypatch.setenv("KTO_STUDIO_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    live.forget()
    yield
    live.forget()


@pytest.fixture
def data(tmp_path) -> str:
    """Id of a small data set that has been read."""
    make_data(tmp_path / "data" / "sums.jsonl")
    found = data_jobs.look("file:sums.jsonl", "demo", 512, start=True)
    while found.reading is not None and found.reading.running:
        found.reading.thread.join(30)
        found = data_jobs.look("file:sums.jsonl", "demo", 512, start=True)
    assert found.loaded is not None
    return "file:sums.jsonl"
