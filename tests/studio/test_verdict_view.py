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
    samples = [{"prompt": EVIL, "base": EVIL, "tuned": f"{EVIL} b"}]
    verdict = {"word": "worse", "reasons": [EVIL]}
    run = judged(tmp_path / "run", data=EVIL, remarks=[EVIL], verdict=verdict, samples=samples)
    text = verdict_view.values(run)[0]["value"]
    assert EVIL not in text and "<img" not in text and text.count("&lt;img") == 6


def test_answers_stand_side_by_side_with_what_changed(tmp_path):
    samples = [
        {"prompt": "p1", "base": "alike", "tuned": "alike"},
        {"prompt": "p2", "base": "a long answer", "tuned": "a short answer"},
    ]
    text = verdict_view.values(judged(tmp_path / "run", samples=samples))[0]["value"]
    assert text.index("p2") < text.index("p1"), "what changed comes first"
    assert "<td>a <del>long </del>answer</td><td>a <ins>short </ins>answer</td>" in text
    assert "<td>alike</td><td><span" in text
    assert "side by side" not in verdict_view.values(judged(tmp_path / "other", samples=[]))[0]["value"]
