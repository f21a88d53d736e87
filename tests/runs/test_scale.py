"""Thousands of runs, and a run of many steps: what is looked at does not grow with them."""

import json
import os
import sys
import time
from types import SimpleNamespace

import gradio as gr
import pytest

from kto_core.runs import event_reader, events, folders, run, run_list
from kto_studio import demo_panel
from kto_studio.shared import live, model_choices, views
from kto_studio.shared.context import Context
from kto_studio.train import curves_view, run_side
from tests.support.bad_runs import make

MANY = 300
_counted: dict[str, int] | None = None


def _hook(name: str, _) -> None:
    if _counted is not None and name in ("open", "os.scandir", "os.listdir"):
        _counted[name] = _counted.get(name, 0) + 1


sys.addaudithook(_hook)  # cannot be taken away again, only be off


@pytest.fixture
def second(monkeypatch):
    """A second of an open page: what it opened, listed and looked at."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(run_list, "BUDGET", 60)
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with gr.Blocks() as blocks, gr.Tabs() as tabs, gr.Tab("Train"):
        ctx = Context(blocks, tabs, gr.Timer(1), gr.BrowserState(""), gr.BrowserState(""), gr.State(), gr.State())
        run_side.build(ctx)
    ticks = [fn for fn, *_ in ctx.ticks]
    seen: list = [None] * len(ticks)
    look = os.stat

    def counting(*args, **kwargs):
        if _counted is not None:
            _counted["stat"] = _counted.get("stat", 0) + 1
        return look(*args, **kwargs)

    monkeypatch.setattr(os, "stat", counting)

    def pass_by(chosen: str = "") -> tuple[dict[str, int], list]:
        global _counted
        clock.now += 1
        _counted = {}
        try:
            sent = [tick(chosen, before) for tick, before in zip(ticks, seen, strict=True)]
            live.active(), model_choices.signature(), demo_panel.latest()
        finally:
            found, _counted = _counted, None
        for i, values in enumerate(sent):
            seen[i] = seen[i] if isinstance(values[-1], dict) else values[-1]
        return found, sent

    live.forget()
    yield pass_by
    live.forget()


def old(folder, i: int):
    """A run that ended long ago."""
    made = make(folder)
    os.utime(made / "config.yaml", (1.7e9 + i, 1.7e9 + i))
    return made


def settle(second) -> None:
    """Until all is read: the list's folder is not new any more, either."""
    for _ in range(3):
        second()


def test_a_second_of_an_open_page_costs_the_same_with_many_runs(second, runs_dir, monkeypatch):
    monkeypatch.setattr(run_list, "RECENT", 0, raising=False)
    old(runs_dir / "one", 0)
    settle(second)
    with_one, _ = second()
    for i in range(MANY):
        old(runs_dir / f"r{i:04d}", i + 1)
    settle(second)
    with_many, sent = second()
    assert all(v == gr.skip() for values in sent for v in values), "nothing is new"
    for what in ("open", "os.scandir", "os.listdir"):
        assert with_many.get(what, 0) <= with_one.get(what, 0) + 5, (what, with_one, with_many)
    once = 4 * (run_list.NEWEST + run_list.TURN) + run_list.NEWEST
    assert with_many["stat"] <= with_one["stat"] + once, (with_one, with_many)
    assert once < 4 * MANY / 2


def test_a_step_of_the_run_that_trains_does_not_send_the_list_again(second, runs_dir):
    from kto_core.runs import locks

    for i in range(3):
        old(runs_dir / f"r{i}", i)
    going = make(runs_dir / "going")
    log = events.EventLog(going / "events.jsonl")
    with locks.holding(going):
        log.status("training", total_steps=9)
        settle(second)
        log.metric(5, loss=0.5)
        _, sent = second("going")
        _, sent = second("going")
        log.metric(6, loss=0.5)
        _, sent = second("going")
        assert sent[0][0] == gr.skip(), "the list of runs"
        assert any("0.5" in str(v) for values in sent for v in values if isinstance(v, str)), "the tiles"
        assert live.active() == folders.find("going")


def test_while_runs_are_read_the_list_is_not_sent_at_every_look(runs_dir, monkeypatch):
    """Opened for the first time with thousands of runs: reading takes many looks, and a list of them is large."""
    for i in range(40):
        old(runs_dir / f"r{i:04d}", i + 1)
    real = run_list.brief

    def slow(r, settings):
        time.sleep(0.02)
        return real(r, settings)

    monkeypatch.setattr(run_list, "brief", slow)
    monkeypatch.setattr(run_list, "BUDGET", 0.05)
    known, seen = run_list.RunList(), []
    while not seen or any(known.brief(r) is None for r in known.runs()):
        known.look()
        seen.append(known.changes)
    assert len(seen) > 5 and len(set(seen)) <= 3, seen
    assert seen[-1] > seen[-2], "told when all are read"


def test_every_run_is_looked_at_within_its_turn(second, runs_dir):
    """A run that another program resumes is noticed, however old it is."""
    for i in range(MANY):
        old(runs_dir / f"r{i:04d}", i + 1)
    settle(second)
    oldest = folders.find("r0000")
    assert live.runs().brief(oldest).state == "finished"
    events.EventLog(oldest.path / "events.jsonl").status("failed", message="x")
    for _ in range(MANY // run_list.TURN + 2):
        second()
    assert live.runs().brief(oldest).state == "failed"
    events.EventLog(folders.find("r0299").path / "events.jsonl").status("stopped", message="x")
    second()
    assert live.runs().brief(folders.find("r0299")).state == "stopped", "one of the newest: at once"


def test_a_run_that_comes_or_goes_is_seen_at_once(second, runs_dir, monkeypatch):
    monkeypatch.setattr(run_list, "RECENT", 0)
    made = [run.Run(old(runs_dir / f"r{i}", i)) for i in range(3)]
    settle(second)
    assert [r.id for r in live.listed()] == ["r2", "r1", "r0"]
    folders.delete(made[1])
    old(runs_dir / "r7", 7)
    _, sent = second()
    assert [r.id for r in live.listed()] == ["r7", "r2", "r0"]
    assert [value for _, value in sent[0][0]["choices"]] == ["r7", "r2", "r0"]


# ---- the note of runs that have ended


@pytest.fixture
def many(runs_dir):
    for i in range(run_list.WORTH + 5):
        old(runs_dir / f"r{i:04d}", i + 1)
    return runs_dir


def looked() -> run_list.RunList:
    found = run_list.RunList()
    found.look(whole=True, patient=True)
    return found


def briefs(found: run_list.RunList) -> dict:
    return {r.id: found.brief(r) for r in found.runs()}


def test_a_second_process_reads_no_run_that_has_ended(many, monkeypatch):
    first = briefs(looked())
    assert (many / run_list.NOTE).is_file()
    read = []
    monkeypatch.setattr(run_list, "brief", lambda r, s: read.append(r))
    assert briefs(looked()) == first and read == []


def test_the_note_is_never_believed_against_the_events(many, monkeypatch):
    looked()
    events.EventLog(many / "r0003" / "events.jsonl").status("failed", message="since then")
    (many / "r0004" / "config.yaml").write_text("beta: [\n")
    found = briefs(looked())
    assert found["r0003"].state == "failed" and "YAML" in found["r0004"].problem and found["r0005"].state == "finished"


@pytest.mark.parametrize("text", [
    b"", b"{", b"[]", b"null", b'{"r0001": 1}', b"\xff", b"[" * 10**5, b'{"r0001": [[[1],[2]], [1]]}', bytes(5000),
    None, "folder", "types", "pipe",
])  # fmt: skip
def test_a_note_that_is_broken_is_not_used(many, text):
    first = briefs(looked())
    note = many / run_list.NOTE
    if text == "types":
        values = json.loads(note.read_text())
        kinds = [["finished", "x", 3, None, "m", None, None, None, "", ""], [{}] * 10, ["training", *[0] * 9], [1] * 3]
        for i, (name, value) in enumerate(sorted(values.items())):
            values[name] = [value[0], kinds[i % len(kinds)]]
        note.write_text(json.dumps(values))
    else:
        note.unlink()
        if text == "folder":
            note.mkdir()
        elif text == "pipe":
            os.mkfifo(note)
        elif text is not None:
            note.write_bytes(text)
    assert briefs(looked()) == first
    assert not list(many.glob("*.part"))


# ---- a run of many steps


ROW = {"grad_norm": 1.25, "learning_rate": 1e-6, "rewards/chosen": 0.5, "rewards/rejected": -0.5, "kl": 0.01,
       "rewards/margins": 1.0, "logps/chosen": -120.123456789, "logps/rejected": -130.123456789, "eta": 5.5,
       "logits/chosen": -1234567.123456, "logits/rejected": -1234567.123456, "epoch": 0.5}  # fmt: skip


def long_run(folder, steps: int):
    """Events with evaluations, logs, checkpoints and a resume; every kind that there is."""
    folder.mkdir(parents=True)
    with open(folder / "events.jsonl", "w") as f:

        def put(kind: str, **fields) -> None:
            put.t += 0.25
            f.write(json.dumps({"t": round(put.t, 3), "kind": kind, **fields, "clock": round(put.t - 1.6e9, 3)}) + "\n")

        put.t = 1.7e9
        put("status", state="preparing", message="Starting.", gap=True)
        put("status", state="training", message="Training.", total_steps=steps)
        for step in range(1, steps + 1):
            put("metric", step=step, loss=round(1 / step, 9), **ROW)
            if step % 50 == 0:
                put("metric", step=step, eval_loss=round(2 / step, 9), epoch=0.5)
            if step % 1000 == 0:
                put("checkpoint", step=step, path=f"checkpoints/checkpoint-{step}")
                put("log", text=f"at {step}", level="warning")
            if step == steps // 2:
                put("status", state="interrupted", message="gone")
                put("status", state="preparing", message="Starting.", gap=True)
                put("status", state="training", message="Going on.", resumed_from=step - 10)
                for again in range(step - 9, step + 1):
                    put("metric", step=again, loss=round(1 / again, 9), **ROW)
        put("status", state="finished", message="Finished.")
    return folder / "events.jsonl"


def test_a_long_run_is_sampled_and_says_the_same(runs_dir, monkeypatch):
    steps = 40_000
    file = long_run(runs_dir / "long", steps)
    assert file.stat().st_size > event_reader.BACKLOG
    whole = events.fold(events.read(file)[0])
    parsed = []
    parse = event_reader.parse
    monkeypatch.setattr(event_reader, "parse", lambda line: parsed.append(1) or parse(line))
    found = run.Run(file.parent).state()
    assert len(parsed) < steps / 2, "most rows are only counted"
    assert len(found.metrics) < events.Rows.KEPT and len(whole.metrics) < events.Rows.KEPT
    for name in ("state", "message", "step", "total_steps", "epoch", "eta", "started", "updated", "used", "error",
                 "skipped", "logs", "checkpoints"):  # fmt: skip
        assert getattr(found, name) == getattr(whole, name), name
    assert found.seconds == pytest.approx(whole.seconds) and found.metrics.total == whole.metrics.total
    assert found.told[-300:] == whole.told[-300:] and found.told.total == whole.told.total
    assert found.latest("loss") == round(1 / steps, 9) and found.latest("eval_loss") == round(2 / steps, 9)
    for state in (found, whole):
        loss = curves_view.made(state)[0]
        for metric, line in zip(("loss", "eval_loss"), loss.lines, strict=True):
            points = loss.thin(list(line.points))
            every = 50 if metric == "eval_loss" else 1
            assert points[0][0] == every and points[-1][0] == steps and 300 < len(points) <= views.POINTS
            gaps = [b - a for (a, _), (b, _) in zip(points, points[1:], strict=False)]
            assert max(gaps) < 4 * steps / views.POINTS and min(gaps) > 0, "evenly spread"
            factor = 2 if metric == "eval_loss" else 1
            assert all(value == round(factor / step, 9) for step, value in points)


def test_a_run_that_grows_keeps_a_bounded_number_of_rows(tmp_path):
    state, most = events.RunState(), 0
    for step in range(1, 60_001):
        events.fold([{"t": 1.7e9, "kind": "metric", "step": step, "loss": 1 / step}], state)
        if step % 100 == 0:
            events.fold([{"t": 1.7e9, "kind": "metric", "step": step, "eval_loss": 1 / step}], state)
        most = max(most, len(state.metrics))
    assert most <= events.Rows.KEPT and state.metrics.total == 60_600
    assert len(state.series("eval_loss")) == 600, "the few are not thinned"
    steps = [s for s, _ in state.series("loss")]
    assert steps == sorted(set(steps)) and steps[0] == 1 and steps[-900:] == list(range(59_101, 60_001))
    gaps = [b - a for a, b in zip(steps, steps[1:], strict=False)]
    assert max(gaps) <= 60_000 / 1000


def test_a_long_run_that_goes_on_is_read_from_where_it_was(runs_dir, monkeypatch):
    file = long_run(runs_dir / "long", 2000)
    found = run.Run(file.parent)
    found.state()
    read = []
    lines = event_reader.lines
    monkeypatch.setattr(event_reader, "lines", lambda *at: read.append(at[2] - at[1]) or lines(*at))
    found.state()
    assert read == []
    events.EventLog(file).log("more")
    assert found.state().logs[-1]["text"] == "more" and len(read) == 1 and read[0] < 200
    with open(file, "a") as f:
        f.write('{"t": 1, "kind": "lo')
    for _ in range(3):
        found.state()
    assert len(read) == 2, "a torn end is looked at once"


def test_many_states_do_not_stay_in_memory(runs_dir):
    for i in range(run.KEPT + 20):
        run.Run(make(runs_dir / f"r{i}")).state()
    assert len(run._folded) <= run.KEPT
    looked()
    assert len(run._folded) <= run.KEPT
