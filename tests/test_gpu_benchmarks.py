"""The benchmarks that want a GPU: what they ask for and make of it."""

import json

import pytest
import torch

# ---- longest_row.py -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 99, 100, 101, 199, 200, 1000, 1023, 1024, 9000])
def test_the_bisection_finds_the_longest_that_fits(limit):
    import longest_row

    asked = []

    def fits(length: int) -> bool:
        asked.append(length)
        return length <= limit

    found = longest_row.longest(fits, 100, 1024, 4)
    expected = max((n for n in range(100, 1025, 4) if n <= limit), default=0)
    assert found == expected
    assert len(asked) == len(set(asked)) <= 9 and all(n % 4 == 0 and 100 <= n <= 1024 for n in asked)


def test_a_search_says_what_it_found_and_what_failed(capsys):
    import longest_row

    def attempt(engine: str, length: int) -> dict:
        found = {"engine": engine, "length": length, "fits": False}
        if engine == "unsloth":
            return found | {"error": "no such module"}
        if length > {"packed": 3000, "trl": 0, "forced": 9999}[engine]:
            return found | {"why": "out of memory"}
        limits = {"token_budget": 5000, "recomputed": 7, "of": 8, "offload": length > 2048}
        found |= {"fits": True, "peak_gib": 1.5, "seconds": 2.0}
        return found | ({"limits": limits} if engine == "packed" else {})

    args = longest_row.arguments(["--high", "4096", "--engines", "packed,trl,unsloth,forced"])
    table, tries = longest_row.search(args, attempt)
    assert table == [
        "| packed | 2,560 | 1.50 | 2.0 |",
        "| trl | none of 512 tokens or more | – | – |",
        "| unsloth | failed: no such module | – | – |",
        "| forced | 4,096 (the longest tried) | 1.50 | 2.0 |",
    ]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(tries)
    assert any(text.endswith("limits: 5,000 tokens a pass, 7 of 8 layers recomputed") for text in said)
    assert any(text.endswith("7 of 8 layers recomputed, their inputs in main memory") for text in said)


@pytest.mark.parametrize("engine", ["packed", "forced", "trl"])
def test_a_try_is_one_step_on_rows_of_that_length(tiny_model, engine, monkeypatch):
    import longest_row

    monkeypatch.setattr(longest_row, "hold", lambda *_: None)  # it would hold the tests' own process
    flags = ["--model", str(tiny_model), "--lora-r", "4", "--worker", engine, "--length", "96"]
    found = longest_row.attempt(longest_row.arguments(flags))
    assert found["fits"] and found["peak_gib"] > 0, found
    assert ("limits" in found) == (engine != "trl")
    if engine == "forced":
        assert found["limits"] == {"token_budget": 96, "recomputed": 2, "of": 2, "offload": False}


def test_rows_of_a_try_share_nothing():
    import longest_row

    encoded, labels = longest_row.rows(101, 2, 4000)
    assert [len(e.prompt_ids) + len(e.completion_ids) for e in encoded] == [101, 101] and labels == [True, False]
    assert encoded[0].prompt_ids[:8] != encoded[1].prompt_ids[:8]


def test_running_out_of_memory_is_not_another_error(tiny_model, monkeypatch):
    import kto_step
    import longest_row

    monkeypatch.setattr(longest_row, "hold", lambda *_: None)
    args = longest_row.arguments(["--model", str(tiny_model), "--worker", "trl", "--length", "96"])

    def load(error):
        def raises(*_):
            raise error

        return raises

    monkeypatch.setattr(kto_step, "load", load(RuntimeError("DefaultCPUAllocator: can't allocate memory: …")))
    assert longest_row.attempt(args) == {"fits": False, "why": "out of memory"}
    monkeypatch.setattr(kto_step, "load", load(torch.cuda.OutOfMemoryError("CUDA out of memory.")))
    assert longest_row.attempt(args)["why"] == "out of memory"
    monkeypatch.setattr(kto_step, "load", load(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes"):
        longest_row.attempt(args)


# ---- presets.py -----------------------------------------------------------------------------------------------------


def test_more_gpus_are_compared_with_one():
    import presets

    one = {"preset": "7b", "num_gpus": 1, "examples_per_second": 20.0}
    two = {"preset": "7b", "num_gpus": 2, "examples_per_second": 37.0}
    assert presets.scaling([one, two]) == "7b, 2 GPUs against 1: 37.00 against 20.00 rows/s, 1.85 times"
    failed = {"preset": "7b", "num_gpus": 2, "error": "no second GPU"}
    assert presets.scaling([one, failed]) == "7b, 2 GPUs against 1: not measured"


def test_each_preset_is_run_on_one_gpu_and_on_many(monkeypatch, capsys):
    import presets

    asked = []

    def apart(args, preset, length, gpus):
        asked.append((preset, length, gpus))
        return {"preset": preset, "num_gpus": gpus or 1, "examples_per_second": 10.0 * (gpus or 1)}

    monkeypatch.setattr(presets, "apart", apart)
    presets.main(["--data", "x", "--presets", "3b,7b", "--lengths", "own,512", "--num-gpus", "2"])
    assert asked == [(p, n, g) for p in ("3b", "7b") for n in (None, 512) for g in (1, 2)]
    assert capsys.readouterr().out.count("rows/s, 2.00 times") == 4
    asked.clear()
    presets.main(["--data", "x", "--presets", "3b"])
    assert asked == [("3b", None, None)]


def test_the_longest_rows_of_both_labels_and_how_far_a_run_came(tmp_path):
    import presets
    from kto_core.data import dataset
    from kto_core.runs import events
    from tests.support.training import make_data

    data = make_data(tmp_path / "rows.jsonl", 20)
    whole, few = dataset.load(str(data)).rows, dataset.load(presets.longest(str(data), 6, str(tmp_path))).rows
    assert sorted(few.labels) == [False] * 3 + [True] * 3
    of_label = [sorted(n for n, y in zip(dataset.lengths(whole), whole.labels, strict=True) if y == x) for x in (0, 1)]
    assert sorted(dataset.lengths(few)) == sorted(of_label[0][-3:] + of_label[1][-3:])

    run = tmp_path / "run"
    assert "before the run" in presets.where(run)["state"]
    run.mkdir()
    log = events.EventLog(run / "events.jsonl")
    log.status("training")
    for step, gib in ((1, 3.5), (2, 4.25), (3, 4.0)):
        log.metric(step, loss=0.5, gpu_memory=gib, examples_per_second=float(step))
    found = presets.where(run)
    assert (found["state"], found["reserved_gib"], found["examples_per_second"]) == ("training", 4.25, 3.0)


def test_a_preset_in_the_products_own_worker(tiny_model, tmp_path, monkeypatch):
    """What `--num-gpus 1` measures: the speed that the run's events tell, the first step left out."""
    import presets
    from kto_core.hardware import gpus as hardware
    from tests.support.training import make_data

    monkeypatch.setenv(hardware.LIMIT, "24")  # `one` sets it for its own process
    data = make_data(tmp_path / "rows.jsonl")
    flags = [
        "--one",
        "demo",
        "--max-length",
        "256",
        "--data",
        str(data),
        "--shape",
        str(tiny_model),
        "--steps",
        "2",
        "--num-gpus",
        "1",
    ]
    found = presets.one(presets.arguments([*flags, "--run-dir", str(tmp_path / "run")]))
    assert (found["state"], found["steps"], found["num_gpus"]) == ("finished", 2, 1), found
    assert found["examples_per_second"] > 0 and found["rows_of_a_step"] == 8
    assert (tmp_path / "run" / "worker.log").exists()


# ---- out_of_memory.py -----------------------------------------------------------------------------------------------


def test_runs_that_are_left_alone_are_alike(tiny_model, tmp_path, monkeypatch, capsys):
    """The benchmark of a full card, where no card is: every run ends well, with the same losses."""
    import out_of_memory

    from kto_core.hardware import gpus as hardware
    from tests.support.training import make_data

    monkeypatch.setenv(hardware.LIMIT, "24")  # `main` sets it for its process
    argv = ["--data", str(make_data(tmp_path / "data.jsonl", 16)), "--model", str(tiny_model), "--then-gib", "2"]
    argv += ["--engine", "trl", "--gradient-checkpointing", "false", "--batch-size", "2", "--accumulation", "3"]
    assert out_of_memory.main([*argv, "--steps", "3", "--after", "1", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert [r["then_gib"] for r in runs] == [None, 2.0]
    for run in runs:
        assert run["state"] == "finished" and len(run["losses"]) == 3, run
        assert run["largest_difference"] == 0 and run["said"] == []
