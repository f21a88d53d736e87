"""The statistics of votes: the interval, the word, and that looking after every vote gives no false "better"."""

import math
import random

import pytest

from kto_core.vote import counting
from kto_core.vote.counting import Counts

LIMIT = math.log(20)


def looked_at(rate: float, votes: int, rng: random.Random, ties: float = 0.0) -> str:
    """The first word but "no difference yet" that somebody sees who looks after every vote."""
    wins = losses = tied = 0
    for _ in range(votes):
        if rng.random() < ties:
            tied += 1
        elif rng.random() < rate:
            wins += 1
        else:
            losses += 1
        if counting.evidence(wins, losses) >= LIMIT:  # quicker than the whole result, and the same
            word = counting.result(Counts(wins, losses, tied)).word
            assert word != "no difference yet"
            return word
    assert counting.result(Counts(wins, losses, tied)).word == "no difference yet"
    return "no difference yet"


@pytest.mark.parametrize("ties", [0.0, 0.4])
def test_without_a_difference_looking_after_every_vote_says_better_in_at_most_5_percent(ties):
    rng = random.Random(20)
    words = [looked_at(0.5, 400, rng, ties) for _ in range(1000)]
    assert words.count("better") / 1000 <= 0.05 and words.count("worse") / 1000 <= 0.05
    assert (words.count("better") + words.count("worse")) / 1000 <= 0.05  # the two together, by Ville's inequality
    assert words.count("better") > 0, "a rule that never says better would pass as well"


def test_an_ordinary_interval_would_fail_the_same_test():
    """Why the rule is not Wilson's interval: looked at after every vote it is wrong far more often."""
    rng, wrong = random.Random(20), 0
    for _ in range(300):
        wins = 0
        for n in range(1, 401):
            wins += rng.random() < 0.5
            centre = (wins + 1.92) / (n + 3.84)
            half = 1.96 * math.sqrt(wins * (n - wins) / n + 0.96) / (n + 3.84)
            if n >= 5 and centre - half > 0.5:
                wrong += 1
                break
    assert wrong / 300 > 0.1


def test_a_clear_difference_is_found():
    rng = random.Random(3)
    assert [looked_at(0.8, 100, rng) for _ in range(100)].count("better") >= 97
    assert [looked_at(0.2, 100, rng) for _ in range(100)].count("worse") >= 97


def test_the_interval_has_the_true_rate_after_every_vote():
    rng, missed = random.Random(8), 0
    for _ in range(300):
        wins, hit = 0, True
        for n in range(1, 201):
            wins += rng.random() < 0.7
            hit = hit and counting.evidence(wins, n - wins, 0.7) < LIMIT
        missed += not hit
    assert missed / 300 <= 0.05


def test_the_edges_of_the_interval_are_where_a_rate_is_refused():
    for wins, losses in ((0, 1), (3, 0), (14, 7), (200, 10), (50, 50)):
        low, high = counting.interval(wins, losses)
        assert 0 <= low <= wins / (wins + losses) <= high <= 1
        for edge, beyond in ((low, low - 1e-6), (high, high + 1e-6)):
            if 0 < edge < 1:
                assert (
                    counting.evidence(wins, losses, edge)
                    < LIMIT + 1e-6
                    <= counting.evidence(wins, losses, beyond) + 2e-6
                )
        assert counting.interval(losses, wins) == pytest.approx((1 - high, 1 - low))
    assert counting.interval(0, 0) == (0.0, 1.0)


def test_votes_more_is_the_first_number_that_settles_it():
    for wins, losses in ((3, 1), (14, 7), (60, 40), (1, 5)):
        k = counting.more(wins, losses)
        n = wins + losses
        settled = [counting.evidence(wins * m / n, losses * m / n) >= LIMIT for m in (n + k - 1, n + k)]
        assert k > 0 and settled == [False, True]
    assert counting.more(8, 0) == 0 and counting.more(7, 0) == 1
    assert counting.more(5, 5) is None and counting.more(0, 0) is None
    assert counting.more(501, 500) is None, "more than anybody votes"


def test_ties_count_half_in_the_rate_and_nothing_in_the_interval():
    plain, tied = counting.result(Counts(14, 7)), counting.result(Counts(14, 7, ties=6, bad=2, identical=3))
    assert tied.interval == plain.interval and tied.word == plain.word and tied.decided == plain.decided
    assert plain.rate == pytest.approx(2 / 3) and tied.rate == pytest.approx((14 + 5.5) / 32)
    assert tied.more == math.ceil(plain.more * 32 / 21), "some of the votes to come are ties too"
    nothing = counting.result(Counts())
    assert (nothing.rate, nothing.decided, nothing.more) == (None, None, None)
    only = counting.result(Counts(ties=50))
    assert only.rate == 0.5 and only.interval == (0.0, 1.0) and only.word == "no difference yet"
