"""kill -9 at any moment: nothing whole is lost, and the resumed run's numbers equal those of one that nobody killed."""

import os
import random
import signal
import time

import pytest

from kto_core import files
from kto_core.runs import folders
from kto_core.training import start as starting
from tests.support.kills import MOMENTS, trainer_pid, trainings
from tests.support.training import make_data, metrics, resolved, wait

FP32 = {"dtype": "float32", "load_in_4bit": False, "logging_steps": 1, "test_size": 0.2, "num_train_epochs": 9}
QUICK = FP32 | {"max_steps": 14, "save_steps": 3, "save_total_limit": 2, "eval_steps": 5}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "rows.jsonl", rows=30)


def difference(one, other) -> float:
    """Largest difference of any metric of any step; the steps and names must agree."""
    a, b = metrics(one), metrics(other)
    assert [m["step"] for m in a] == [m["step"] for m in b]
    assert [sorted(m) for m in a] == [sorted(m) for m in b]
    assert any("eval_loss" in m for m in a) and {"loss", "kl", "grad_norm", "learning_rate"} <= set(a[0])
    return max((abs(x[k] - y[k]) for x, y in zip(a, b, strict=True) for k in x if x[k] is not None), default=0.0)


def require_whole(run) -> None:
    """Whatever the run shows can be used."""
    for folder in [*run.checkpoints(), *filter(None, [run.adapter])]:
        assert not files.problem(folder), folder


@pytest.mark.parametrize("engine", ["trl", "packed"])
def test_killed_at_every_named_moment(tiny, data, engine):
    train = trainings().run
    whole = folders.create(resolved(tiny, data, **QUICK, engine=engine))
    assert train(whole.path) == 0 and whole.state().state == "finished", whole.state().error

    run = folders.create(resolved(tiny, data, **QUICK, engine=engine))
    stopped = False
    for moment in MOMENTS:
        if moment.startswith("the adapter is moved") and not stopped:  # an adapter must be there to be replaced
            assert run.adapter is None
        before = run.state().checkpoints
        assert train(run.path, moment) == -9, f"not reached: {moment}"
        state = run.state()
        assert state.state == "interrupted", (moment, state.message)
        assert ("after step" if state.step else "before the first step") in state.message
        assert not run.alive()
        require_whole(run)
        if before:
            assert run.checkpoints(), moment
        if moment == "an old checkpoint is deleted":
            stopped = True
            assert train(run.path, "in a step", "stop") == 0
            assert run.state().state == "stopped" and run.adapter
        if stopped:
            assert run.adapter, moment
    assert train(run.path) == 0
    assert run.state().state == "finished", run.state().error
    assert difference(whole.path, run.path) <= 1e-6
    assert not [p for p in run.path.rglob("*") if p.name.endswith((".part", ".old"))]


KILLS = 32


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", ["trl", "packed"])
def test_killed_at_random_moments(tiny, data, engine, record_property):
    """The process that the app starts, killed whenever the dice say, resumed as the app does it."""
    settings = FP32 | {"max_steps": 240, "save_steps": 4, "save_total_limit": 2, "eval_steps": 25, "engine": engine}
    settings |= {"num_train_epochs": 50, "worker": "process"}
    whole = folders.create(resolved(tiny, data, **settings))
    starting.start(whole, block=True)
    assert whole.state().state == "finished", whole.state().error

    rng = random.Random(f"{engine}-20")
    run = folders.create(resolved(tiny, data, **settings))
    kills, steps, began = 0, [], time.monotonic()
    starting.start(run)
    while kills < KILLS:
        before = run.state().step
        pid = wait(lambda: trainer_pid(run))
        if before < 200 and rng.random() < 0.6:  # in a step, a save, an evaluation
            wait(lambda: run.state().step > before or run.state().terminal, 120)  # noqa: B023
            time.sleep(rng.uniform(0, 0.6))
        else:  # wherever it is by then; mostly it imports, reads, scores
            time.sleep(rng.uniform(0, 6))
        os.kill(pid, signal.SIGKILL)
        state = wait(lambda: not run.alive() and (s := run.state()).terminal and s, 30)
        kills += 1
        steps.append(state.step)
        assert state.state == "interrupted", (state.state, state.message, state.error)
        require_whole(run)
        starting.resume(run)
    state = wait(lambda: not run.alive() and (s := run.state()).terminal and s, 300)
    assert state.state == "finished" and state.step == 240, (state.message, state.error)
    largest = difference(whole.path, run.path)
    figures = f"{engine}: {kills} kills, {kills} resumes, killed after steps {steps}, largest difference {largest:g}"
    record_property("kills", figures)
    print(f"\n{figures}, {time.monotonic() - began:.0f} s")
    assert largest <= 1e-6
