"""The demo: its data can teach the habit, and it trains, measures, stops and fails as any run does."""

import json
import statistics
import threading
from types import SimpleNamespace

import pytest

from kto_core import demo
from kto_core.config import resolving
from kto_core.data import dataset
from kto_core.errors import Cancelled, KTOError, RunError
from kto_core.runs import folders
from tests.support.training import FAST


def question(row) -> str:
    return row.prompt[-1]["content"]


def answer(row) -> str:
    return row.completion[-1]["content"]


def words(rows, label: bool) -> list[int]:
    return [len(answer(row).split()) for row in rows if row.label is label]


@pytest.fixture(scope="module")
def training():
    return dataset.load(str(demo.DATA))


@pytest.fixture(scope="module")
def held_out():
    return dataset.load(str(demo.HELD_OUT))


@pytest.fixture(scope="module")
def asked() -> list[str]:
    lines = demo.PROMPTS.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"][-1]["content"] for line in lines]


# ---- the data -------------------------------------------------------------------------------------------------------


def test_the_example_has_nothing_to_mend(training, held_out):
    for loaded, least in ((training, 240), (held_out, 40)):
        report = loaded.report
        assert report.rows == report.kept >= least
        assert not report.dropped and not report.changed and not report.duplicates and not report.conflicts
        assert 0.9 < report.desirable / report.undesirable < 1.1


def test_nothing_held_out_is_trained_on(training, held_out, asked):
    trained = {question(row).lower() for row in training.rows}
    assert len(asked) == len(set(asked)) >= 40
    assert not trained & {q.lower() for q in asked}
    assert not trained & {question(row).lower() for row in held_out.rows}
    assert not {question(row) for row in held_out.rows} & set(asked)


@pytest.mark.parametrize("data", ["training", "held_out"])
def test_length_is_what_separates_the_labels(data, request):
    rows = request.getfixturevalue(data).rows
    assert max(words(rows, True)) <= demo.SHORT < 2 * demo.SHORT <= min(words(rows, False))
    assert statistics.mean(words(rows, False)) > 5 * statistics.mean(words(rows, True))


def test_no_preamble_is_repeated_so_that_wordiness_itself_is_learned(training):
    openings = [" ".join(answer(row).split()[:4]) for row in training.rows if not row.label]
    assert max(openings.count(o) for o in openings) <= 2


def test_some_questions_have_both_kinds_of_answer_and_some_have_one(training):
    labels: dict[str, set] = {}
    for row in training.rows:
        labels.setdefault(question(row), set()).add(row.label)
    kinds = [frozenset(found) for found in labels.values()]
    assert all(kinds.count(frozenset(kind)) > 20 for kind in ({True}, {False}, {True, False}))


def test_rows_fit_into_the_preset(training, demo_model):
    from kto_core.models.load import load_tokenizer

    settings = resolving.resolve("demo", {"data": str(demo.DATA)}).config
    report = dataset.check(training, load_tokenizer(settings.model), settings.max_length)
    assert not report.truncated and not report.too_long
    assert settings.effective_batch_size == 8 and settings.learning_rate > 1e-5


# ---- the run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, tiny_model, monkeypatch) -> dict:
    """Overrides for a demo of seconds: a random model of two layers, 16 rows, 8 tokens an answer."""

    def first(source, name: str, count: int) -> str:
        lines = source.read_text(encoding="utf-8").splitlines()[:count]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
        return tmp_path / name

    monkeypatch.setattr(demo, "ANSWER_TOKENS", 8)
    monkeypatch.setattr(demo, "HELD_OUT", first(demo.HELD_OUT, "held.jsonl", 8))
    data = first(demo.DATA, "data.jsonl", 16)
    return {**FAST, "max_length": 512, "model": str(tiny_model), "data": str(data), "max_steps": 2}


def test_it_trains_measures_and_shows(small):
    told, made = [], []
    result = demo.run_demo(7, overrides=small, on_run=made.append, prompts=4, progress=lambda *a: told.append(a))
    assert [run.id for run in made] == [result["run"]] and made[0].state().state == "finished"
    assert (result["seed"], result["steps"]) == (7, 2) and made[0].config().config.seed == 7
    assert made[0].config().config.preset == "demo" and made[0].adapter is not None
    assert 0 < result["training_seconds"] < result["seconds"]
    for side in result["habit"].values():
        assert side["words"] >= 0 and 0 <= side["short_share"] <= 1 and 0 <= side["right_share"] <= 1
    assert set(result["habit"]) == {"before", "after"}
    assert result["margin"] != 0 and 0 <= result["auc"] <= 1 and result["kl"] >= 0
    assert len(result["samples"]) == demo.SAMPLES and {"prompt", "base", "tuned"} == set(result["samples"][0])
    json.dumps(result, allow_nan=False)
    shares = [share for share, _ in told if share is not None]
    assert shares == sorted(shares) and shares[-1] == 1.0 and any("Training: step" in text for _, text in told)


def test_the_reference_takes_most_of_the_preparation(monkeypatch):
    """Its share counts, whatever its message is called: the bar does not stand still while it is computed."""
    from kto_core.engine.reference import PHASE
    from kto_core.training import start

    said = [
        ("preparing", "Loading the model…", 0.9),
        ("preparing", f"{PHASE}: 5 of 10 answers", 0.5),
        ("finished", "", 0),
    ]
    states = iter(
        SimpleNamespace(state=s, message=m, prepared=p, terminal=s == "finished", total_steps=0) for s, m, p in said
    )
    monkeypatch.setattr(start, "start", lambda run: None)
    monkeypatch.setattr(demo, "POLL", 0)
    told = []
    demo._train(SimpleNamespace(state=lambda: next(states)), lambda *a: told.append(a), None)
    assert [round(share, 3) for share, _ in told] == [0.02, 0.02 + (demo.PREPARED - 0.02) / 2]


def test_cancelled_it_stops_the_run(small):
    cancel, made = threading.Event(), []

    def progress(share, text):
        if "Training: step" in text:
            cancel.set()

    with pytest.raises(Cancelled):
        long = small | {"max_steps": 5000}
        demo.run_demo(overrides=long, on_run=made.append, cancel=cancel, progress=progress)
    assert not made[0].alive() and made[0].state().state == "stopped"
    assert made[0].state().step < 5000 and folders.active() is None


def test_a_training_that_fails_says_why(small, tmp_path):
    with pytest.raises(KTOError) as e:
        demo.run_demo(overrides=small | {"data": str(tmp_path / "missing.jsonl")})
    assert "missing.jsonl" in str(e.value)


def test_habit_counts_words_and_an_empty_answer_is_not_a_short_one():
    long = "word " * (demo.SHORT + 1)
    given = demo.habit(["", "Lisbon.", long, "word " * demo.SHORT], [None, None, None, None])
    assert given == {"words": 8.0, "short_share": 0.5, "right_share": None}


def test_an_answer_is_right_if_it_has_one_of_the_words():
    answers = ["It is lisbon, I think.", "I know.", "No.", "14", "anything"]
    accepted = [["Lisbon"], ["no"], ["no", "not a fish"], ["4", "four"], None]
    assert demo.habit(answers, accepted)["right_share"] == 0.5


def test_stopped_by_somebody_else_it_says_so(small):
    made = []

    def progress(share, text):
        if "Training: step" in text and not (made[0].path / "stop").exists() and made[0].alive():
            made[0].stop()

    with pytest.raises(RunError, match="stopped"):
        demo.run_demo(overrides=small | {"max_steps": 5000}, on_run=made.append, progress=progress)


@pytest.mark.slow
def test_the_habit_is_learned():
    result = demo.run_demo()
    before, after = result["habit"]["before"], result["habit"]["after"]
    assert after["words"] < before["words"] / 2 and after["short_share"] > before["short_share"] + 0.3
    assert after["right_share"] >= before["right_share"] - 0.1, "it forgets what it knew"
    assert result["margin"] > 0 and result["auc"] > 0.9
    assert result["training_seconds"] < 360
    assert all(sample["tuned"] for sample in result["samples"])
