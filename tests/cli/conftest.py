"""A file of rows for the commands."""

import json
from pathlib import Path

import pytest

from tests.support.commands import ROWS


@pytest.fixture
def rows_file(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    return path
