import json
import subprocess
import sys
import threading

from kto_core.runs.events import EventLog, RunState, fold, read, thin


def test_append_read_and_go_on_from_an_offset(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.status("preparing")
    log.metric(1, loss=0.5, kl=float("nan"))
    events, offset = read(log.path)
    assert [e["kind"] for e in events] == ["status", "metric"]
    assert events[1]["loss"] == 0.5 and events[1]["kl"] is None
    log.log("hello")
    more, offset2 = read(log.path, offset)
    assert [e["text"] for e in more] == ["hello"] and offset2 > offset
    assert read(tmp_path / "none.jsonl") == ([], 0)


def test_a_torn_line_is_left_and_the_next_writer_starts_a_fresh_line(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.log("whole")
    with open(log.path, "ab") as f:
        f.write(b'{"t": 1, "kind": "lo')
    events, offset = read(log.path)
    assert [e["text"] for e in events] == ["whole"]
    log.log("after")
    assert [e["text"] for e in read(log.path, offset)[0]] == ["after"]


def test_many_threads_write_whole_lines(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    threads = [threading.Thread(target=lambda i=i: [log.log(f"{i}:{k}" * 50) for k in range(50)]) for i in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(log.path.read_text().splitlines()) == 400
    assert all(json.loads(line) for line in log.path.read_text().splitlines())


def test_fold(tmp_path):
    state = fold(
        [
            {"t": 1, "kind": "status", "state": "preparing"},
            {"t": 2, "kind": "status", "state": "training", "total_steps": 10},
            {"t": 3, "kind": "metric", "step": 1, "loss": 0.5, "eta": 9},
            {"t": 4, "kind": "metric", "step": 2, "loss": 0.4, "eta": 8},
            {"t": 5, "kind": "checkpoint", "step": 2, "path": "checkpoints/checkpoint-2"},
            {"t": 6, "kind": "metric", "step": 3, "loss": 0.3},
            {"t": 7, "kind": "error", "message": "boom"},
            {"t": 7, "kind": "status", "state": "failed"},
        ]
    )
    assert (state.state, state.terminal, state.step, state.total_steps, state.error) == ("failed", True, 3, 10, "boom")
    assert state.series("loss") == [(1, 0.5), (2, 0.4), (3, 0.3)] and state.latest("loss") == 0.3
    fold([{"t": 8, "kind": "status", "state": "training", "resumed_from": 2}], state)
    assert state.series("loss") == [(1, 0.5), (2, 0.4)] and state.step == 2 and state.error == ""
    assert RunState().latest("loss") is None
    fold([{"t": 9, "kind": "used", "engine": "packed"}, {"t": 10, "kind": "used", "engine": "trl"}], state)
    assert state.used["engine"] == "trl" and RunState().used == {}


def test_thin_keeps_the_ends():
    assert thin(list(range(10_000)), 400)[0] == 0 and thin(list(range(10_000)), 400)[-1] == 9_999
    assert len(thin(list(range(10_000)), 400)) == 400 and thin([1, 2], 400) == [1, 2]


def test_events_need_only_the_standard_library():
    code = (
        "import sys; import kto_core.runs.events; print([m for m in sys.modules if m in ('torch','numpy','pydantic')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
