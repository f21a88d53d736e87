"""Intervals over questions: against tables, and right as often as they claim to be on simulated rewards."""

import numpy as np
import pytest

from kto_core.verdict import intervals, judging


@pytest.mark.parametrize(
    ("p", "df", "value"),
    [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 5, 2.571), (0.995, 9, 3.250), (0.995, 30, 2.750), 
     (0.975, 120, 1.980), (0.975, 10**6, 1.960)],
)  # fmt: skip
def test_t_quantiles_are_those_of_the_tables(p, df, value):
    assert intervals.t_quantile(p, df) == pytest.approx(value, abs=1e-3)


def test_one_row_a_question_is_the_ordinary_t_interval():
    x = np.random.default_rng(0).normal(2, 3, 20)
    half = 2.0930 * x.std(ddof=1) / 20**0.5
    assert intervals.of_mean(x, range(20)) == pytest.approx((x.mean() - half, x.mean() + half), rel=1e-4)


def test_repeated_rows_make_no_question_more_certain():
    """Ten copies of each row are ten times the rows and no more evidence."""
    x, labels = np.random.default_rng(1).normal(0, 1, 30), [True, False] * 15
    once = intervals.of_difference(x, range(30), labels)
    copies = intervals.of_difference(np.repeat(x, 10), np.repeat(np.arange(30), 10), np.repeat(labels, 10))
    assert copies == pytest.approx(once)


def test_what_cannot_be_known_is_none():
    assert intervals.of_mean([1.0, 2.0], ["q", "q"]) is None
    assert intervals.of_difference([1.0, 2.0, 3.0], "abb", [True, True, False]) is None
    assert intervals.of_mean([1.0, float("nan"), 2.0], "abc") is None
    assert intervals.of_mean([], []) is None


def simulated(rng, *, questions=24, effect=0.0, paired=True, skewed=False):
    """Rewards in nats of questions with one to four rows that share a part, as the rows of one question do."""
    rows, asked, labels = [], [], []
    for q in range(questions):
        shared = rng.exponential(4) - 4 if skewed else rng.normal(0, 4)
        own_label = bool(q % 2)
        for _ in range(rng.integers(1, 5)):
            label = bool(rng.integers(2)) if paired else own_label
            rows.append(shared + rng.normal(0, 3) + effect * label)
            asked.append(q)
            labels.append(label)
    return np.array(rows), asked, labels


@pytest.mark.parametrize("paired", [True, False], ids=["both labels in a question", "one label in a question"])
@pytest.mark.parametrize("skewed", [True, False], ids=["skewed", "normal"])
def test_a_95_percent_interval_has_the_truth_in_95_of_100(paired, skewed):
    rng, hits, n = np.random.default_rng(2), 0, 600
    for _ in range(n):
        low, high = intervals.of_difference(*simulated(rng, effect=1.5, paired=paired, skewed=skewed))
        hits += low <= 1.5 <= high
    assert 0.92 <= hits / n <= 0.99


def test_an_interval_over_rows_would_lie():
    """Why it is over questions: with one label in a question, rows by themselves are right far too seldom."""
    rng, hits, n = np.random.default_rng(3), 0, 300
    for _ in range(n):
        x, _, labels = simulated(rng, paired=False)
        low, high = intervals.of_difference(x, range(len(x)), labels)
        hits += low <= 0 <= high
    assert hits / n < 0.9


def test_shuffled_labels_are_hardly_ever_better_or_worse():
    """The whole judgement on rewards that have nothing to do with their labels, in 1,000 worlds."""
    rng, n, words = np.random.default_rng(4), 1000, []
    for i in range(n):
        x, asked, labels = simulated(rng, questions=12 + i % 40, paired=bool(i % 2), skewed=bool(i // 2 % 2))
        words.append(judging.judge(measured_of(x, asked, labels)).word)
    assert words.count(judging.BETTER) <= 0.01 * n and words.count(judging.WORSE) <= 0.01 * n
    assert set(words) <= {judging.BETTER, judging.WORSE, judging.SAME}


def test_a_real_effect_is_found():
    rng = np.random.default_rng(5)
    words = [judging.judge(measured_of(*simulated(rng, questions=60, effect=6))).word for _ in range(50)]
    assert words.count(judging.BETTER) >= 48


def measured_of(x, asked, labels) -> judging.Measured:
    good = np.array(labels)
    return judging.Measured(
        questions=tuple(len({q for q, g in zip(asked, good, strict=True) if g == side}) for side in (True, False)),
        moved=float(np.abs(x).mean()),
        moved_per_token=float(np.abs(x).mean() / 100),
        margin=float(x[good].mean() - x[~good].mean()),
        margin_sure=intervals.of_difference(x, asked, labels, judging.SURE),
        chosen=float(x[good].mean()),
        chosen_interval=None,
        chosen_per_token=float(x[good].mean() / 100),
        perplexity=(20.0, 20.0),
        beta=0.1,
    )
