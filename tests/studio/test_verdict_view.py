"""The verdict in the Train tab: one line and a fold, of the run's own adapter only, all text escaped."""

from kto_studio.train import verdict_view
from tests.support.verdicts import judged

EVIL = "<img src=x onerror=alert(1)>"


def test_a_verdict_is_a_line_and_a_fold(tmp_path):
    run = judged(tmp_path / "run")
    (shown,) = verdict_view.values(run)
    text = shown["value"]
    assert shown["visible"] and text.startswith("<details") and 'data-verdict="better"' in text
    assert "<summary>Better: the reward margin is +1.93 and not chance.</summary>" in text
    assert text.index("9.65 nats per answer") < text.index("95 % interval +1.7 to +2.1") < text.index("AUC")


def test_no_verdict_no_line(tmp_path):
    run = judged(tmp_path / "run")
    before = verdict_view.key(run)
    (run.adapter / "manifest.json").write_text("{}")
    assert verdict_view.values(run)[0]["visible"] is False and verdict_view.key(run) != before
    assert verdict_view.values(None)[0]["visible"] is False and verdict_view.key(None) == (None,)


def test_text_from_a_run_folder_is_escaped(tmp_path):
    run = judged(tmp_path / "run", data=EVIL, remarks=[EVIL], verdict={"word": "worse", "reasons": [EVIL]})
    text = verdict_view.values(run)[0]["value"]
    assert EVIL not in text and text.count("&lt;img") == 3
