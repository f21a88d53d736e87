"""No library reports that it is used: in the app, the command line, workers and children."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kto_core.guards import child
from kto_core.guards.no_statistics import OFF

ROOT = Path(__file__).resolve().parents[2]
ON = {name: "0" if value == "1" else "true" for name, value in OFF.items()}
SHOW = "import json, os; print(json.dumps({n: os.environ.get(n) for n in %r}))" % list(OFF)  # noqa: UP031


def seen(code: str) -> dict:
    """The variables as a fresh process has them after ``code``, in an environment that says the opposite."""
    env = os.environ | ON
    done = subprocess.run([sys.executable, "-c", f"{code}\n{SHOW}"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "code",
    [
        "import kto_core.cli",
        "import kto_core.worker",
        "import kto_core.guards.child",
        "import kto_studio.chat.guest",
        "import app, kto_studio.launch",
    ],
)
def test_every_way_in_switches_them_off(code):
    assert seen(code) == OFF


def test_the_page_switches_them_off_before_gradio_looks():
    """gradio and huggingface_hub read the environment when they are imported."""
    code = "import kto_studio.launch, huggingface_hub.constants as c, gradio.analytics as a\n"
    code += "assert c.HF_HUB_DISABLE_TELEMETRY and not a.analytics_enabled()"
    assert seen(code) == OFF


def test_children_inherit_it(monkeypatch):
    for name, value in OFF.items():
        monkeypatch.setenv(name, value)
    assert json.loads(child.run([sys.executable, "-c", SHOW]).tail) == OFF


def test_weights_and_biases_is_not_imported_unless_asked_for():
    from kto_core.config import resolving

    assert resolving.resolve("demo", {}).config.report_to == "none"
