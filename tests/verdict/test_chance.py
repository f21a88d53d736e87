"""Chance is never called better: worlds of rows whose gains have nothing to do with their labels."""

import numpy as np
import pytest

from kto_core.chat.measuring import summary
from kto_core.verdict.judging import BETTER, DRIFTED, SAME, WORSE, judge

WORLDS = {  # (questions, rows of each, share of good rows, nats that all rows of a question share, tails)
    "few": (12, 1, 0.5, 0.0, 50),
    "many": (300, 1, 0.5, 0.0, 50),
    "pairs": (40, 2, 0.5, 3.0, 50),
    "crowds": (14, 12, 0.4, 6.0, 50),  # an interval over rows would be far too narrow
    "few bad": (60, 1, 0.85, 0.0, 50),
    "heavy tails": (50, 2, 0.5, 2.0, 3),
}


def world(name: str, seed: int, gain: float = 0.0):
    """A run that moved by several nats; good rows by ``gain`` more than bad ones."""
    questions, each, share, common, tails = WORLDS[name]
    rng = np.random.default_rng([seed, len(name)])
    asked = np.repeat(np.arange(questions), each)
    labels = rng.random(len(asked)) < share
    labels[:2] = True, False
    nats = rng.normal(-1, 1) + common * rng.normal(size=questions)[asked] + 4 * rng.standard_t(tails, len(asked))
    return judge(summary(nats + gain * labels, labels.tolist(), asked.tolist(), np.full(len(asked), 40), (20, 20), 0.1))


@pytest.mark.parametrize("name", WORLDS)
def test_shuffled_labels_get_no_better_in_20_of_20_seeds(name):
    assert [world(name, seed).word for seed in range(20)].count(BETTER) == 0


def test_of_a_thousand_runs_on_shuffled_labels_hardly_one_in_a_hundred_is_better_or_worse():
    words = [world(name, seed).word for name in WORLDS for seed in range(1000, 1170)]
    assert len(words) > 1000 and words.count(SAME) + words.count(BETTER) + words.count(WORSE) == len(words)
    assert words.count(BETTER) <= 0.01 * len(words) and words.count(WORSE) <= 0.01 * len(words)


@pytest.mark.parametrize("name", ["many", "pairs"])
def test_what_was_learned_is_seen(name):
    """The interval is not so wide that nothing is ever better."""
    words = [world(name, seed, gain=6.0).word for seed in range(20)]
    assert words.count(BETTER) >= 18 and DRIFTED not in words
