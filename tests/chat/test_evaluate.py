"""Evaluation: log-probs against a plain forward, AUC by hand, a run measured and judged, answers in batches."""

import json
import random
import shutil

import numpy as np
import pytest

from kto_core.chat import chat, evaluate, measuring
from kto_core.errors import DataError, ModelError
from kto_core.runs import folders
from kto_core.training import start as starting
from kto_core.verdict import keeping, wording
from kto_core.verdict.judging import BETTER, DRIFTED, SAME
from tests.support.commands import called
from tests.support.training import make_data, resolved
from tests.support.verdicts import RESULT


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """A run, its rows, and as many rows with the same habit about other questions."""
    folder = tmp_path_factory.mktemp("evaluate")
    lines = make_data(folder / "all.jsonl", 48).read_text().splitlines(keepends=True)
    data, others = folder / "data.jsonl", folder / "others.jsonl"
    data.write_text("".join(lines[:24]))
    others.write_text("".join(lines[24:]))
    return run(tiny_model, data, folder / "run", max_steps=12, learning_rate=0.02), data, others


def run(model, data, folder, **settings):
    made = folders.create(resolved(model, data, output_dir=str(folder), **settings))
    starting.start(made, block=True)
    assert made.state().state == "finished", made.state().message
    return made


@pytest.fixture(scope="module")
def loaded(trained):
    one = chat.Chat.load(trained[0])
    yield one
    one.unload()


def test_logps_equal_one_row_at_a_time(loaded):
    import torch

    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(3, 250, rng.integers(1, 90)).tolist(), rng.integers(3, 250, rng.integers(1, 60)).tolist())
        for _ in range(9)
    ]
    for tuned in (True, False):
        found = measuring.sequence_logps(loaded, pairs, tuned=tuned)
        for (prompt, completion), value in zip(pairs, found, strict=True):
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                model = loaded.model
                ids = torch.tensor([prompt + completion])
                if tuned:
                    logits = model(input_ids=ids).logits
                else:
                    with model.disable_adapter():
                        logits = model(input_ids=ids).logits
            logps = logits[0, :-1].double().log_softmax(-1)[range(ids.shape[1] - 1), ids[0, 1:]]
            assert value == pytest.approx(logps[len(prompt) - 1 :].sum().item(), rel=1e-4)


def test_auc_is_the_share_of_pairs_won():
    chosen, rejected = [0.1, 0.5, 0.5], [0.0, 0.5, 0.9]
    pairs = [(c > r) + (c == r) / 2 for c in chosen for r in rejected]
    assert measuring.auc(chosen, rejected) == pytest.approx(sum(pairs) / 9)


def test_a_trained_run_beats_chance_on_rows_it_has_not_seen(trained):
    made, _, others = trained
    seen = []
    result = evaluate.evaluate(made, str(others), samples=2, progress=lambda f, t: seen.append(f))
    assert result["rows"] == result["questions"] == 24 and result["desirable"] == result["undesirable"] == 12
    assert result["auc"] > 0.9 and result["kl"] >= 0 and result["loss"] < 0.5 and result["accuracy"] >= 0.5
    margin, (low, high) = result["rewards/margins"], result["margin_interval"]
    assert 0 < low < margin < high
    assert margin == pytest.approx(result["rewards/chosen"] - result["rewards/rejected"])
    assert result["moved"]["nats"] > abs(margin) and result["trained_on"] == result["left_out"] == 0
    assert result["forgotten"]["tokens"] > 5000, "the tiny model reads bytes"
    assert 50 < result["forgotten"]["perplexity_before"] < 500, "it knows nothing: about as many choices as bytes"
    assert len(result["samples"]) == 2 and {"prompt", "label", "base", "tuned"} == set(result["samples"][0])
    changed = sum(s["base"] != s["tuned"] for s in result["samples"])
    assert result["answers"]["changed"] == changed and result["answers"]["asked"] == 2
    assert 1.0 in seen and all(a <= b for a, b in zip(*(2 * [[x for x in seen if x]]), strict=True))
    told = list(result)
    order = ["moved", "rewards/margins", "rewards/chosen", "accuracy", "auc", "forgotten", "verdict"]
    assert sorted(order, key=told.index) == order


def test_answers_in_a_batch_equal_answers_alone(loaded):
    prompts = [[{"role": "user", "content": "x" * n}] for n in (3, 40, 11)]
    together = evaluate.answers(loaded, prompts, max_new_tokens=8)
    alone = [evaluate.answers(loaded, [p], max_new_tokens=8)[0] for p in prompts]
    assert together == alone


def test_what_cannot_be_evaluated(trained, tmp_path):
    made, data, _ = trained
    one = tmp_path / "one.jsonl"
    one.write_text('{"prompt": "a", "completion": "b", "label": true}\n' * 3)
    with pytest.raises(DataError, match="good and bad rows"):
        evaluate.evaluate(made, str(one))
    with pytest.raises(DataError, match="is not a run"):
        evaluate.evaluate("demo", str(one))
    with pytest.raises(DataError, match=r"held out no rows.*--data.*--test-size"):
        evaluate.evaluate(made)
    with pytest.raises(DataError, match="trained on the questions of all 24 rows"):
        evaluate.evaluate(made, str(data))


def test_a_question_in_other_clothes_is_no_new_question(trained, tmp_path):
    """Case, blanks and a system prompt do not make a row one that the run has not seen."""
    made, data, others = trained
    seen = [json.loads(line) for line in data.read_text().splitlines()]
    for row in seen:
        asked = row["prompt"][0]["content"].upper().replace(" ", "\u00a0 \n")
        row["prompt"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"  {asked} "}]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in seen) + others.read_text())
    result = evaluate.evaluate(made, str(mixed), samples=0, keep=False)
    assert (result["rows"], result["trained_on"], result["left_out"]) == (24, 24, 24)
    alone = evaluate.evaluate(made, str(others), samples=0, keep=False)
    assert result["rewards/margins"] == pytest.approx(alone["rewards/margins"], rel=1e-3)


def test_own_rows_that_are_gone_are_said(trained, tmp_path):
    made, data, others = trained
    away = data.rename(tmp_path / "away.jsonl")
    try:
        result = evaluate.evaluate(made, str(others), samples=0, keep=False)
    finally:
        away.rename(data)
    assert result["trained_on"] is None and "not known" in result["remarks"][0]


def test_a_run_that_went_on_is_measured_from_where_it_began(trained, tiny_model, tmp_path):
    """With a rate of nothing it has gained nothing, however good the adapter was that it began with."""
    before, data, others = trained
    adapter = shutil.copytree(before.adapter, tmp_path / "adapter")
    settings = {"max_steps": 1, "learning_rate": 1e-12}
    went_on = run(tiny_model, data, tmp_path / "run", adapter=str(adapter), **settings)
    assert evaluate.evaluate(before, str(others), samples=0)["rewards/margins"] > 0.1
    result = evaluate.evaluate(went_on, str(others), samples=2)
    assert abs(result["rewards/margins"]) < 1e-3 and result["verdict"]["word"] == SAME
    assert result["answers"]["changed"] == 0, "both sides answer with the adapter it began with"
    assert result["forgotten"]["perplexity_after"] == pytest.approx(result["forgotten"]["perplexity_before"], rel=1e-3)
    shutil.rmtree(adapter)
    with pytest.raises(ModelError, match="continued from"):
        evaluate.evaluate(went_on, str(others), samples=0)


# ---- validation rows and verdicts -----------------------------------------------------------------------------------


def test_a_run_is_judged_on_the_rows_that_it_held_out(tiny_model, tmp_path):
    """Which rows these are is found again from settings and data; the verdict is kept, and goes with its adapter."""
    data = make_data(tmp_path / "data.jsonl", 60)
    made = run(tiny_model, data, tmp_path / "run", max_steps=8, learning_rate=0.02, test_size=0.4, beta=0.5)
    result = evaluate.evaluate(made, samples=1)
    held = made.dataset()["test"]
    assert result["data"] == "validation rows of the run" and result["answers"]["asked"] == 1
    assert (result["rows"], result["desirable"]) == (held["rows"], held["desirable"]) and held["rows"] > 20
    assert result["verdict"]["word"] in (BETTER, DRIFTED) and result["rewards/margins"] > 0
    kept = keeping.read(made)
    assert kept["verdict"] == result["verdict"] and kept["margin_interval"] == result["margin_interval"]
    assert wording.lines(kept) == wording.lines(result)
    assert json.loads((made.path / "verdict.json").read_text())["samples"] == result["samples"]
    (made.adapter / "manifest.json").write_text('{"files": {}}')
    assert keeping.read(made) is None, "another adapter"
    make_data(data, 50)
    with pytest.raises(DataError, match=r"changed since.*--data"):
        evaluate.evaluate(made)
    data.unlink()
    with pytest.raises(DataError, match=r"cannot be read.*--data"):
        evaluate.evaluate(made)


def test_a_rate_of_5e_7_makes_no_difference(tiny_model, tmp_path):
    data = make_data(tmp_path / "data.jsonl", 60)
    made = run(tiny_model, data, tmp_path / "run", max_steps=4, learning_rate=5e-7, test_size=0.3)
    verdict = evaluate.evaluate(made, samples=0)["verdict"]
    assert verdict["word"] == SAME and "less than 1 hardly shows" in verdict["sentence"]


@pytest.mark.parametrize("seed", range(3))
def test_shuffled_labels_get_no_better(tiny_model, tmp_path, seed):
    """The model moves far, and learns what is not there."""
    rows = [json.loads(line) for line in make_data(tmp_path / "plain.jsonl", 60).read_text().splitlines()]
    labels = [row["label"] for row in rows]
    random.Random(seed).shuffle(labels)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(r | {"label": b}) + "\n" for r, b in zip(rows, labels, strict=True)))
    made = run(tiny_model, data, tmp_path / "run", max_steps=6, learning_rate=0.02, test_size=0.5, seed=seed)
    result = evaluate.evaluate(made, samples=0)
    assert result["moved"]["nats"] > 1 and result["verdict"]["word"] == SAME


def test_weights_that_are_nan_are_drift_and_valid_json(trained, monkeypatch, tmp_path):
    made, _, others = trained
    right = measuring.sequence_logps

    def broken(loaded, pairs, tuned=True, **rest):
        return right(loaded, pairs, tuned=tuned, **rest) * (np.nan if tuned else 1)

    monkeypatch.setattr(measuring, "sequence_logps", broken)
    result = evaluate.evaluate(made, str(others), samples=0)
    assert result["verdict"]["word"] == DRIFTED and result["rewards/margins"] is result["kl"] is None
    json.dumps(result, allow_nan=False)
    assert keeping.read(made)["verdict"]["word"] == DRIFTED
    assert dict(wording.lines(result))["Moved"] == "not known"


def test_a_folder_that_cannot_be_written_loses_the_verdict_aloud(trained, monkeypatch):
    made, _, others = trained

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keeping, "write", full)
    result = evaluate.evaluate(made, str(others), samples=0)
    assert "not kept" in result["remarks"][-1] and "Free up disk space" in result["remarks"][-1]


def test_the_command_says_it_in_lines_and_the_verdict_last(trained, capsys):
    made, _, others = trained
    code, out, _ = called(capsys, "evaluate", str(made.path), "--data", str(others))
    lines = out.splitlines()
    starts = [next(i for i, line in enumerate(lines) if line.startswith(name)) for name in (
        "Before ", "After ", "Moved ", "Reward margin ", "Good answers ", "Greedy answers ", "AUC ", "Answer length ",
        "Neutral text ", "Rows ")]  # fmt: skip
    assert code == 0 and starts == sorted(starts) and "95 % interval" in lines[starts[3]]
    assert lines[-1] == keeping.read(made)["verdict"]["sentence"]


def test_the_command_needs_no_data_and_prints_one_object(trained, capsys, monkeypatch):
    made, _, others = trained
    asked = []
    monkeypatch.setattr(evaluate, "evaluate", lambda run, data, **_: asked.append((run, data)) or RESULT)
    for more, data in (((), None), (("--data", str(others)), str(others))):
        code, out, _ = called(capsys, "evaluate", str(made.path), "--json", *more)
        assert code == 0 and json.loads(out) == RESULT and asked.pop() == (made, data)
