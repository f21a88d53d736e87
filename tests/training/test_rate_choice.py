"""Which learning rate is tried, and which one is taken: pure choices, against what was measured."""

import gzip
import json
from collections import defaultdict
from pathlib import Path

import pytest

from kto_core.planning import rate as rules
from kto_core.runs.rates import Trial
from kto_core.training.rate import choosing

ROOT = Path(__file__).resolve().parents[2]


def sweep():
    """setting -> (rate -> mean loss after the whole training, rate -> Trial of ten steps), as measured."""
    whole, short = defaultdict(lambda: defaultdict(list)), defaultdict(list)
    with gzip.open(ROOT / "benchmarks" / "learning_results.jsonl.gz", "rt") as lines:
        for r in map(json.loads, lines):
            if r["change"] == "base" and r["rate"] < 5e-3:
                whole[r["setting"]][r["rate"]].append(r["loss"] if r["loss"] is not None else 1.0)
            elif r["change"] == "probe" and r["rate"] < 5e-3:
                e = next(e for e in r["early"] if e["step"] == 10)
                short[r["setting"]].append(Trial(r["rate"], e["loss"], (), e["margin"], e["chosen"], e["rejected"]))
    return {s: ({k: sum(v) / len(v) for k, v in w.items()}, short[s]) for s, w in whole.items()}


def test_the_choice_reaches_most_of_the_gain_that_was_measured():
    gained = {}
    for setting, (whole, trials) in sweep().items():
        rate, by, _ = choosing.choose(sorted(trials, key=lambda t: t.rate), 0.5, 1e-4)
        assert by == "trials"
        gained[setting] = (0.5 - whole[rate]) / (0.5 - min(whole.values()))
    assert len(gained) == 7
    assert sum(gained.values()) / 7 > 0.93 and min(gained.values()) > 0.85, gained


def test_trials_of_few_steps_find_too_high_a_rate():
    assert choosing.for_run(1e-4, 10) == (1e-4, "")
    rate, why = choosing.for_run(1e-4, 3)
    assert rate == pytest.approx(5.48e-5, rel=0.01) and "0.55 of 1e-4" in why


def trial(rate, loss, chosen=0.1):
    return Trial(rate, loss, chosen=chosen, losses=(loss, loss) if loss is not None else ())


RATES = rules.around(1e-4)


@pytest.mark.parametrize(
    ("losses", "taken"),
    [
        ([0.48, 0.44, 0.40, 0.35, 0.40], 3),  # the lowest
        ([0.48, 0.44, 0.352, 0.35, 0.40], 2),  # as good, and lower
        ([0.48, 0.44, 0.40, None, None], 2),
        ([0.2, 0.3, 0.4, 0.45, 0.5], 0),
    ],
)
def test_the_lowest_of_the_best_rates_is_taken(losses, taken):
    rate, by, reason = choosing.choose([trial(r, v) for r, v in zip(RATES, losses, strict=True)], 0.5, 1e-4)
    assert (rate, by) == (RATES[taken], "trials") and reason.endswith(".")


def test_a_rate_at_which_good_answers_fall_far_is_not_taken():
    trials = [trial(r, 0.45 - 0.05 * i, chosen=-0.1 if i < 2 else -9.0) for i, r in enumerate(RATES)]
    assert choosing.choose(trials, 0.5, 1e-4)[0] == RATES[1]
    drifting = [trial(r, 0.3, chosen=-20.0) for r in RATES]
    rate, _, reason = choosing.choose(drifting, 0.5, 1e-4)
    assert rate < RATES[0] and "below all" in reason


def test_rows_that_cannot_tell_rates_apart_leave_it_to_the_rule():
    noisy = [Trial(r, 0.49, losses=(0.40, 0.58)) for r in RATES]
    rate, by, reason = choosing.choose(noisy, 0.5, 1e-4)
    assert (rate, by) == (1e-4, "rule") and "by more than chance" in reason


def tried(loss_of) -> list[float]:
    """The rates that are tried, in order, where ``loss_of(place)`` is what each gives."""
    made: list[Trial] = []
    while (rate := choosing.next_rate(sorted(made, key=lambda t: t.rate), RATES, 0.5)) is not None:
        assert rate not in [t.rate for t in made]
        made.append(trial(rate, loss_of(RATES.index(rate))))
    return [RATES.index(t.rate) for t in made]


def test_no_rate_is_tried_that_cannot_be_the_best():
    assert tried(lambda i: 0.45 - 0.03 * i) == [2, 3, 4]  # ever better upwards
    assert tried(lambda i: 0.30 + 0.03 * i) == [2, 3, 1, 0]
    assert tried(lambda i: 0.4 + 0.05 * abs(i - 2)) == [2, 3, 1]
    assert tried(lambda i: None if i > 0 else 0.4) == [2, 1, 0]  # broken: only lower ones can help


def test_the_trials_are_as_long_as_the_time_allows(monkeypatch):
    monkeypatch.undo()
    fast, allowed = choosing.size(0.5, 4, 1000, 10, gpu=True)
    assert (fast.rates, fast.steps) == (5, 10) and allowed == 120
    slow, _ = choosing.size(2.0, 4, 38, 10, gpu=False)
    assert slow.rates >= 3 and slow.steps < 10 and slow.seconds <= 40
    assert choosing.size(30.0, 4, 38, 10, gpu=False)[0] is None
    long, allowed = choosing.size(30.0, 4, 10_000, 10, gpu=False)
    assert (long.rates, long.steps) == (5, 10) and allowed == 30_000
    assert [choosing.nearest(RATES, n) for n in (5, 4, 3)] == [RATES, RATES[:4], RATES[1:4]]
