"""The gate: every route closed without a login, guests only chat, logins limited, files only from given folders."""

import json
import re
import socket
import time
from types import SimpleNamespace

import gradio as gr
import httpx
import pytest

from ui import security


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A small app behind the gate, as `ui.launch` puts it: owner page, guest page, one folder of downloads."""
    folder = tmp_path_factory.mktemp("downloads")
    (folder / "model.gguf").write_bytes(b"weights")
    secret = tmp_path_factory.mktemp("private") / "secret.txt"
    secret.write_text("not for you")
    (folder / "link.txt").symlink_to(secret)
    accounts = security.Accounts()
    with gr.Blocks() as owner:
        box = gr.Textbox()
        gr.Button().click(lambda x: x.upper(), box, box)
    with gr.Blocks() as guest:
        box = gr.Textbox()
        gr.Button().click(lambda x: x.lower(), box, box)
    gr.set_static_paths([folder])
    kwargs = security.app_kwargs({"folders": [folder], "max_upload": 2**20}, guest, accounts=accounts)
    app, url, _ = owner.launch(
        auth=accounts.owner_login,
        app_kwargs=kwargs,
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        server_name="127.0.0.1",
        run_history=False,
        show_error=False,
    )
    yield SimpleNamespace(url=url.rstrip("/"), app=app, accounts=accounts, folder=folder, secret=secret)
    owner.close()


@pytest.fixture
def anonymous(site):
    with httpx.Client(base_url=site.url) as client:
        yield client


@pytest.fixture
def owner(site):
    with httpx.Client(base_url=site.url) as client:
        _unlimited(site)
        assert client.post("/login", data={"username": "kto", "password": site.accounts.owner}).status_code == 200
        yield client


@pytest.fixture
def visitor(site):
    with httpx.Client(base_url=site.url) as client:
        _unlimited(site)
        answer = client.post("/guest/login", data={"username": "guest", "password": site.accounts.guest})
        assert answer.status_code == 200
        yield client


def _unlimited(site):
    gate = site.app.middleware_stack
    while not isinstance(gate, security.Gate):
        gate = gate.app
    gate.limit = security.LoginLimit()
    return gate


def _all_paths(app):
    for route in app.routes:
        path = getattr(route, "path", "")
        if path == security.GUEST_PATH:
            yield from ((m, security.GUEST_PATH + p) for m, p in _all_paths(route.app))
            continue
        if hasattr(route, "original_router"):  # an included router keeps its routes to itself
            yield from _all_paths(route.original_router)
            continue
        for method in getattr(route, "methods", None) or ["GET"]:
            yield method, re.sub(r"\{[^}]*\}", "0", path)


def test_every_route_is_closed_without_a_login(site, anonymous):
    tried = 0
    for method, path in _all_paths(site.app):
        if method not in ("GET", "POST"):
            continue
        short = path.removeprefix(security.GUEST_PATH) or "/"
        if security.OPEN.fullmatch(short):
            continue
        answer = anonymous.request(method, path, json={} if method == "POST" else None)
        assert answer.status_code in (401, 404), (method, path, answer.status_code)
        tried += 1
    assert tried > 60


def test_the_open_page_tells_nothing_but_that_a_login_is_needed(anonymous):
    page = anonymous.get("/").text.replace(" ", "")
    assert '"auth_required":true' in page and '"components":[],"dependencies":[]' in page
    assert anonymous.get("/gradio_api/login_check").status_code == 401


def test_owner_works_after_login_and_guest_calls_stay_apart(owner, visitor):
    call = {"fn_index": 0, "data": ["Ab"], "session_hash": "s1"}
    assert owner.post("/gradio_api/run/predict", json=call).status_code in (200, 500)  # through the gate
    assert owner.post("/gradio_api/queue/join", json=call).status_code == 200
    assert visitor.post("/guest/gradio_api/queue/join", json=call).status_code == 200
    assert visitor.post("/gradio_api/queue/join", json=call).status_code == 401, "a guest's login opens only /guest"
    assert owner.post("/guest/gradio_api/queue/join", json=call).status_code == 401


def test_guest_call_answers(visitor):
    session = "abc"
    visitor.post("/guest/gradio_api/queue/join", json={"fn_index": 0, "data": ["Ab"], "session_hash": session})
    with visitor.stream("GET", "/guest/gradio_api/queue/data", params={"session_hash": session}) as events:
        for line in events.iter_lines():
            if "process_completed" in line:
                assert json.loads(line[5:])["output"]["data"] == ["ab"]
                return
    raise AssertionError("no answer")


def test_guests_neither_upload_nor_fetch_files(site, visitor):
    assert visitor.post("/guest/gradio_api/upload", files={"files": b"x"}).status_code == 403
    assert visitor.get(f"/guest/gradio_api/file={site.folder}/model.gguf").status_code == 403
    assert visitor.get(f"/gradio_api/file={site.folder}/model.gguf").status_code == 401


def test_only_downloads_can_be_fetched(site, owner):
    assert owner.get(f"/gradio_api/file={site.folder}/model.gguf").content == b"weights"
    for path in (
        site.secret,
        f"{site.folder}/link.txt",
        f"{site.folder}/../private0/secret.txt",
        "/etc/passwd",
        f"{site.folder}/%2e%2e/x",
        "http://127.0.0.1/",
        str(site.folder),
    ):
        answer = owner.get(f"/gradio_api/file={path}")
        assert answer.status_code == 403 and b"not for you" not in answer.content, path


def test_failed_logins_are_limited_and_age(site, anonymous):
    _unlimited(site)
    wrong = {"username": "kto", "password": "x"}
    codes = [anonymous.post("/login", data=wrong).status_code for _ in range(security.MAX_FAILURES + 2)]
    assert codes == [400] * security.MAX_FAILURES + [429, 429]
    right = {"username": "kto", "password": site.accounts.owner}
    refused = anonymous.post("/login", data=right)
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
    gate = _unlimited(site)
    assert anonymous.post("/login", data=right).status_code == 200
    for i in range(security.MAX_FAILURES):
        gate.limit.tried("9.9.9.9", now=i)
    assert gate.limit.wait("9.9.9.9", now=10) > 0
    assert gate.limit.wait("9.9.9.9", now=security.WINDOW + 10) == 0
    assert gate.limit.wait("8.8.8.8", now=10) == 0


def test_guesses_that_come_together_or_between_guest_logins_are_limited_too(site):
    import concurrent.futures

    _unlimited(site)
    wrong = {"username": "kto", "password": "x"}
    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        codes = list(pool.map(lambda _: httpx.post(site.url + "/login", data=wrong).status_code, range(30)))
    assert codes.count(400) <= security.MAX_FAILURES and codes.count(429) == 30 - codes.count(400)
    guest = {"username": "guest", "password": site.accounts.guest}
    assert httpx.post(site.url + "/guest/login", data=guest).status_code == 200
    assert httpx.post(site.url + "/login", data=wrong).status_code == 429


def test_a_page_of_another_site_has_no_login(site, owner):
    """A browser sends along the cookie that is not SameSite only when another site's page asks."""
    names = {c.name: c.value for c in owner.cookies.jar}
    strict = next(name for name in names if "unsecure" in name)
    loose = strict.replace("-unsecure", "")
    for path in ("/config", f"/gradio_api/file={site.folder}/model.gguf"):
        assert httpx.get(site.url + path, cookies={loose: names[strict]}).status_code == 401
        assert httpx.get(site.url + path, cookies={strict: names[strict]}).status_code == 200


def test_many_addresses_together_are_limited_too():
    limit, now = security.LoginLimit(), time.monotonic()
    for i in range(security.MAX_FAILURES_ALL):
        limit.tried(f"10.0.0.{i}", now)
    assert limit.wait("1.2.3.4", now) > 0


def test_large_bodies_are_refused(owner):
    big = b"x" * (security.MAX_BODY + 1)
    assert owner.post("/gradio_api/queue/join", content=big).status_code == 413
    assert owner.post("/gradio_api/upload", files={"files": b"x" * (2**20 + 1)}).status_code == 413


def test_passwords_are_long_and_new_every_time():
    a, b = security.Accounts(), security.Accounts()
    assert len({a.owner, a.guest, b.owner, b.guest}) == 4 and min(map(len, (a.owner, a.guest))) >= 16
    assert a.owner_login("kto", a.owner) and not a.owner_login("guest", a.owner) and not a.owner_login("kto", "ü")
    assert a.guest_login("guest", a.guest) and not a.guest_login("guest", a.owner)


# ---- the real page, as `ui.launch` serves it to other machines


@pytest.fixture(scope="module")
def real_site(tmp_path_factory):
    """The whole app behind its doors; not `launch` itself, which also waits and opens a tunnel."""
    import os

    from ui import launch

    home = tmp_path_factory.mktemp("real")
    former = {name: os.environ.get(name) for name in ("KTO_STUDIO_RUNS", "KTO_STUDIO_DATA")}
    os.environ |= {"KTO_STUDIO_RUNS": str(home / "runs"), "KTO_STUDIO_DATA": str(home / "data")}
    blocks = launch.build(public=True)
    app, url, _ = blocks.launch(
        prevent_thread_lock=True, quiet=True, ssr_mode=False, server_name="127.0.0.1", run_history=False,
        show_error=False, **launch.looks(), **launch.doors(True),
    )  # fmt: skip
    yield SimpleNamespace(url=url.rstrip("/"), app=app)
    blocks.close()
    for name, value in former.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def test_every_route_of_the_real_page_is_closed_without_a_login(real_site):
    tried = 0
    with httpx.Client(base_url=real_site.url) as client:
        for method, path in _all_paths(real_site.app):
            short = path.removeprefix(security.GUEST_PATH) or "/"
            if method not in ("GET", "POST") or security.OPEN.fullmatch(short):
                continue
            answer = client.request(method, path, json={} if method == "POST" else None)
            assert answer.status_code in (401, 404), (method, path, answer.status_code)
            tried += 1
        for page in ("/", "/guest/"):
            text = client.get(page).text.replace(" ", "")
            assert '"auth_required":true' in text and "data-table" not in text and "guest-talk" not in text
    assert tried > 60


def test_the_guest_page_only_chats():
    from ui import guest

    page = guest.build().get_config_file()
    kinds = {c["type"] for c in page["components"]}
    assert "chatbot" in kinds and not kinds & {
        "file",
        "uploadbutton",
        "downloadbutton",
        "dataframe",
        "dropdown",
        "tabs",
    }
    assert all(fn["api_visibility"] == "private" for fn in page["dependencies"])


def test_on_this_machine_only_there_is_no_password_and_nobody_else_gets_in():
    from ui import launch

    assert "auth" not in launch.doors(False)
    with gr.Blocks() as page:
        gr.Textbox()
    _, url, _ = page.launch(
        prevent_thread_lock=True, quiet=True, ssr_mode=False, server_name="127.0.0.1", **launch.doors(False)
    )
    try:
        port, files = url.rstrip("/").rpartition(":")[2], {"files": b"x"}
        for host in ("127.0.0.1", "localhost", "[::1]"):
            headers = {"Host": f"{host}:{port}", "Origin": f"http://{host}:{port}"}
            assert httpx.get(url, headers=headers).status_code == 200
            assert httpx.get(url + "config", headers={"Host": headers["Host"]}).status_code == 200
        for headers in (
            {"Host": f"evil.example:{port}"},  # a name that was given this machine's address
            {"Origin": "https://evil.example"},
            {"Origin": "http://127.0.0.1.evil.example"},
            {"Origin": "null"},
        ):
            assert httpx.get(url + "config", headers=headers).status_code == 403
            assert httpx.post(url + "gradio_api/upload", files=files, headers=headers).status_code == 403
        assert "img-src 'self'" in httpx.get(url).headers["content-security-policy"]
    finally:
        page.close()
    assert set(launch.LOCAL) == {"127.0.0.1", "localhost", "::1"}
    port = launch.free_port("127.0.0.1", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="taken"):
            launch.free_port("127.0.0.1", taken.getsockname()[1])
    assert port >= launch.FIRST_PORT
