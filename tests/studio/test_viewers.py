"""Eight open pages while a training runs: a tick is quick, memory stays flat, all see the same."""

import gc
import os
import statistics
import sys
import threading
import time

import psutil
import pytest

from kto_core.runs import folders
from kto_core.runs import run as runs
from kto_core.training import start as starting
from tests.support.training import make_data, resolved, wait

VIEWERS = 8
SETTINGS = {"max_steps": 100_000, "num_train_epochs": 1, "save_steps": 50, "logging_steps": 1, "save_total_limit": 2}


@pytest.fixture
def training(tiny, tmp_path):
    """Starts a long run and ends it, whatever happens."""
    begun = []

    def begin(worker):
        run = folders.create(resolved(tiny, make_data(tmp_path / "rows.jsonl"), **SETTINGS, worker=worker))
        begun.append(run)
        starting.start(run)
        wait(lambda: run.state().step >= 3 or run.state().terminal, 200)
        return run

    yield begin
    for run in begun:
        while run.alive():
            run.stop()
            time.sleep(0.1)


def watch(run, seconds: float, pause: float) -> list[float]:
    """Seconds of each tick of eight pages, which all end at the same step."""
    import gradio as gr

    from kto_studio.shared.context import Context
    from kto_studio.train import run_side

    with gr.Blocks() as blocks:
        parts = run_side.build(Context(blocks, gr.Tabs(), gr.Timer(), *(gr.State("") for _ in range(3)))).parts
    ticks, last, errors = [], [], []
    end = time.monotonic() + seconds

    def page():
        seen, step = [None] * len(parts), 0
        try:
            while time.monotonic() < end:
                began = time.perf_counter()
                for i, part in enumerate(parts):
                    new = run_side.tick(part)(run.id, seen[i])[-1]
                    seen[i] = seen[i] if isinstance(new, dict) else new  # a dict: nothing new, all is skipped
                state = runs.Run(run.path).state()
                ticks.append(time.perf_counter() - began)
                assert state.step >= step and not state.terminal
                step = state.step
                time.sleep(pause)
            last.append(step)
        except BaseException as e:
            errors.append(e)

    pages = [threading.Thread(target=page) for _ in range(VIEWERS)]
    for thread in pages:
        thread.start()
    for thread in pages:
        thread.join()
    assert not errors, errors[0]
    assert len(last) == VIEWERS and max(last) - min(last) <= 0.2 * max(last) + 20
    return ticks


def p95(ticks) -> float:
    return statistics.quantiles(ticks, n=20)[-1]


def memory() -> float:
    gc.collect()
    return psutil.Process(os.getpid()).memory_info().rss / 2**20


@pytest.mark.parametrize("worker", ["thread", "process"])
def test_eight_viewers(training, worker):
    run = training(worker)
    watch(run, 1, 0.1)
    before = memory()
    best = min(p95(watch(run, 2, 0.1)) for _ in range(3))  # the best of three: the machine may have other work
    print(f"{worker}: p95 {1000 * best:.1f} ms, step {run.state().step}")
    grown = memory() - before
    assert best < 0.05, f"p95 of a tick {1000 * best:.0f} ms"
    assert worker == "thread" or grown < 20, f"{grown:.0f} MiB more"
    turn = sys.getswitchinterval()  # a training thread leaves the interpreter to the pages often, until it ends
    assert turn < 0.001 if worker == "thread" else turn >= 0.001
    while run.alive():
        run.stop()
        time.sleep(0.1)
    assert sys.getswitchinterval() >= 0.001


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_eight_viewers_for_ten_minutes(training, record_property):
    run = training("thread")
    watch(run, 20, 1)
    before, began = memory(), run.state().step
    ticks = watch(run, 600, 1)
    grown = memory() - before
    figures = (
        f"{len(ticks)} ticks: median {1000 * statistics.median(ticks):.1f} ms, p95 {1000 * p95(ticks):.1f} ms, "
        f"{run.state().step - began} steps, {grown:+.0f} of {before:.0f} MiB"
    )
    record_property("viewers", figures)
    print(figures)
    assert p95(ticks) < 0.05, figures
    assert grown < 0.05 * before, figures
