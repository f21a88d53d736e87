"""Requests that are too large or wrong: a sentence, and no trace in the terminal."""

import asyncio
import json
import socket
import time

import pytest

from kto_studio.security import gate
from tests.support.gated import JOIN, PREDICT, said


def test_large_bodies_are_refused(owner, visitor):
    def pieces(n):
        yield from (b"x" * 2**16 for _ in range(n // 2**16 + 1))

    big = b"x" * (gate.MAX_BODY + 1)
    assert owner.post(JOIN, content=big).status_code == 413
    assert owner.post(JOIN, content=pieces(gate.MAX_BODY)).status_code == 413
    assert visitor.post("/guest" + JOIN, content=pieces(gate.MAX_GUEST_BODY)).status_code == 413
    assert owner.post("/gradio_api/upload", files={"files": b"x" * (2**20 + 1)}).status_code == 413
    assert owner.request("GET", "/config", content=b"x").status_code == 413


CALLS = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"x"',
    b"NaN",
    b"\xff",
    b"[" * 100_000,
    b'{"data": ' + b"[" * 900 + b"]" * 900 + b', "fn_index": 0, "session_hash": "s"}',
    b'{"data": ' + b"[" * 100 + b"]" * 100 + b', "fn_index": 0, "session_hash": "s"}',
    *(
        json.dumps({"fn_index": 0, "data": ["a", 1], "session_hash": "s"} | change).encode()
        for change in (
            {"fn_index": 99},
            {"fn_index": None},
            {"fn_index": "x"},
            {"fn_index": -1},
            {"fn_index": 2**70},
            {"data": None},
            {"data": "x"},
            {"data": {}},
            {"data": []},
            {"data": ["a"]},
            {"data": ["a", 1, 2]},
            {"data": ["a", "no number"]},
            {"data": ["a", {}]},
            {"data": ["a", [1]]},
            {"fn_index": 1, "data": ["x"]},
            {"fn_index": 1, "data": [[1]]},
            {"fn_index": 1, "data": [[{"role": 1}]]},
            {"fn_index": 1, "data": [{"a": 1}]},
            {"fn_index": 1, "data": [[{"role": "user", "content": [{"type": "file", "file": 1}]}]]},
            {"fn_index": 2, "data": []},
            {"fn_index": 2, "data": [], "event_data": 5},
            {"fn_index": 2, "data": [], "event_data": {"x": 1}},
            {"fn_index": 3, "data": ["x"]},
            {"session_hash": 5},
            {"session_hash": ["s"]},
            {"trigger_id": "x"},
            {"event_id": "x"},
            {"batched": True, "data": [["a"], [1]]},
            {"simple_format": True},
            {"oauth_token": "x"},
        )
    ),
]


@pytest.mark.parametrize("body", CALLS, ids=range(len(CALLS)))
def test_a_wrong_call_is_a_sentence_and_no_trace(body, owner, capfd):
    answer = owner.post(PREDICT, content=body, headers={"content-type": "application/json"})
    told = answer.json()
    assert 400 <= answer.status_code < 500, told
    text = told.get("detail") or told.get("error") or "Error"
    assert isinstance(text, str) and len(text) < 200 and "\n" not in text
    assert not said(capfd)


def test_a_wrong_call_in_the_queue_leaves_no_trace(owner, capfd):
    call = {"fn_index": 4, "session_hash": "wrong", "data": [{"a": {"b": 1}}]}
    assert owner.post(JOIN, json=call).status_code == 200
    with owner.stream("GET", "/gradio_api/queue/data", params={"session_hash": "wrong"}) as events:
        told = next(line for line in events.iter_lines() if "process_completed" in line)
    assert json.loads(told[5:])["success"] in (True, False) and not said(capfd)


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/pwa_icon/192", 404),
        ("GET", "/pwa_icon/x", 404),
        ("GET", "/manifest.json", 200),
        ("GET", "/gradio_api/queue/data", 422),
        ("GET", "/gradio_api/queue/data?session_hash=nobody", 200),
        ("GET", "/gradio_api/upload_progress", 422),
        ("GET", "/assets/nothing.js", (403, 404)),
        ("GET", "/static/nothing", (403, 404)),
        ("GET", "/?deep_link=..%2f..%2fx", 200),
        ("POST", "/gradio_api/upload", 400),
        ("POST", "/gradio_api/cancel", 400),
        ("POST", "/gradio_api/reset", 400),
        ("GET", "/gradio_api/file=http:/127.0.0.1/", 403),
    ],
)
def test_a_wrong_request_leaves_no_trace(method, path, status, owner, capfd):
    answer = owner.request(method, path)
    assert answer.status_code in (status if isinstance(status, tuple) else (status,))
    if status == 422:
        assert isinstance(answer.json()["detail"], str)
    assert not said(capfd)


@pytest.mark.parametrize(
    "kind, body",
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=", b"x"),
        ("multipart/form-data; boundary=y", b"x"),
        ("multipart/form-data; boundary=y", b'--y\r\nContent-Disposition: form-data; name="files"\r\n\r\nx\r\n--y--'),
        ("multipart/form-data; boundary=y", b'--y\r\nContent-Disposition: form-data; name="files"; filename="a'),
        ("multipart/form-data; boundary=y; charset=x", b"--y--"),
    ],
)
def test_a_wrong_upload_leaves_no_trace(kind, body, owner, capfd):
    answer = owner.post("/gradio_api/upload", content=body, headers={"content-type": kind})
    assert answer.status_code < 500 and not said(capfd)


def test_an_upload_that_is_cut_or_too_large_leaves_no_trace(site, owner, capfd):
    def pieces():
        yield b'--y\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        yield from (b"x" * 2**16 for _ in range(40))

    kind = {"content-type": "multipart/form-data; boundary=y"}
    assert owner.post("/gradio_api/upload", content=pieces(), headers=kind).status_code in (400, 413)
    cookie = "; ".join(f"{c.name}={c.value}" for c in owner.cookies.jar)
    with socket.create_connection(("127.0.0.1", site.port)) as s:
        s.sendall(
            f"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\nCookie: {cookie}\r\n"
            "Content-Type: multipart/form-data; boundary=y\r\nContent-Length: 9000\r\n\r\n--y\r\n".encode()
        )
    time.sleep(0.5)
    assert not said(capfd)


def test_a_bug_is_one_line_in_the_terminal(capfd):
    from kto_studio.security.answers import MARK, Behind

    async def broken(scope, receive, send):
        raise KeyError("x")

    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(Behind(broken)({"type": "http", "method": "GET", "path": "/x", MARK: "n"}, None, send))
    assert sent[0]["status"] == 500
    (line,) = said(capfd)
    assert "KeyError in broken" in line


def test_nothing_is_served_that_did_not_pass_the_gate():
    from kto_studio.security.answers import Behind

    async def reached(scope, receive, send):
        raise AssertionError

    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(Behind(reached)({"type": "http", "method": "GET", "path": "/x"}, None, send))
    assert sent[0]["status"] == 503


def test_a_websocket_is_closed(site):
    with socket.create_connection(("127.0.0.1", site.port)) as s:
        s.sendall(
            f"GET /gradio_api/queue/data HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\nConnection: Upgrade\r\n"
            "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
        )
        assert b" 101 " not in s.recv(200)
