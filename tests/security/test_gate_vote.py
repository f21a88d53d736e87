"""The blind vote behind the gate: the owner's only, and its file, which knows the sides, is served to nobody."""

import contextlib
from types import SimpleNamespace

import httpx
import pytest

from kto_core.vote import folder
from kto_core.vote.entries import Answer
from kto_core.vote.sides import Side
from kto_studio import launch
from kto_studio.security import doors

JOIN, PREDICT = "/gradio_api/queue/join", "/gradio_api/run/predict"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The whole app, reachable from other machines, with a vote whose first pair waits."""
    monkeypatch.setenv("KTO_STUDIO_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    accounts = doors.Accounts()
    monkeypatch.setattr(doors, "Accounts", lambda: accounts)
    session = folder.create(Side("m", "r1"), Side("m"))
    session.add_prompts([[{"role": "user", "content": "Why?"}]])
    session.add_pair(1, {"a": Answer("Short."), "b": Answer("Long and winding.")})
    blocks = launch.build(public=True)
    votes = [fn._id for fn in blocks.fns.values() if "vote" in getattr(fn.fn, "__module__", "")]
    _, url, _ = blocks.launch(
        prevent_thread_lock=True, quiet=True, ssr_mode=False, server_name="127.0.0.1", run_history=False,
        show_error=False, **launch.looks(), **launch.doors(True),
    )  # fmt: skip
    yield SimpleNamespace(url=url.rstrip("/"), accounts=accounts, session=session, votes=votes)
    blocks.close()


@contextlib.contextmanager
def client(site, who: str):
    with httpx.Client(base_url=site.url, timeout=30) as one:
        if who == "owner":
            one.post("/login", data={"username": "kto", "password": site.accounts.owner}).raise_for_status()
        if who == "guest":
            one.post("/guest/login", data={"username": "guest", "password": site.accounts.guest}).raise_for_status()
        yield one


@pytest.mark.parametrize("who", ["guest", "nobody"])
def test_only_the_owner_votes_and_sees_the_vote(site, who):
    assert len(site.votes) > 8
    with client(site, who) as visitor:
        for number in site.votes:
            body = {"fn_index": number, "data": [site.session.id, 1, True], "session_hash": "x"}
            for path in (JOIN, PREDICT):
                answer = visitor.post(path, json=body)
                assert answer.status_code in (401, 403, 404), (number, path, answer.status_code)
                assert "Short." not in answer.text
        if who == "guest":
            for path in ("/guest/config", "/guest/"):
                page = visitor.get(path).text
                assert "vote-choose" not in page and "Short." not in page and site.session.id not in page
            assert visitor.get("/config").status_code in (401, 403, 404)
    assert site.session.refresh().counts().asked == 0


@pytest.mark.parametrize("who", ["owner", "guest", "nobody"])
def test_the_file_of_a_vote_is_served_to_nobody(site, who):
    with client(site, who) as visitor:
        for prefix in ("/gradio_api/file=", "/guest/gradio_api/file=", "/file="):
            answer = visitor.get(prefix + str(site.session.path))
            assert answer.status_code >= 400 and "Short." not in answer.text
