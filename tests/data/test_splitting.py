"""What is held out: whole questions, a tenth of each label at most, enough for an interval or nothing."""

import pytest

from kto_core.data import dataset, splitting
from kto_core.data.records.rows import Row


def rows_of(good: int, bad: int, ask=lambda i: f"question {i}") -> list[Row]:
    return [Row([{"role": "user", "content": ask(i)}], [{"role": "assistant", "content": "a"}], i < good, i)
            for i in range(good + bad)]  # fmt: skip


@pytest.mark.parametrize(
    ("good", "bad", "held", "held_good"),
    [
        (50, 50, 10, 5),  # the smallest balanced set that can spare rows
        (49, 50, 0, 0),
        (970, 30, 100, 94),  # a tenth of the rarer label would be too few
        (990, 10, 0, 0),
        (5000, 5000, 500, 250),
        (9000, 1000, 500, 400),
        (0, 0, 0, 0),
        (100, 0, 0, 0),
    ],
)
def test_auto_takes_a_tenth_or_nothing(good, bad, held, held_good):
    train, test = dataset.split_rows(rows_of(good, bad), "auto", 3)
    assert (len(test), sum(r.label for r in test)) == (held, held_good) and len(train) == good + bad - held
    assert splitting.expected(good, bad, "auto") == held <= (good + bad) / 10


@pytest.mark.parametrize("share", [0.0, 0.003, 0.1, 0.25, 0.5])
def test_what_is_expected_is_held_out(share):
    for good, bad in ((3, 3), (55, 52), (970, 30)):
        test = dataset.split_rows(rows_of(good, bad), share, 3)[1]
        assert len(test) == splitting.expected(good, bad, share)


@pytest.mark.parametrize("size", ["auto", 0.1])
def test_a_question_in_other_clothes_lies_on_the_same_side(size):
    plain = rows_of(200, 200, lambda i: f"What is number {i % 100}?")
    for i, row in enumerate(plain):
        if i % 3 == 0:
            row.prompt[0]["content"] = "  " + row.prompt[0]["content"].upper().replace(" ", "\u00a0 ")
        if i % 2:
            row.prompt.insert(0, {"role": "system", "content": "Be brief."})
    train, test = dataset.split_rows(plain, size, 1)
    sides = [{splitting.question(r) for r in side} for side in (train, test)]
    assert not sides[0] & sides[1] and 30 <= len(test) <= 44
    by_prompt = [{splitting.question(r) for r in side} for side in dataset.split_rows(plain, 0.1, 1, by="prompt")]
    assert by_prompt[0] & by_prompt[1], "as older runs did it, for which the same rows have to be found again"


def test_few_questions_of_many_rows_are_kept_for_training():
    """400 rows, and 8 questions: a verdict on one of them says nothing."""
    assert [len(s) for s in dataset.split_rows(rows_of(200, 200, lambda i: str(i % 8)), "auto", 0)] == [400, 0]


def test_real_rows_do_not_leak(shared_data):
    for name in ("truthfulqa_kto.jsonl", "nexus_behaviors.jsonl"):
        rows = dataset.load(shared_data / name).rows
        train, test = dataset.split_rows(rows, "auto", seed=5)
        sides = [{splitting.question(r) for r in side} for side in (train, test)]
        assert not sides[0] & sides[1] and 0 < len(test) <= min(500, len(rows) / 10)
        labels = [r.label for r in test]
        assert min(labels.count(True), labels.count(False)) >= splitting.FEWEST
        assert [r.line for r in test] == [r.line for r in dataset.split_rows(rows, "auto", 5)[1]]
