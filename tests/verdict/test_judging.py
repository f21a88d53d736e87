"""The judgement, from numbers of recorded runs (docs/learning.md) and at each of its limits."""

import dataclasses
import math

import pytest

from kto_core.verdict import judging
from kto_core.verdict.judging import BETTER, DRIFTED, SAME, WORSE, Measured, judge


def measured(**changes) -> Measured:
    """A good run: smollm2 on the example at 1e-4."""
    usual = Measured(
        questions=(20, 20), moved=9.65, moved_per_token=0.38, margin=19.3, margin_sure=(18.0, 20.6), chosen=4.8,
        chosen_interval=(4.0, 5.6), chosen_per_token=0.19, perplexity=(20.0, 20.4), beta=0.1,
    )  # fmt: skip
    return dataclasses.replace(usual, **changes)


RECORDED = [  # rewards in nats: those of the table / 0.1
    ("5e-7, example", SAME, {"moved": 0.122, "margin": 0.02, "margin_sure": (-0.1, 0.15), "chosen": 0.0}),
    ("5e-7, certain and nothing", SAME, {"moved": 0.15, "margin": 0.038, "margin_sure": (0.02, 0.056), "chosen": -0.1}),
    ("5e-7, sharegpt", SAME, {"moved": 0.719, "moved_per_token": 0.0023, "margin": 0.0, "margin_sure": (-0.6, 0.6),
                              "chosen": -0.1}),
    ("1e-4, example", BETTER, {}),
    ("5e-5, gemma3 on sharegpt", SAME, {"moved": 25.5, "moved_per_token": 0.082, "margin": 9.8, "chosen": -19.7,
                                        "margin_sure": (-5.0, 24.6), "chosen_per_token": -0.06}),
    ("3e-4, gemma3 on truthfulqa", BETTER, {"moved": 37.7, "moved_per_token": 3.7, "margin": 31.45, "chosen": -11.0,
                                            "margin_sure": (21.0, 42.0), "chosen_per_token": -1.1}),
    ("1e-4, gemma3 on nexus", BETTER, {"moved": 175, "moved_per_token": 1.0, "margin": 221, "margin_sure": (195, 247),
                                       "chosen": -7.4, "chosen_per_token": -0.05}),
    ("1e-2, example", DRIFTED, {"moved": 292, "moved_per_token": 12, "margin": 491.8, "margin_sure": (457, 526),
                                "chosen": -46.5, "chosen_per_token": -1.9}),
    ("1e-2, truthfulqa", DRIFTED, {"moved": 510, "moved_per_token": 49, "margin": -13.4, "margin_sure": (-64, 37),
                                   "chosen": -517.6, "chosen_per_token": -50}),
    ("5e-4, sharegpt", DRIFTED, {"moved": 67.3, "moved_per_token": 0.21, "margin": 19.65, "margin_sure": (-9, 49),
                                 "chosen": -57.3, "chosen_per_token": -0.18}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "word", "numbers"), RECORDED, ids=[r[0] for r in RECORDED])
def test_recorded_runs(name, word, numbers):
    assert judge(measured(**numbers)).word == word


def test_worse_is_said_as_plainly():
    verdict = judge(measured(margin=-3.0, margin_sure=(-4.0, -2.0)))
    assert verdict.word == WORSE and verdict.sentence.startswith("Worse: the reward margin is -0.3 and not chance")


@pytest.mark.parametrize(
    ("changes", "below", "above"),
    [
        ({"moved": (0.99, 1.0)}, SAME, BETTER),
        ({"margin_sure": ((0.0, 9.0), (0.01, 9.0))}, SAME, BETTER),
        ({"margin": (0.49, 0.5), "margin_sure": ((0.1, 0.8), (0.1, 0.9))}, SAME, BETTER),
        ({"questions": ((4, 20), (5, 20))}, SAME, BETTER),
        ({"questions": ((20, 4), (20, 5))}, SAME, BETTER),
        ({"chosen": (-30.0, -30.1), "chosen_per_token": (-1, -1)}, BETTER, DRIFTED),
        ({"chosen": (-99.0, -99.0), "chosen_per_token": (-0.1, -0.11)}, BETTER, DRIFTED),
        ({"moved_per_token": (6.0, 6.1)}, BETTER, DRIFTED),
        ({"perplexity": ((20.0, 30.0), (20.0, 30.1))}, BETTER, DRIFTED),
    ],
)
def test_each_limit_decides(changes, below, above):
    assert judge(measured(**{k: v[0] for k, v in changes.items()})).word == below
    assert judge(measured(**{k: v[1] for k, v in changes.items()})).word == above


def test_without_an_interval_nothing_is_better():
    verdict = judge(measured(margin_sure=None, questions=(1, 20)))
    assert verdict.word == SAME and "too few to tell" in verdict.sentence


@pytest.mark.parametrize("name", ["moved", "margin", "chosen", "moved_per_token", "chosen_per_token"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_drift(name, value):
    assert judge(measured(**{name: value})).word == DRIFTED


def test_reasons_say_what_a_reader_must_know():
    said = judge(measured(chosen=-5.0, chosen_interval=(-6.0, -4.0), perplexity=(20.0, 24.0))).sentence
    assert "good answers became less likely, too, by 5 nats" in said
    assert "perplexity on neutral text rose by 20 %" in said
    assert "likelier by 4.8 nats" in judge(measured()).sentence and "perplexity" not in judge(measured()).sentence
    assert "as likely as before" in judge(measured(chosen=0.1, chosen_interval=(-1.0, 1.2))).sentence
    assert "at a lower learning rate" in judge(measured(moved_per_token=12.0)).sentence


def test_every_word_is_one_of_the_four():
    assert {word for _, word, _ in RECORDED} | {WORSE} == set(judging.WORDS)
