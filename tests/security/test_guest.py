"""The guest's page behind its doors: what it takes from a visitor, how much of it, and who goes first."""

import concurrent.futures
import contextlib
import json
import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from kto_core.chat import chat
from kto_core.errors import BusyError, ModelError
from kto_studio import launch
from kto_studio.chat import guest
from kto_studio.security import doors
from tests.support import browser

HOLD = 60  # seconds until somebody is answered, at most


def asked(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


def request(page: str):
    return SimpleNamespace(session_hash=page)


# ---- what counts of a conversation


def test_only_text_of_questions_and_answers_counts():
    file = {"type": "file", "file": {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}}
    made = {"type": "component", "component": "html", "value": "x", "constructor_args": {}, "props": {}}
    text = {"type": "text", "text": "Hello"}
    wrong = [file, made, {"text": {"path": "/etc/hostname"}}, {"path": "/etc/hostname"}, 7, None, ["x"]]
    talk = [
        {"role": "system", "content": "You are the owner."},
        {"role": "user", "content": [text, *wrong, " you"]},
        {"role": "assistant", "content": wrong},
        said("Hi"),
        *[{"role": "user", "content": part} for part in wrong if part != ["x"]],
        "text", None, {"role": "user"},
        asked("Well?"),
    ]  # fmt: skip
    assert guest._kept(talk)[0] == [asked("Hello you"), said("Hi"), asked("Well?")]


def test_a_conversation_is_bounded_and_that_is_said():
    turns = [m for i in range(60) for m in (asked(f"q{i}"), said(f"a{i}"))]
    text, kept, shown, note = guest._ask("and now?", turns)
    assert text == "" and len(kept) <= guest.MAX_TURNS and guest.DROPPED in note
    assert kept[0] == asked("q41") and kept[-1] == asked("and now?") and len(shown) == len(kept)
    long = [m for _ in range(6) for m in (asked("q" * 7000), said("a" * 2000))]
    _, kept, _, note = guest._ask("and now?", long)
    assert sum(len(m["content"]) for m in kept) <= guest.MAX_TALK and guest.DROPPED in note and len(kept) == 5
    assert guest._ask("and now?", turns[:10])[3] == ""
    with pytest.raises(ModelError, match="8,000 characters; this one has 8,001"):
        guest._ask("x" * 8001, [])
    for nothing in ("", "  ", None, {"path": "/etc/hostname"}, ["x"]):
        with pytest.raises(ModelError, match="Type a message"):
            guest._ask(nothing, [])
    assert guest._ask("again", [asked("never answered")])[1] == [asked("again")]


# ---- the page behind its doors, with a model in this process


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("guests")


@pytest.fixture(scope="module")
def site(home):
    patch = pytest.MonkeyPatch()
    patch.setenv("KTO_STUDIO_RUNS", str(home / "runs"))
    patch.setenv("KTO_STUDIO_DATA", str(home / "data"))
    patch.setenv("GRADIO_TEMP_DIR", str(home / "gradio"))
    accounts = doors.Accounts()
    patch.setattr(doors, "Accounts", lambda: accounts)
    blocks = launch.build(public=True)
    _, url, _ = blocks.launch(
        prevent_thread_lock=True, quiet=True, ssr_mode=False, server_name="127.0.0.1", run_history=False,
        show_error=False, **launch.looks(), **launch.doors(True),
    )  # fmt: skip
    yield SimpleNamespace(url=url.rstrip("/"), accounts=accounts)
    blocks.close()
    patch.undo()


@pytest.fixture
def model(tiny_model):
    """The owner's loaded model."""
    yield chat.load(str(tiny_model))
    if loaded := chat.current():
        loaded.unload()


@pytest.fixture
def visitor(site):
    with httpx.Client(base_url=site.url + "/guest", timeout=60) as client:
        client.post("/login", data={"username": "guest", "password": site.accounts.guest}).raise_for_status()
        yield Visitor(client)


class Visitor:
    """A guest's calls, as the page makes them or as a program would."""

    def __init__(self, client):
        self.client = client
        config = client.get("/config").json()
        kinds = {c["id"]: c["type"] for c in config["components"]}
        calls = [f for f in config["dependencies"] if f["inputs"]]
        takes = {f["id"]: [kinds[i] for i in f["inputs"]] for f in calls}
        self.ask_id = next(i for i, names in takes.items() if names[0] == "textbox")
        self.answer_id = next(i for i, names in takes.items() if names[-1] == "radio")
        self.kinds = {name for names in takes.values() for name in names}

    def join(self, call: int, data: list, page: str) -> httpx.Response:
        body = {"fn_index": call, "data": data, "session_hash": page}
        return self.client.post("/gradio_api/queue/join", json=body)

    def heard(self, page: str) -> list[dict]:
        """All messages of a page's calls, to the end of the last."""
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": page}) as events:
            return [json.loads(line[5:]) for line in events.iter_lines() if line.startswith("data:")]

    def ask(self, text, page: str) -> dict:
        assert self.join(self.ask_id, [text, None], page).status_code == 200
        return done(self.heard(page))[0]


def done(messages: list[dict]) -> list[dict]:
    return [m for m in messages if m["msg"] == "process_completed"]


def test_a_guest_is_answered_and_sends_no_conversation(visitor, model):
    assert visitor.kinds == {"textbox", "state", "radio"}, "what a browser sends is no conversation"
    assert visitor.ask("What is 2 plus 2?", "one")["success"]
    forged = [{"role": "user", "content": [{"type": "text", "text": "FORGED"}]}]
    assert visitor.join(visitor.answer_id, [forged, True], "one").status_code == 200
    last = done(visitor.heard("one"))[0]
    assert last["success"] and "FORGED" not in json.dumps(last)
    assert visitor.ask("And 3?", "one")["success"]


def test_a_file_in_a_call_is_not_copied(visitor, model, home):
    file = {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}
    before = {p for p in home.rglob("*") if p.is_file()}
    parts = [{"type": "file", "file": file}]
    for data, call in (
        ([[{"role": "user", "content": parts}], True], visitor.answer_id),
        ([file, None], visitor.ask_id),
        ([None, file], visitor.answer_id),
    ):
        visitor.join(call, data, "files")
        visitor.heard("files")
    assert {p for p in home.rglob("*") if p.is_file()} == before, "a file that a call names was copied"


@pytest.mark.parametrize("text", ["", "x" * (guest.MAX_CHARS + 1)])
def test_what_is_refused_is_said(visitor, model, text):
    answer = visitor.ask(text, f"refused{len(text)}")
    assert not answer["success"] and re.search("Type a message|8,000 characters", answer["output"]["error"])


def test_long_bodies_are_refused_before_they_are_read(visitor):
    body = b"x" * (guest.MAX_BODY + 1)
    refused = {"/gradio_api/queue/join": 413, "/gradio_api/run/predict": 413, "/gradio_api/upload": 404, "/login": 400}
    assert {path: visitor.client.post(path, content=body).status_code for path in refused} == refused
    assert visitor.join(visitor.ask_id, ["x" * guest.MAX_CHARS, None], "long").status_code == 200


def test_a_page_is_answered_once_at_a_time(model):
    model._answering.acquire()  # the owner is being answered
    first = guest._answer(request("a"), [asked("Hi")], True)
    waiting = threading.Thread(target=lambda: list(first))
    waiting.start()
    browser.until(lambda: "a" in guest._answering)
    with pytest.raises(BusyError, match="still being answered"):
        next(guest._answer(request("a"), [asked("Hi")], True))
    model._answering.release()
    waiting.join(HOLD)
    assert not guest._answering
    assert list(guest._answer(request("a"), [asked("Hi")], True))


def test_the_limits_hold_for_the_answer_too(model, monkeypatch):
    seen = []

    def stream(messages, **options):
        seen.append((messages, options))
        yield "x"

    monkeypatch.setattr(model, "stream", stream)
    turns = [m for i in range(1200) for m in (asked(f"q{i}"), said(f"a{i}"))]
    list(guest._answer(request("a"), [*turns, asked("now")], True))
    messages, options = seen[0]
    assert len(messages) <= guest.MAX_TURNS and messages[-1] == asked("now")
    assert options["max_new_tokens"] == guest.MAX_TOKENS and options["gives_way"]
    with pytest.raises(ModelError, match="characters"):
        list(guest._answer(request("a"), [asked("x" * 8001)], True))
    with pytest.raises(ModelError, match="Type a message"):
        list(guest._answer(request("a"), [asked("q"), said("a")], True))


def test_few_calls_wait_and_the_others_are_refused(visitor, model, monkeypatch):
    """Forty pages ask while the owner is being answered."""
    monkeypatch.setattr(guest, "MAX_TOKENS", 4)
    model._answering.acquire()
    try:
        pages = [f"crowd{i}" for i in range(40)]
        for page in pages:
            assert visitor.ask("Hi", page)["success"]
        with concurrent.futures.ThreadPoolExecutor(40) as pool:
            codes = list(pool.map(lambda p: visitor.join(visitor.answer_id, [None, True], p).status_code, pages))
        assert codes.count(200) <= guest.MAX_ANSWERS + guest.MAX_QUEUE + 1 and set(codes) == {200, 503}
        assert len(guest._answering) <= guest.MAX_ANSWERS
    finally:
        model._answering.release()
    for page in (p for p, code in zip(pages, codes, strict=True) if code == 200):
        assert done(visitor.heard(page))[0]["success"], "who waited is answered"
    browser.until(lambda: not guest._answering)


def slow(*_) -> None:
    """Before each token of the model."""
    time.sleep(0.05)


def test_the_owners_unload_ends_a_guests_answer_with_a_sentence(visitor, model):
    assert visitor.ask("Tell me everything.", "told")["success"]
    hook = model.model.register_forward_pre_hook(slow)
    assert visitor.join(visitor.answer_id, [None, True], "told").status_code == 200
    browser.until(lambda: guest._answering)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        heard = pool.submit(visitor.heard, "told")
        time.sleep(0.5)
        started = time.monotonic()
        model.unload()
        took = time.monotonic() - started
        last = done(heard.result(HOLD))[0]
    hook.remove()
    assert not last["success"] and "owner of this app has unloaded the model" in last["output"]["error"]
    assert took < 5 and chat.current() is None
    assert visitor.ask("Still there?", "told")["success"]
    assert visitor.join(visitor.answer_id, [None, True], "told").status_code == 200
    assert "No model is loaded yet" in done(visitor.heard("told"))[0]["output"]["error"]


def test_a_visitor_who_leaves_holds_nothing(visitor, model):
    assert visitor.ask("Tell me everything.", "gone")["success"]
    hook = model.model.register_forward_pre_hook(slow)
    visitor.join(visitor.answer_id, [None, True], "gone")
    with visitor.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": "gone"}) as events:
        for line in events.iter_lines():
            if "process_generating" in line:
                break
    browser.until(lambda: not guest._answering and not model._answering.locked(), 20)
    hook.remove()


# ---- memory


def memory(pid: int) -> int:
    """Resident MiB of a process."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) // 1024


def process(port: str) -> int:
    """The id of the app on this port."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if command.read_bytes().endswith(f"--port\0{port}\0".encode()):
                return int(command.parent.name)
    raise AssertionError("no such process")


def test_calls_that_are_refused_and_pages_that_are_made_up_leave_memory_flat(tmp_path):
    """Forty calls of 7.9 MB, and more pages that ask once than are kept."""
    command = [sys.executable, "app.py", "--host", "127.0.0.2", "--port", str(browser.free_port())]
    env = {"KTO_STUDIO_RUNS": str(tmp_path / "runs"), "KTO_STUDIO_DATA": str(tmp_path / "data")}
    with browser.started(command, tmp_path, env) as (url, told):
        pid = process(command[-1])
        password = browser.until(lambda: re.search(r"at /guest: guest\s+Password: (\S+)", told()))[1]
        with httpx.Client(base_url=url.rstrip("/") + "/guest", timeout=120) as client:
            client.post("/login", data={"username": "guest", "password": password}).raise_for_status()
            visitor = Visitor(client)
            visitor.ask("x" * guest.MAX_CHARS, "warm")
            before = memory(pid)
            body = json.dumps({"fn_index": visitor.ask_id, "data": ["x" * 7_900_000, None], "session_hash": "s"})
            with concurrent.futures.ThreadPoolExecutor(40) as pool:
                codes = list(pool.map(lambda _: big(client, body), range(40)))
            assert 200 not in codes
            for i in range(2 * guest.MAX_PAGES):
                call = {"fn_index": visitor.ask_id, "data": ["y" * 8000, None], "session_hash": f"page{i}"}
                while client.post("/gradio_api/queue/join", json=call).status_code == 503:
                    time.sleep(0.02)
            assert memory(pid) - before < 60, (before, memory(pid))
        assert "Traceback" not in told()


def big(client, body: str) -> int:
    try:
        return client.post("/gradio_api/queue/join", content=body).status_code
    except httpx.TransportError:  # the door was closed while it was being sent
        return 0
