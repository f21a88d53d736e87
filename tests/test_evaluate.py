"""Evaluation: log-probs against a plain forward, AUC by hand, a run measured, answers in batches."""

import shutil

import numpy as np
import pytest
from training import make_data, resolved

from kto_core import chat, evaluate, run
from kto_core.errors import DataError, ModelError


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    data = make_data(folder / "data.jsonl")
    made = run.create(resolved(tiny_model, data, max_steps=12, learning_rate=0.02, output_dir=str(folder / "run")))
    run.start(made, block=True)
    return made, data


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
        found = evaluate.sequence_logps(loaded, pairs, tuned=tuned)
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
    assert evaluate.auc(chosen, rejected) == pytest.approx(sum(pairs) / 9)


def test_a_trained_run_beats_chance_on_its_own_rows(trained):
    made, data = trained
    seen = []
    result = evaluate.evaluate(made, str(data), samples=2, progress=lambda f, t: seen.append(f))
    assert result["rows"] == 24 and result["desirable"] == result["undesirable"] == 12
    assert result["auc"] > 0.9 and result["rewards/margins"] > 0 and result["kl"] >= 0 and result["loss"] < 0.5
    assert result["rewards/margins"] == pytest.approx(result["rewards/chosen"] - result["rewards/rejected"])
    assert len(result["samples"]) == 2 and {"prompt", "base", "tuned"} == set(result["samples"][0])
    assert 1.0 in seen and all(a <= b for a, b in zip(*(2 * [[x for x in seen if x]]), strict=True))


def test_answers_in_a_batch_equal_answers_alone(loaded):
    prompts = [[{"role": "user", "content": "x" * n}] for n in (3, 40, 11)]
    together = evaluate.answers(loaded, prompts, max_new_tokens=8)
    alone = [evaluate.answers(loaded, [p], max_new_tokens=8)[0] for p in prompts]
    assert together == alone


def test_what_cannot_be_evaluated(trained, tmp_path):
    made, _ = trained
    one = tmp_path / "one.jsonl"
    one.write_text('{"prompt": "a", "completion": "b", "label": true}\n' * 3)
    with pytest.raises(DataError, match="desirable and undesirable"):
        evaluate.evaluate(made, str(one))
    with pytest.raises(DataError, match="no run"):
        evaluate.evaluate("demo", str(one))


def test_a_run_that_went_on_is_measured_from_where_it_began(trained, tiny_model, tmp_path):
    """With a rate of nothing it has gained nothing, however good the adapter was that it began with."""
    before, data = trained
    adapter = shutil.copytree(before.adapter, tmp_path / "adapter")
    settings = {"max_steps": 1, "learning_rate": 1e-12, "output_dir": str(tmp_path / "run")}
    went_on = run.create(resolved(tiny_model, data, adapter=str(adapter), **settings))
    run.start(went_on, block=True)
    assert evaluate.evaluate(before, str(data), samples=0)["rewards/margins"] > 0.1
    assert abs(evaluate.evaluate(went_on, str(data), samples=0)["rewards/margins"]) < 1e-3
    shutil.rmtree(adapter)
    with pytest.raises(ModelError, match="went on from"):
        evaluate.evaluate(went_on, str(data), samples=0)
