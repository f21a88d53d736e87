"""Each rule on a log made for it, and on one that it must leave alone."""

from dataclasses import replace

import pytest

from kto_core.config import resolving
from kto_core.health.about import INFO, WARNING, About
from kto_core.health.rules import findings
from kto_core.health.watching import HealthWatch
from kto_core.runs.events import RunState, fold

ABOUT = About(rate=1e-4, good=50, bad=50)
TOTAL = 100


def log(steps: int = TOTAL, state: str = "training", error: str = "", start: int = 1, **series) -> RunState:
    """A run whose metrics are functions of the step; None leaves a metric out, NaN is null as in a log."""
    usual = {
        "loss": lambda s: 0.5 - 0.002 * s,
        "grad_norm": lambda s: 1.0 + 0.1 * (s % 3),
        "entropy": lambda s: 2.0,
        "kl": lambda s: 0.1,
        "rewards/chosen": lambda s: 0.01 * s,
        "rewards/rejected": lambda s: -0.02 * s,
    }
    held = {n: f for n, f in series.items() if n.startswith("eval_")}
    usual |= {n: f for n, f in series.items() if n not in held}
    events = [{"t": 1, "kind": "status", "state": "training", "total_steps": TOTAL}]
    for step in range(start, steps + 1):
        row = {n: v for n, f in usual.items() if (v := f(step)) is not None}
        row = {n: None if v != v else v for n, v in row.items()}
        events.append({"t": step, "kind": "metric", "step": step, **row})
        if held and step % 10 == 0:
            events.append({"t": step, "kind": "metric", "step": step, **{n: f(step) for n, f in held.items()}})
    if error:
        events.append({"t": steps, "kind": "error", "message": error})
    return fold([*events, {"t": steps, "kind": "status", "state": state}] if state != "training" else events)


def only(state: RunState, about: About = ABOUT):
    found = findings(state, about)
    assert len(found) == 1, found
    assert found[0].sentence.endswith(".") and found[0].change.endswith(".")
    assert found[0].to_dict()["kind"] == found[0].kind
    return found[0]


@pytest.mark.parametrize("steps", [1, 3, 10, 50, 100])
def test_a_run_that_learns_has_nothing_to_be_said(steps):
    assert findings(log(steps), ABOUT) == []


def test_an_empty_log_says_nothing():
    assert findings(RunState(), ABOUT) == []


# ---- how far ---------------------------------------------------------------------------------------------------------


def still(steps=TOTAL, nats=0.2):
    """Answers move evenly, to ``nats`` at the end."""
    moved = {"rewards/chosen": lambda s: 0.1 * nats * s / TOTAL, "rewards/rejected": lambda s: -0.1 * nats * s / TOTAL}
    return log(steps, loss=lambda s: 0.4999, **moved)


@pytest.mark.parametrize("steps", [10, 40, 100])
def test_little_movement_is_told_at_any_time(steps):
    constant = replace(ABOUT, schedule="constant", warmup=0.0)
    found = only(still(steps), constant)
    assert (found.kind, found.level) == ("little", WARNING) and "almost nothing" in found.sentence
    assert not findings(still(steps, nats=2.0), constant)


def test_before_ten_steps_nothing_is_said_of_movement():
    assert findings(still(9), ABOUT) == []


@pytest.mark.parametrize("by", ["auto", "rule"])
@pytest.mark.parametrize("state", [still(), log(**{"rewards/chosen": lambda s: -0.2 * s, "kl": lambda s: 0.0})])
def test_a_rate_that_the_program_took_is_not_the_users_fault_nor_the_datas(state, by):
    mine, its = only(state).change, only(state, replace(ABOUT, rate_by=by)).change
    assert "set it to auto" in mine and "1e-4" in mine
    assert "set it to auto" not in its and f"{by} took 1e-4" in its
    assert "data" not in (mine + its).lower()


def test_drift_is_told_and_what_hides_it():
    found = only(log(**{"rewards/chosen": lambda s: -0.1 * s, "kl": lambda s: 0.0}))
    assert found.kind == "large" and "KL shows 0" in found.sentence and "Lower learning_rate" in found.change
    assert "KL" not in only(log(**{"rewards/chosen": lambda s: -0.1 * s})).sentence
    assert only(log(**{"rewards/rejected": lambda s: -0.5 * s})).kind == "large", "however good answers fare"


def test_both_rewards_falling_is_a_word_first_and_a_warning_later():
    def both(chosen, rejected):
        return only(log(**{"rewards/chosen": lambda s: chosen, "rewards/rejected": lambda s: rejected}))

    assert (both(-1.5, -3.0).kind, both(-1.5, -3.0).level) == ("falling", INFO)
    assert both(-4.0, -5.0).level == WARNING
    assert both(-4.0, -12.0).level == INFO, "good ones fall, but far less than bad ones"


def test_a_loss_that_stays_is_the_rates_fault_before_it_is_the_datas():
    alike = {"rewards/chosen": lambda s: -0.5, "rewards/rejected": lambda s: -0.5, "loss": lambda s: 0.5}
    mine, its = only(log(**alike)), only(log(**alike), replace(ABOUT, rate_by="auto"))
    assert mine.kind == its.kind == "alike"
    assert "data" not in mine.text.lower() and "auto" in mine.change
    assert its.change.index("learning_rate") < its.change.index("Data tab")


# ---- held-out rows ---------------------------------------------------------------------------------------------------


def held(loss, chosen=0.5, rejected=-1.0):
    rewards = {"eval_rewards/chosen": lambda s: chosen, "eval_rewards/rejected": lambda s: rejected}
    return {"eval_loss": loss, **rewards}


def test_a_held_out_loss_that_turns_up_is_told_with_its_step():
    found = only(log(**held(lambda s: 0.3 + abs(s - 40) / 500)))
    assert found.kind == "overfitting" and "lowest at step 40" in found.sentence and "about 40" in found.change
    assert not findings(log(**held(lambda s: 0.5 - s / 500)), ABOUT)
    assert not findings(log(**held(lambda s: 0.3 + 0.003 * (s % 20 == 0))), ABOUT), "it wavers"


def test_a_held_out_loss_above_where_it_began_is_told():
    assert only(log(**held(lambda s: 0.6))).kind == "worse"
    heavy = replace(ABOUT, desirable_weight=1.5)
    assert heavy.rest == pytest.approx(0.625) and not findings(log(**held(lambda s: 0.6)), heavy)


# ---- gradients, entropy, labels, lengths -----------------------------------------------------------------------------


def test_gradients_that_jump_are_told():
    assert only(log(grad_norm=lambda s: 30.0 if s in (70, 80) else 1.0)).kind == "spikes"
    assert only(log(grad_norm=lambda s: 300.0 if s == 80 else 1.0)).kind == "spikes"
    assert not findings(log(grad_norm=lambda s: 30.0 if s == 80 else 1.0), ABOUT), "one is no pattern"
    assert not findings(log(grad_norm=lambda s: 300.0 if s == 20 else 1.0), ABOUT), "long ago"


def test_an_entropy_that_collapses_is_told():
    assert only(log(entropy=lambda s: 2.0 if s < 50 else 0.1)).kind == "entropy"
    assert not findings(log(entropy=lambda s: 2.0 - 0.012 * s), ABOUT)


def test_steps_of_one_label_are_told_with_a_size_that_helps():
    about = replace(ABOUT, good=5, bad=495)
    found = only(log(**{"rewards/chosen": lambda s: 0.1 if s % 4 == 0 else None}), about)
    assert found.kind == "labels" and "5 good ones among 500" in found.sentence and "at least 100 rows" in found.change
    assert not findings(log(**{"rewards/chosen": lambda s: 0.1 if s % 4 else None}), ABOUT)


def test_lengths_that_tell_the_labels_apart_are_told():
    lengths = {"desirable": 300, "undesirable": 20, "longer": 0.95}
    found = only(log(), replace(ABOUT, lengths=lengths))
    assert (found.kind, found.level) == ("lengths", INFO) and "95 %" in found.sentence
    for odd in ({"longer": "much"}, {"longer": None}, {"longer": 0.5}, {}):
        assert findings(log(), replace(ABOUT, lengths=odd)) == []


# ---- NaN -------------------------------------------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize("about", [ABOUT, replace(ABOUT, continues=True), replace(ABOUT, dtype="float16")])
def test_nan_before_any_change_is_not_the_rates_fault(about):
    for state in (log(3, loss=lambda s: NAN), log(0, state="failed", error="The loss was NaN at the first step.")):
        found = only(state, about)
        assert found.kind == "nan" and "not the learning rate" in found.sentence and "weights" in found.change
        assert ("adapter it continues from" in found.change) == about.continues


def test_nan_after_drift_is_the_rates_fault():
    far = {"rewards/chosen": lambda s: -0.3 * s, "loss": lambda s: NAN if s > 20 else 0.4}
    found = only(log(21, **far))
    assert "step 21" in found.sentence and "so it is the rate" in found.sentence and "learning_rate" in found.change
    found = only(log(21, grad_norm=lambda s: 9.0**s if s > 15 else 1.0, loss=lambda s: NAN if s > 20 else 0.4))
    assert "so it is the rate" in found.sentence


def test_nan_out_of_nothing_is_not_blamed_on_anybody():
    quiet = log(20, state="failed", error="The loss became NaN at step 21.")
    assert "does not tell" in only(quiet).sentence
    half = only(quiet, replace(ABOUT, dtype="float16"))
    assert "float16" in half.sentence and "bfloat16" in half.change


def test_a_gradient_that_is_nan_is_told_unless_a_scaler_skips_it():
    state = log(30, grad_norm=lambda s: NAN if s == 30 else 1.0)
    assert "The gradient became NaN at step 30" in only(state).sentence
    assert findings(state, replace(ABOUT, dtype="float16")) == []


# ---- beside a training -----------------------------------------------------------------------------------------------


def test_each_kind_is_said_once_and_at_the_end_too():
    events = [{"kind": "metric", "t": m["t"], **m} for m in still().metrics]
    watch = HealthWatch(replace(ABOUT, schedule="constant", warmup=0.0), RunState(total_steps=TOTAL))
    said = [f.kind for e in events for f in watch.look(e)] + [f.kind for f in watch.look(last=True)]
    assert said == ["little"]


def test_a_resumed_run_forgets_what_comes_again():
    state = log(60, **{"rewards/chosen": lambda s: -0.1 * s})
    watch = HealthWatch(ABOUT, state)
    assert not watch.look({"kind": "status", "t": 1, "state": "training", "resumed_from": 5}, last=True)
    assert state.step == 5


def test_what_is_known_of_a_run_survives_a_file_that_somebody_wrote():
    config = resolving.resolve("demo", {"learning_rate": "auto"}).config
    for data in ({}, {"train": 3, "report": []}, {"train": {"desirable": "x"}, "report": {"answers": 1}}):
        about = About.of(config, data, 2e-4)
        assert (about.rate, about.rate_by, about.good, about.lengths) == (2e-4, "auto", 0, {})


@pytest.mark.parametrize(
    ("schedule", "half"), [("cosine", 0.78), ("linear", 0.72), ("constant", 0.5), ("constant_with_warmup", 0.47)]
)
def test_the_share_of_the_movement_rises_from_nothing_to_all(schedule, half):
    about = replace(ABOUT, schedule=schedule)
    shares = [about.done(s, 5000) for s in range(0, 5001, 500)]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    assert about.done(2500, 5000) == pytest.approx(half, abs=0.01)
