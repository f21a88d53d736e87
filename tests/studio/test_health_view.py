"""Health under the plots of the Train tab, and in ``runs show``: the same findings, read from the run's folder."""

import json

import pytest

from kto_core.config import resolving
from kto_core.health.about import INFO, WARNING, Finding
from kto_core.runs import folders
from kto_core.runs.events import EventLog
from kto_studio.train import health_view

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def drifted(runs_dir):
    """A run at 1e-2 whose good answers became very unlikely, and its log."""
    run = folders.create(resolving.resolve("demo", {"data": "x.jsonl", "learning_rate": 0.01, "output_dir": ""}))
    log = EventLog(run.path / "events.jsonl")
    log.status("training", total_steps=20)
    for step in range(1, 21):
        rewards = {"rewards/chosen": -1.0 * step, "rewards/rejected": -1.2 * step}
        log.metric(step, loss=0.4, kl=0.0, **rewards)
    log.status("finished")
    return run


def test_a_finding_is_a_line_with_what_to_change(drifted):
    (shown,) = health_view.values(drifted)
    text = shown["value"]
    assert shown["visible"] and 'data-kind="large"' in text and 'data-level="warning"' in text
    assert text.index("it drifts") < text.index("</b>") < text.index("Lower learning_rate, which is 1e-2")


def test_a_run_without_numbers_shows_nothing_and_a_good_one_says_so(drifted, runs_dir):
    assert health_view.values(None)[0]["visible"] is False and health_view.key(None) == (None,)
    fresh = folders.create(resolving.resolve("demo", {"data": "x.jsonl"}))
    assert health_view.values(fresh)[0]["visible"] is False
    before = health_view.key(fresh)
    log = EventLog(fresh.path / "events.jsonl")
    log.status("training", total_steps=20)
    log.metric(1, loss=0.5)
    assert health_view.key(fresh) != before
    assert health_view.NOTHING in health_view.values(fresh)[0]["value"]


def test_text_is_escaped():
    text = health_view.view([Finding(EVIL, WARNING, EVIL, EVIL), Finding("lengths", INFO, "`x`", "y")])
    assert "<img" not in text and text.count("&lt;img") == 3 and "<code>x</code>" in text


def test_settings_that_cannot_be_read_leave_nothing_to_say(drifted):
    (drifted.path / "config.yaml").write_text("beta: [")
    assert health_view.NOTHING in health_view.values(drifted)[0]["value"]


def test_the_command_line_says_the_same(drifted, capsys):
    from kto_core.cli import main

    assert main(["runs", "show", drifted.id, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["health"]
    assert found["kind"] == "large" and found["level"] == WARNING and found["change"]
    assert main(["runs", "show", drifted.id]) == 0
    assert f"health   {found['sentence']}" in capsys.readouterr().out
