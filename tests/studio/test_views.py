"""What the page's frame and the Train tab show of a run: pure functions over events, every text escaped."""

import pytest

from kto_core.errors import KTOError
from kto_core.runs.events import fold
from kto_studio.data import view as data_view
from kto_studio.shared import context, views
from kto_studio.shared.prose import note, prose

EVIL = "<img src=x onerror=alert(1)>"


def state(*events):
    return fold({"t": 100.0 + i, **e} for i, e in enumerate(events))


def training(steps: int = 3, total: int = 10):
    metrics = [
        {"kind": "metric", "step": s, "loss": 0.5 - s / 100, "kl": 0.01, "eta": 65.0} for s in range(1, steps + 1)
    ]
    return state({"kind": "status", "state": "training", "total_steps": total}, *metrics)


def test_header_says_what_runs_and_where():
    idle = views.header_status(None, "CPU only, no NVIDIA GPU")
    assert "CPU only, no NVIDIA GPU" in idle and "chip" not in idle
    busy = views.header_status(training(), "A card")
    assert "Training 30 %" in busy and "chip-training" in busy and 'aria-live="polite"' in busy
    assert EVIL not in views.header_status(None, EVIL)


def test_head_has_state_progress_and_time_left():
    shown = views.head("r1", training())
    assert 'data-state="training"' in shown and 'data-step="3"' in shown
    assert "Step <b>3</b> of 10" in shown and "1 min 5 s</b> left" in shown and 'aria-valuenow="30"' in shown


def test_a_failed_run_says_why_and_no_html_of_it_is_live():
    failed = state(
        {"kind": "status", "state": "training", "total_steps": 4},
        {"kind": "error", "message": f"It broke: {EVIL}"},
        {"kind": "status", "state": "failed", "message": "failed"},
    )
    shown = views.head(EVIL, failed)
    assert 'role="alert"' in shown and "It broke" in shown and EVIL not in shown and "&lt;img" in shown
    assert EVIL not in views.logs(failed) and "It broke" in views.logs(failed)


@pytest.mark.parametrize("name", ["finished", "stopped", "failed", "interrupted", "stopping", "preparing", "training"])
def test_every_state_has_a_word(name):
    found = state({"kind": "status", "state": name, "total_steps": 2})
    assert views.LABELS[name] in views.head("r", found) and f"chip-{name}" in views.chip(found)
    assert views.LABELS[name].lower() in views.run_label("r", found)


def test_a_run_that_waits_is_queued_and_has_no_bar():
    waiting = {"kind": "status", "state": "preparing", "message": "Waiting: run r0 is training."}
    shown = views.head("r1", state(waiting))
    assert "Queued" in shown and "Preparing" not in shown and "progressbar" not in shown
    assert "progressbar" in views.head("r1", state(waiting | {"message": "Loading the model."}))


def test_the_windows_title_has_the_percent_of_the_run():
    assert 'data-title="66 % · KTO Studio"' in views.header_status(training(2, 3), "CPU")
    assert 'data-title="KTO Studio"' in views.header_status(None, "CPU")


def test_a_runs_name_is_in_its_head_and_in_the_list():
    assert "Short A" in views.head("r1", training(), name="Short A") and EVIL not in views.head(
        "r1", training(), name=EVIL
    )
    assert views.run_label("Short A · r1", training(3, 3)).startswith("Short A · r1 · ")


def test_fraction_never_leaves_its_range():
    assert views.fraction(state({"kind": "status", "state": "preparing"})) is None
    assert views.fraction(state({"kind": "status", "state": "preparing", "fraction": 0.25})) == 0.25
    assert views.fraction(training(3, 2)) == 1.0
    assert views.fraction(state({"kind": "status", "state": "finished"})) == 1.0


def test_logs_show_the_last_lines_and_count_the_rest():
    many = state(*({"kind": "log", "text": f"line {i}"} for i in range(views.LOG_LINES + 7)))
    shown = views.logs(many)
    assert f"line {views.LOG_LINES + 6}" in shown and ">line 6<" not in shown and "7 earlier lines" in shown
    assert "No log messages yet" in views.logs(state())


def test_the_log_tells_phases_steps_and_checkpoints_in_their_order():
    shown = views.logs(
        state(
            {
                "kind": "status",
                "state": "preparing",
                "message": "Computing reference log-probs: 1 of 9",
                "fraction": 0.1,
            },
            {
                "kind": "status",
                "state": "preparing",
                "message": "Computing reference log-probs: 8 of 9",
                "fraction": 0.9,
            },
            {"kind": "status", "state": "training", "message": "Training: 4 steps.", "total_steps": 4},
            {"kind": "metric", "step": 2, "loss": 0.5, "rewards/margins": 0.25, "kl": 0.01},
            {"kind": "checkpoint", "step": 2, "path": "p"},
        )
    )
    expected = [
        "Computing reference log-probs<",
        "Training: 4 steps.",
        "step 2/4  loss 0.5000  margin +0.2500",
        "saved checkpoint at step 2",
    ]
    places = [shown.index(text) for text in expected]
    assert places == sorted(places) and shown.count("Computing") == 1


def test_tiles_show_only_what_is_known():
    shown = views.tiles(training())
    assert "0.4700" in shown and "GPU memory" not in shown
    assert views.tiles(state()) == ""


def test_notes_escape_and_sizes_read_well():
    assert EVIL not in note(EVIL, "bad") and 'role="alert"' in note("x", "bad")
    assert views.size(10) and "MB" in views.size(12_300_000)


def test_names_between_backticks_are_code_and_nothing_else_is():
    assert prose("Set worker to `process`, not <b>`thread`</b>.") == (
        "Set worker to <code>process</code>, not &lt;b&gt;<code>thread</code>&lt;/b&gt;."
    )
    assert prose("`<script>`") == "<code>&lt;script&gt;</code>" and prose("one ` alone") == "one ` alone"
    for shown in (note("Set `r`."), data_view.problem("Set `r`."), str(context.error(KTOError("Set `r`.")))):
        assert "<code>r</code>" in shown
