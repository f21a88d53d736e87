"""`learning_rate: auto`: which rate is tried and taken, that trying leaves no trace, stop, kill, too few rows."""

import json
import math
from pathlib import Path

import pytest

from kto_core.errors import NotFinite
from kto_core.planning import rate as rules
from kto_core.runs import rates
from kto_core.runs.rates import Found, Trial
from kto_core.training.rate import choosing
from tests.support.trained import run, weights
from tests.support.training import events, make_data, metrics, resolved

ROOT = Path(__file__).resolve().parents[2]
AUTO = {"learning_rate": "auto", "engine": "packed"}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("many") / "rows.jsonl", 48)


@pytest.fixture(autouse=True)
def short_trials(monkeypatch):
    """Trials that are the same however busy the machine is."""
    monkeypatch.setattr(choosing, "SIZES", ((3, 3),))
    monkeypatch.setitem(choosing.FLOOR, False, 1e6)


def found_in(folder) -> Found:
    found = rates.read(folder)
    assert found is not None
    return found


# ---- trying leaves no trace ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"engine": "trl"},
        {"engine": "packed", "load_in_4bit": True, "test_size": 0.4},
        {"engine": "trl", "precompute_ref_log_probs": True, "test_size": 0.4, "lora_dropout": 0.1},
        {"engine": "packed", "dtype": "bfloat16", "loss_type": "apo_zero_unpaired"},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_the_run_after_the_trials_is_the_run_without_them(tiny, many, tmp_path, settings):
    ended = run(tiny, many, tmp_path / "auto", **{**AUTO, **settings}, max_steps=4)
    assert ended.state == "finished", ended.error
    found = found_in(tmp_path / "auto")
    assert found.by == "trials" or "chance" in found.reason
    assert len(found.trials) >= 2 and found.steps == 3 and found.rate is not None
    assert ended.used["learning_rate"] == found.rate
    same = run(tiny, many, tmp_path / "set", **settings, learning_rate=found.rate, max_steps=4)
    assert same.state == "finished", same.error
    assert metrics(tmp_path / "auto") == metrics(tmp_path / "set")
    a, b = weights(tmp_path / "auto" / "adapter"), weights(tmp_path / "set" / "adapter")
    assert all(tensor.equal(b[name]) for name, tensor in a.items())


def test_the_log_tells_it_in_plain_words(tiny, many, tmp_path):
    ended = run(tiny, many, tmp_path, **AUTO, max_steps=3)
    told = [e["text"] for e in ended.logs]
    assert any(t.startswith("Finding the rate: at most 3 rates from ") for t in told), told
    assert any(t.startswith("Learning rate ") and "took" in t for t in told), told
    said = [e.get("message", "") for e in events(tmp_path) if e["kind"] == "status"]
    assert any(text.startswith("Finding the rate: ") for text in said), said
    assert [m["step"] for m in ended.metrics if "loss" in m] == [1, 2, 3]  # none of the trials is among them


# ---- stop, kill, resume ----------------------------------------------------------------------------------------------


def test_a_run_that_ended_among_the_trials_goes_on_with_what_it_has(tiny, many, tmp_path, monkeypatch):
    from kto_core.training.rate.trials import Trials

    whole = run(tiny, many, tmp_path / "whole", **AUTO, max_steps=4)
    assert whole.state == "finished", whole.error
    judged, made = Trials.judged, []

    def dying(self):
        if len(made) == 1:
            raise RuntimeError("killed")
        made.append(self.rate)
        return judged(self)

    monkeypatch.setattr(Trials, "judged", dying)
    assert run(tiny, many, tmp_path / "torn", **AUTO, max_steps=4).state == "failed"
    half = found_in(tmp_path / "torn")
    assert half.rate is None and len(half.trials) == 1
    made.clear()
    monkeypatch.setattr(Trials, "judged", lambda self: (made.append(self.rate), judged(self))[1])
    again = run(tiny, many, tmp_path / "torn", **AUTO, max_steps=4)
    assert again.state == "finished", again.error
    assert not {t.rate for t in half.trials} & set(made)  # not tried again
    assert found_in(tmp_path / "torn").rate == found_in(tmp_path / "whole").rate
    assert metrics(tmp_path / "torn") == metrics(tmp_path / "whole")


def test_a_stop_is_answered_among_the_trials(tiny, many, tmp_path, monkeypatch):
    from kto_core.training.rate.trials import Trials

    step = Trials.step

    def stopping(self, number):
        (tmp_path / "stop").write_text("")
        return step(self, number)

    monkeypatch.setattr(Trials, "step", stopping)
    ended = run(tiny, many, tmp_path, **AUTO, max_steps=4)
    assert (ended.state, ended.message) == ("stopped", "Stopped before the first step.")
    monkeypatch.setattr(Trials, "step", step)
    assert run(tiny, many, tmp_path, **AUTO, max_steps=4).state == "finished"


def test_a_resumed_run_keeps_its_rate(tiny, many, tmp_path, monkeypatch):
    from kto_core.training.rate.trials import Trials

    assert run(tiny, many, tmp_path, **AUTO, max_steps=4, save_steps=2).state == "finished"
    rate = found_in(tmp_path).rate
    monkeypatch.setattr(Trials, "begin", lambda *a: pytest.fail("tried again"))
    for lost in (False, True):  # the file may be gone, too: the events have the rate
        if lost:
            (tmp_path / rates.FILE).unlink()
        ended = run(tiny, many, tmp_path, **AUTO, max_steps=4, save_steps=2)
        assert ended.state == "finished" and ended.used["learning_rate"] == rate, ended.error


# ---- where nothing is tried ------------------------------------------------------------------------------------------


def test_too_few_rows_leave_it_to_the_rule_and_the_log_says_so(tiny, data, tmp_path):
    ended = run(tiny, data, tmp_path, **AUTO, max_steps=3)
    assert ended.state == "finished", ended.error
    found, rule = found_in(tmp_path), rules.by_rule(resolved(tiny, data, **AUTO).config, 3)
    assert (found.rate, found.by, found.trials) == (rule, "rule", ())
    assert any("by the rule" in e["text"] and "too few rows" in e["text"] for e in ended.logs)


def test_the_rule_can_be_asked_for(tiny, many, tmp_path):
    ended = run(tiny, many, tmp_path, learning_rate="rule", max_steps=3)
    assert ended.state == "finished", ended.error
    found = found_in(tmp_path)
    assert (found.by, found.trials) == ("rule", ()) and ended.used["learning_rate"] == found.rate == found.rule


def test_trials_that_would_take_too_long_are_left_out(tiny, many, tmp_path, monkeypatch):
    monkeypatch.setitem(choosing.FLOOR, False, 0.0)
    monkeypatch.setattr(choosing, "SHARE", 0.0)
    ended = run(tiny, many, tmp_path, **AUTO, max_steps=3)
    assert ended.state == "finished", ended.error
    assert found_in(tmp_path).by == "rule" and any("would take longer" in e["text"] for e in ended.logs)


def test_no_trial_is_begun_when_they_take_far_longer_than_expected(tiny, many, tmp_path, monkeypatch):
    from kto_core.training.rate import finding

    monkeypatch.setattr(finding, "LATE", 0.0)
    ended = run(tiny, many, tmp_path, **AUTO, max_steps=3)
    assert ended.state == "finished", ended.error
    assert len(found_in(tmp_path).trials) == 1 and any("no more rates" in e["text"] for e in ended.logs)


def test_a_rate_that_breaks_the_model_does_not_break_the_run(tiny, many, tmp_path, monkeypatch):
    from kto_core.training import trainer as trainers

    true = trainers._Studio.training_step

    def step(self, *args, **kwargs):
        if self.args.learning_rate > found_rule * 2:
            raise NotFinite("The loss became NaN")
        return true(self, *args, **kwargs)

    found_rule = rules.by_rule(resolved(tiny, many, **AUTO).config, 4)
    monkeypatch.setattr(trainers._Studio, "training_step", step)
    ended = run(tiny, many, tmp_path, **AUTO, max_steps=4)
    assert ended.state == "finished", ended.error
    found = found_in(tmp_path)
    assert [t.loss for t in found.trials if t.rate > found.rule] == [None] and found.rate <= found.rule


# ---- the file, the schedule, the gauge -------------------------------------------------------------------------------


def test_a_file_of_another_form_is_no_result(tmp_path):
    whole = Found(
        rate=1e-4,
        by="trials",
        reason="Because.",
        rule=1e-4,
        trials=(Trial(1e-4, 0.4, losses=(0.4, 0.4)), Trial(1e-3, None)),
    )
    rates.write(tmp_path, whole)
    assert rates.read(tmp_path) == whole
    good = json.loads((tmp_path / rates.FILE).read_text())
    wrong = [
        {**good, "rate": -1},
        {**good, "rate": "fast"},
        {**good, "trials": 7},
        {**good, "trials": [[]]},
        {**good, "rest": math.nan},
        {k: v for k, v in good.items() if k != "key"},
        [],
        {**good, "steps": True},
    ]
    for text in [*map(json.dumps, wrong), "{", "[" * 100_000, "\x00", "x" * (5 << 20)]:
        (tmp_path / rates.FILE).write_text(text)
        assert rates.read(tmp_path) is None, text[:100]
    (tmp_path / rates.FILE).unlink()
    assert rates.read(tmp_path) is None


@pytest.mark.parametrize("engine", ["packed", "trl"])
def test_no_step_is_spent_at_rate_0(tiny, many, tmp_path, engine):
    run(tiny, many, tmp_path, engine=engine, learning_rate=1e-3, warmup_ratio=0.25, max_steps=8)
    seen = [m["learning_rate"] for m in metrics(tmp_path) if "loss" in m]
    assert seen[0] == pytest.approx(1e-3 / 3) and seen[1] == pytest.approx(2e-3 / 3)
    assert max(seen) == seen[2] == pytest.approx(1e-3) and all(rate > 0 for rate in seen)


def test_a_constant_schedule_stays_as_it_is(tiny, many, tmp_path):
    run(tiny, many, tmp_path, learning_rate=1e-3, warmup_ratio=0.5, lr_scheduler_type="constant", max_steps=2)
    assert [m["learning_rate"] for m in metrics(tmp_path)] == [1e-3, 1e-3]


def config(**overrides):
    return resolved("demo", "", r=64, lora_alpha=128, **overrides).config


def test_the_rule_follows_steps_alpha_and_size(monkeypatch):
    assert 3e-5 < rules.by_rule(config(), 63) < 1e-4
    assert rules.by_rule(config(), 1000) < rules.by_rule(config(), 63) / 3
    assert rules.by_rule(config().model_copy(update={"lora_alpha": 32}), 63) > 3 * rules.by_rule(config(), 63)
    large = config().model_copy(update={"model": "unsloth/mistral-7b-instruct-v0.3-bnb-4bit"})
    assert 1e-5 <= rules.by_rule(large, 143) <= 2e-5


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (5e-7, "At 5e-7 and 143 steps this run will change almost nothing; auto would take about "),
        (1e-2, "probably drift"),
        ("auto", "auto tries learning rates from "),
        ("rule", "The rule takes a learning rate of "),
    ],
)
def test_the_gauge_tells_what_a_run_will_do(rate, words):
    for model in ("demo", "unsloth/mistral-7b-instruct-v0.3-bnb-4bit"):
        settings = config(learning_rate=rate).model_copy(update={"model": model})
        assert words in rules.gauge(settings, 143)
    assert rules.gauge(config(learning_rate=5e-5), 143) == ""


# ---- the first steps -------------------------------------------------------------------------------------------------


def told(logs: list[dict], total: int = 100) -> list[tuple[str, str]]:
    from kto_core.training.callbacks import Movement

    movement = Movement(beta=0.1)
    return [said for step, log in enumerate(logs, 1) for said in movement.look(step, total, log, lambda i: 1.0)]


def test_the_first_steps_foretell_how_far_answers_will_move():
    def rewards(nats: float) -> dict:
        return {"rewards/chosen": 0.1 * nats, "rewards/rejected": -0.1 * nats}

    ((text, level),) = told([rewards(v) for v in (0.0, 0.1, 0.2, 0.3)])
    assert text.startswith("After 3 steps an answer has moved by 0.2 nats. After 100 it will be about 10")
    assert level == "info"
    ((text, level),) = told([rewards(v) for v in (0.0, 0.001, 0.002)])
    assert "almost nothing" in text and level == "warning"
    ((text, _),) = told([rewards(v) for v in (0.1, 0.1, 0.1)])  # as far apart as before the first change
    assert "rounding" in text


@pytest.mark.parametrize(("rate", "words"), [(1e-9, "almost nothing"), (1e-2, "has moved by")])
def test_a_run_tells_it_after_three_steps(tiny, many, tmp_path, rate, words):
    ended = run(tiny, many, tmp_path, learning_rate=rate, max_steps=4)
    said = [e["text"] for e in ended.logs if e["text"].startswith("After 3 steps")]
    assert len(said) == 1 and words in said[0]


# ---- another card ----------------------------------------------------------------------------------------------------


def test_a_dry_run_plans_for_a_card_that_is_not_here(tiny, many):
    from kto_core.cli.train import describe
    from kto_core.planning.dry_run import dry_run

    settings = resolved(tiny, many, learning_rate=5e-7)
    found = dry_run(settings.config, for_gpu=24)
    assert found["memory"]["available_gib"] == 24 and found["memory"]["verdict"] == "fits" and not found["problem"]
    assert found["engine"]["name"] == "trl" and found["rate"]["rule"] > 5e-7
    text = describe(found, settings.origins)
    assert "on a GPU of 24 GiB" in text and "Engine  trl" in text and "change almost nothing" in text
    json.dumps(found)
