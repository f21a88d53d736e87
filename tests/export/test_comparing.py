"""`export compare`: which file we would take, and what the numbers are."""

from pathlib import Path

import pytest

from kto_core.cli.export import compared
from kto_core.export.gguf import comparing, writing


def row(size: int, same: int, of: int = 100) -> dict:
    agreement = {"same": same, "of": of, "undecided": 3}
    return {"path": Path(f"m-{size}.gguf"), "bytes": size, "agreement": agreement, "kl": 0.01, "tokens_per_second": 9.5}


@pytest.mark.parametrize(
    ("agreements", "taken"),
    [([100, 99, 95], 2), ([100, 96, 94], 1), ([94, 80, 70], 0), ([90, 90, 80], 1)],
)
def test_the_smallest_file_that_is_as_good_is_taken(agreements, taken):
    rows = [row(size, same) for size, same in zip((300, 200, 100), agreements, strict=True)]
    assert comparing.choose(rows) is rows[taken]


def test_without_a_decided_place_the_smallest_is_no_better_than_others():
    rows = [row(300, 0, 0), row(100, 0, 0)]
    assert comparing.choose(rows) is rows[1]


def test_divergence_is_that_of_torch():
    import torch

    torch.manual_seed(0)
    mine, theirs = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    log_p, log_q = torch.log_softmax(mine, 0), torch.log_softmax(theirs, 0)
    right = float(torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum"))
    assert comparing.divergence(log_p.numpy(), theirs.tolist()) == pytest.approx(right)
    assert comparing.divergence(log_p.numpy(), [*mine.tolist(), -30.0]) == pytest.approx(0.0, abs=1e-9)  # padded


def test_the_table_marks_the_file_that_is_taken():
    rows = [row(300_000_000, 100) | {"taken": False}, row(200_000_000, 96) | {"taken": True}]
    lines = compared(rows).splitlines()
    assert len(lines) == 3 and "96 of 100 (96%)" in lines[2]
    assert lines[2].endswith("<- recommended") and "recommended" not in lines[1]


def test_rows_that_are_no_multiple_of_a_block_take_more():
    assert writing.per_weight("q4_k_m", 4096, 14336) == writing.QUANTS["q4_k_m"] < writing.per_weight("q4_k_m", 576)
    assert writing.per_weight("q4_k_m") == writing.QUANTS["q4_k_m"]
    for quant in writing.QUANTS:
        assert quant in writing.FTYPES and writing.per_weight(quant, 320) >= writing.QUANTS[quant]
