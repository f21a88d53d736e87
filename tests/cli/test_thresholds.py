"""--good-from and --bad-to: the same for data check, data convert and train."""

import json

import pytest

from kto_core import cli
from kto_core.config import resolving


@pytest.fixture
def stars(tmp_path) -> str:
    rows = [{"prompt": f"Question {q}?", "completion": f"A {n}.", "rating": n} for q in range(3) for n in range(1, 6)]
    (tmp_path / "stars.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(tmp_path / "stars.jsonl")


def called(capsys, *args) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_check_shows_the_balance_a_threshold_gives(capsys, stars):
    code, out, err = called(capsys, "data", "check", stars)
    assert code == 1 and "1 (3), 2 (3), 3 (3), 4 (3), 5 (3)" in err and "--good-from 4 --bad-to 2" in err
    code, out, _ = called(capsys, "data", "check", stars, "--good-from", "4", "--bad-to", "2", "--json")
    found = json.loads(out)
    assert code == 0 and (found["desirable"], found["undesirable"]) == (6, 6)
    assert found["dropped"] == {"neutral label": 3} and "good from 4, bad to 2" in found["scale"]
    code, out, _ = called(capsys, "data", "check", stars, "--good-from=4", "--bad-to=-1")
    assert code == 1


@pytest.mark.parametrize("cut", [("2", "4"), ("4", "4"), ("6", "2"), ("4", "0")])
def test_thresholds_that_do_not_fit(capsys, tmp_path, stars, cut):
    flags = ("--good-from", cut[0], "--bad-to", cut[1])
    out = tmp_path / "out.jsonl"
    for line in (("data", "check", stars), ("data", "convert", stars, "--to", "trl", "--out", out)):
        code, _, err = called(capsys, *line, *flags)
        assert code == 1 and len(err.strip().splitlines()) == 1 and ("good_from" in err or "bad_to" in err)
    code, _, err = called(capsys, "train", "--preset", "demo", "--data", stars, *flags, "--dry-run")
    assert code and "Traceback" not in err and ("good_from" in err or "bad_to" in err)
    assert not out.exists()


def test_convert_writes_labels(capsys, tmp_path, stars):
    out = tmp_path / "out.jsonl"
    flags = ("--good-from", "4", "--bad-to", "2")
    code, _, err = called(capsys, "data", "convert", stars, "--to", "trl", "--out", out, *flags)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0 and "3 neutral label" in err
    assert all(r["label"] is (r["rating"] >= 4) and r["rating"] != 3 for r in rows) and len(rows) == 12


def test_a_run_plans_with_its_thresholds_and_keeps_them(capsys, tmp_path, stars):
    flags = ("--good-from", "4", "--bad-to", "2.5")
    code, out, _ = called(capsys, "train", "--preset", "demo", "--data", stars, *flags, "--dry-run", "--json")
    found = json.loads(out)
    assert code == 0 and found["train_rows"] == 12 and found["config"]["bad_to"] == 2.5
    resolved = resolving.resolve("demo", {"data": stars, "good_from": "4", "bad_to": "2.5"})
    resolving.save_config(resolved, tmp_path / "config.yaml")
    again = resolving.load_config(tmp_path / "config.yaml")
    assert (again.config.good_from, again.config.bad_to) == (4, 2.5) and again.config.cuts_scale
    assert not resolving.resolve("demo", {}).config.cuts_scale
    code, _, err = called(capsys, "train", "--preset", "demo", "--data", stars, "--dry-run")
    assert code == 1 and "--good-from 4 --bad-to 2" in err
