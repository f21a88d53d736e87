"""The gate: every route closed without a login, guests only chat, files only from given folders and as downloads."""

import asyncio
import json
import re
import socket
from pathlib import Path

import gradio as gr
import httpx
import pytest

from kto_studio.security import doors, paths
from tests.support.gated import JOIN, PREDICT


def _all_paths(app):
    for route in app.routes:
        path = getattr(route, "path", "")
        if path == doors.GUEST_PATH:
            yield from ((m, doors.GUEST_PATH + p) for m, p in _all_paths(route.app))
            continue
        if hasattr(route, "original_router"):  # an included router keeps its routes to itself
            yield from _all_paths(route.original_router)
            continue
        for method in getattr(route, "methods", None) or ["GET"]:
            yield method, re.sub(r"\{[^}]*\}", "0", path)


def _open(method, path):
    short = path.removeprefix(doors.GUEST_PATH) or "/"
    found = paths.find(method, short, guest=short != path)
    return found and found[0].who == paths.ANYONE


def test_every_route_is_closed_without_a_login(site, anonymous):
    tried = 0
    for method, path in _all_paths(site.app):
        if method not in ("GET", "POST") or _open(method, path):
            continue
        answer = anonymous.request(method, path, json={} if method == "POST" else None)
        assert answer.status_code in (401, 404), (method, path, answer.status_code)
        tried += 1
    assert tried > 60


def test_the_open_page_tells_nothing_but_that_a_login_is_needed(anonymous):
    page = anonymous.get("/").text.replace(" ", "")
    assert '"auth_required":true' in page and '"components":[],"dependencies":[]' in page
    assert anonymous.get("/config").status_code == 401


def test_owner_works_after_login_and_guest_calls_stay_apart(owner, visitor):
    call = {"fn_index": 0, "data": ["Ab"], "session_hash": "s1"}
    assert owner.post(PREDICT, json={**call, "data": ["Ab", 1]}).json()["data"] == ["AB"]
    assert owner.post(JOIN, json={**call, "data": ["Ab", 1]}).status_code == 200
    assert visitor.post("/guest" + JOIN, json=call).status_code == 200
    assert visitor.post(JOIN, json=call).status_code == 401, "a guest's login opens only /guest"
    assert owner.post("/guest" + JOIN, json=call).status_code == 401


def test_guest_call_answers(visitor):
    session = "abc"
    visitor.post("/guest" + JOIN, json={"fn_index": 0, "data": ["Ab"], "session_hash": session})
    with visitor.stream("GET", "/guest/gradio_api/queue/data", params={"session_hash": session}) as events:
        for line in events.iter_lines():
            if "process_completed" in line:
                assert json.loads(line[5:])["output"]["data"] == ["ab"]
                return
    raise AssertionError("no answer")


def test_guests_neither_upload_nor_fetch_files(site, visitor):
    assert visitor.post("/guest/gradio_api/upload", files={"files": b"x"}).status_code == 404
    assert visitor.get(f"/guest/gradio_api/file={site.folder}/model.gguf").status_code == 404
    assert visitor.get(f"/gradio_api/file={site.folder}/model.gguf").status_code == 401


# ---- files


def test_only_downloads_can_be_fetched(site, owner):
    assert owner.get(f"/gradio_api/file={site.folder}/model.gguf").content == b"weights"
    refused = {
        site.secret: 403,
        f"{site.folder}/link.txt": 403,
        f"{site.folder}/%2e%2e/x": 400,
        f"{site.folder}/%2e%2e/private0/secret.txt": 400,
        "/etc/passwd": 403,
        "http://127.0.0.1/": 400,
        "etc/passwd": 403,
        str(site.folder): 403,
    }
    for path, status in refused.items():
        answer = owner.get(f"/gradio_api/file={path}")
        assert answer.status_code == status and b"not for you" not in answer.content, path


@pytest.mark.parametrize("mode", ["public", "local"])
def test_a_file_is_a_download_and_never_a_page(mode, site, local_site, owner):
    place, client = (site, owner) if mode == "public" else (local_site, httpx.Client(base_url=local_site.url))
    for name in ["page.html", "icon.svg"] if mode == "public" else ["page.html"]:
        for method in ("GET", "HEAD"):
            headers = client.request(method, f"/gradio_api/file={place.folder}/{name}").headers
            assert headers["content-disposition"].startswith("attachment")
            assert "sandbox" in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["content-type"] == "application/octet-stream"


def test_an_uploaded_file_comes_back_as_a_download(owner):
    path = owner.post("/gradio_api/upload", files={"files": ("a b.html", b"<script>")}).json()[0]
    answer = owner.get(f"/gradio_api/file={path}")
    assert answer.content == b"<script>" and answer.headers["content-disposition"].startswith("attachment")


def test_parts_of_a_file(site, owner):
    path = f"/gradio_api/file={site.folder}/model.gguf"
    part = owner.get(path, headers={"Range": "bytes=1-3"})
    assert (part.status_code, part.content) == (206, b"eig")
    assert not {"cookie", "host", "user-agent"} & set(part.headers), "a request's headers come back"
    for wrong in (
        "bytes=0-1,3-4",
        "bytes=9-2",
        "bytes=99-",
        "bytes=²-3",
        "bytes=a-b",
        "bytes=-",
        "lines=1-2",
        "bytes=",
    ):
        status = owner.get(path, headers={"Range": wrong.encode()}).status_code
        assert status in (200, 400, 416), (wrong, status)
    assert owner.get(path, headers={"Range": "bytes=0-1,3-4"}).status_code == 416


# ---- a guest reads no file


def named(path, **more):
    file = {"path": str(path), "meta": {"_type": "gradio.FileData"}, **more}
    return [{"role": "user", "content": [{"type": "file", "file": file}]}]


def in_cache(site):
    from gradio.utils import get_upload_folder

    return list(Path(get_upload_folder()).rglob(site.secret.name))


def test_a_file_that_a_message_names_is_not_copied(site, owner, visitor):
    for client, path, fn in ((visitor, "/guest" + PREDICT, 1), (owner, PREDICT, 1)):
        for file in (site.secret, "/etc/hostname", "http://127.0.0.1:9/x", "https://example.com/x"):
            call = {"fn_index": fn, "session_hash": "s", "data": [named(file)]}
            answer = client.post(path, json=call)
            assert answer.status_code == 400 and "file" in answer.json()["detail"]
    assert not in_cache(site)


@pytest.mark.parametrize("who", ["owner", "guest"])
def test_gradio_itself_refuses_a_file_that_a_message_names(who, site):
    """The second lock, behind the gate's own: Gradio checks the files of pages that count as launched only."""
    from gradio.context import LocalContext
    from gradio.exceptions import Error

    blocks = {"owner": site.owner, "guest": site.guest}[who]
    assert blocks.has_launched

    async def call():
        LocalContext.blocks.set(blocks)
        return await blocks.preprocess_data(blocks.fns[1], [named(site.secret)], None)

    with pytest.raises(Error, match="InvalidPathError"):
        asyncio.run(call())
    assert not in_cache(site)


def test_the_guests_page_takes_text_only():
    from kto_studio.chat import guest

    talk = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": "Yes?"}]
    assert guest._ask("And?", talk)[1][:2] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
    ]
    _, kept, shown, _ = guest._ask("x", named("/etc/hostname"))
    assert kept == [{"role": "user", "content": "x"}] and "hostname" not in repr(shown)
    assert guest._kept(named("/etc/hostname")) == ([], False)


def test_a_path_that_can_be_read_in_two_ways_is_refused(site, owner, visitor):
    """Gradio's router and a list of forbidden paths read these differently."""
    file = f"{site.folder}/model.gguf"
    for path in (
        f"/guest//gradio_api/file={file}%0a",
        f"/guest//gradio_api/file={file}",
        "/guest//gradio_api/upload%0a",
        "/guest//gradio_api/token%0a",
        "/guest/gradio_api/openapi.json%0a",
        "/guest/%0agradio_api/token",
    ):
        assert visitor.get(path).status_code == 400, path
    for path in (
        "/gradio_api/token%0a",
        "/gradio_api%5ctoken",
        "/gradio_api/%2e%2e/config",
        "/%2fconfig",
        "/config%00",
    ):
        assert owner.get(path).status_code == 400, path
    for path in ("/gradio_api/token", "/guest/gradio_api/token", "/gradio_api/info", "/gradio_api/vibe-edit", "/docs"):
        assert owner.get(path).status_code == visitor.get(path).status_code == 404, path


def test_passwords_are_long_and_new_every_time():
    a, b = doors.Accounts(), doors.Accounts()
    assert len({a.owner, a.guest, b.owner, b.guest}) == 4 and min(map(len, (a.owner, a.guest))) >= 16
    assert a.owner_login("kto", a.owner) and not a.owner_login("guest", a.owner) and not a.owner_login("kto", "ü")
    assert a.guest_login("guest", a.guest) and not a.guest_login("guest", a.owner)


# ---- the real page, as `ui.launch` serves it to other machines


@pytest.fixture(scope="module")
def real_site(tmp_path_factory):
    """The whole app behind its doors; not `launch` itself, which also waits and opens a tunnel."""
    import os
    from types import SimpleNamespace

    from kto_studio import launch

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
            if method not in ("GET", "POST") or _open(method, path):
                continue
            answer = client.request(method, path, json={} if method == "POST" else None)
            assert answer.status_code in (401, 404), (method, path, answer.status_code)
            tried += 1
        for page in ("/", "/guest/"):
            text = client.get(page).text.replace(" ", "")
            assert '"auth_required":true' in text and "data-table" not in text and "guest-talk" not in text
    assert tried > 60


def test_the_guest_page_only_chats():
    from kto_studio.chat import guest

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
    from kto_studio import launch

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
        assert httpx.post(url + "login", data={"username": "a", "password": "b"}).status_code == 404
    finally:
        page.close()
    assert set(launch.LOCAL) == {"127.0.0.1", "localhost", "::1"}
    port = launch.free_port("127.0.0.1", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            launch.free_port("127.0.0.1", taken.getsockname()[1])
    assert port >= launch.FIRST_PORT
