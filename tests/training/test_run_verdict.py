"""The verdict at a run's end: rows held out by themselves, one sentence in the log, and nothing of it ends a run."""

import json

import pytest

from kto_core.chat import evaluate
from kto_core.config import resolving
from kto_core.errors import Cancelled, ModelError
from kto_core.planning.dry_run import dry_run
from kto_core.runs.run import Run
from kto_core.training.train import train
from kto_core.verdict import keeping
from tests.support.training import events, make_data, resolved, state

QUICK = {"max_steps": 6, "learning_rate": 0.02}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Enough rows to spare a tenth."""
    return make_data(tmp_path_factory.mktemp("many") / "data.jsonl", 140)


def trained(model, data, folder, **settings):
    found = resolved(model, data, **QUICK | settings)
    resolving.save_config(found, folder / "config.yaml")
    train(found.config, folder)
    ended = state(folder)
    assert ended.state == "finished", ended.error
    return Run(folder), [e["text"] for e in events(folder) if e["kind"] == "log"]


@pytest.mark.parametrize(("rate", "words"), [(5e-7, ("no difference",)), (0.02, ("better", "drifted"))])
def test_a_run_holds_out_a_tenth_and_is_judged_with_it(tiny_model, many, tmp_path, rate, words):
    run, said = trained(tiny_model, many, tmp_path, learning_rate=rate)
    facts = run.dataset()
    assert (facts["train"]["rows"], facts["test"]["rows"]) == (126, 14)
    found = keeping.read(run)
    assert found["verdict"]["word"] in words and found["rows"] == 14 and found["trained_on"] == 0
    assert said[-1].endswith(found["verdict"]["sentence"]) and any(text.startswith("Moved: ") for text in said)
    told = [e["message"] for e in events(tmp_path) if e["kind"] == "status" and e["state"] == "training"]
    assert any(text.startswith("Verdict: ") for text in told), "progress"
    assert events(tmp_path)[-1]["state"] == "finished"
    assert keeping.samples(run), "answers to look at"
    again = evaluate.evaluate(run, keep=False)
    assert again["verdict"] == found["verdict"], "the command says the same"


def test_the_plan_counts_the_rows_that_will_train(tiny_model, many):
    plan = dry_run(resolved(tiny_model, many).config)
    assert (plan["train_rows"], plan["test_rows"]) == (126, 14)
    plan = dry_run(resolved(tiny_model, many, test_size=0).config)
    assert (plan["train_rows"], plan["test_rows"]) == (140, 0)


def test_too_few_rows_are_said(tiny_model, tmp_path):
    run, said = trained(tiny_model, make_data(tmp_path / "few.jsonl", 24), tmp_path, max_steps=1)
    assert run.dataset()["train"]["rows"] == 24 and keeping.read(run) is None
    assert any("No rows are held out: a tenth of 24 rows is less than 5 good and 5 bad questions." in t for t in said)


@pytest.mark.parametrize("off", [{"verdict": False}, {"test_size": 0}])
def test_it_can_be_switched_off(tiny_model, many, tmp_path, off):
    run, said = trained(tiny_model, many, tmp_path, max_steps=1, **off)
    assert keeping.read(run) is None and not any("erdict" in t or "held out" in t for t in said)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Cancelled("Stopped."), "The verdict was stopped; the run is finished. `evaluate"),
        (ModelError("No model."), "There is no verdict. No model."),
        (ZeroDivisionError("n"), "There is no verdict. ZeroDivisionError: n."),
        (OSError(28, "No space left on device"), "There is no verdict. OSError"),
    ],
)
def test_whatever_happens_to_it_the_run_has_finished(tiny_model, many, tmp_path, monkeypatch, error, words):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(evaluate, "evaluate", broken)
    run, said = trained(tiny_model, many, tmp_path, max_steps=1)
    assert words in said[-1] and run.adapter


def test_a_stop_ends_it_and_leaves_a_finished_run(tiny_model, many, tmp_path, monkeypatch):
    right = evaluate.answers

    def asked(*args, **rest):
        (tmp_path / "stop").write_text("")
        rest["cancel"].wait(10)
        return right(*args, **rest)

    monkeypatch.setattr(evaluate, "answers", asked)
    run, said = trained(tiny_model, many, tmp_path, max_steps=1)
    assert "The verdict was stopped" in said[-1] and run.adapter and not (tmp_path / "stop").exists()


def test_a_run_of_before_keeps_its_rows(tiny_model, tmp_path):
    """Its config.yaml says which share was held out, and not that whole questions are."""
    resolving.save_config(resolved(tiny_model, tmp_path / "x", test_size=0.2), tmp_path / "config.yaml")
    lines = (tmp_path / "config.yaml").read_text().splitlines()
    old = [line for line in lines if not line.startswith(("split_by:", "verdict:"))]
    old = [line.replace("split_by: default, ", "").replace("verdict: default, ", "") for line in old]
    (tmp_path / "config.yaml").write_text("\n".join(old))
    config = resolving.load_config(tmp_path / "config.yaml").config
    assert (config.test_size, config.split_by) == (0.2, "prompt")
    (tmp_path / "config.yaml").write_text("\n".join(line for line in old if not line.startswith("test_size:")))
    assert resolving.load_config(tmp_path / "config.yaml").config.test_size == 0
    fresh = resolved(tiny_model, tmp_path / "x").config
    assert (fresh.test_size, fresh.split_by) == ("auto", "question")
    json.dumps(resolving.as_trl(fresh))
