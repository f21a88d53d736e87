"""Small apps behind the gate, as `kto_studio.launch` puts it, and who visits them: fixtures of the gate's tests."""

import contextlib
import secrets
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

PREDICT, JOIN = "/gradio_api/run/predict", "/gradio_api/queue/join"


def pages() -> tuple:
    """An owner's and a guest's page, with functions for all that a call can do wrong."""
    import gradio as gr

    def chosen(event: gr.SelectData):
        return str(event.value)

    def refuses(text):
        raise gr.Error("Not this.", print_exception=False)

    with gr.Blocks() as owner:
        box, number, talk = gr.Textbox(), gr.Number(), gr.Chatbot()
        gr.Button().click(lambda x, n: x.upper(), [box, number], box, queue=False)
        gr.Button().click(lambda x: x, talk, talk, queue=False)
        talk.select(chosen, None, box, queue=False)
        gr.Button().click(refuses, box, box, queue=False)
        gr.Button().click(lambda x: x, box, box)
    with gr.Blocks() as guest:
        box, talk = gr.Textbox(), gr.Chatbot()
        gr.Button().click(lambda x: x.lower(), box, box)
        gr.Button().click(lambda x: x, talk, talk, queue=False)
    return owner, guest


@contextlib.contextmanager
def served(folder: Path, *, public: bool = True):
    """The two pages (or the owner's alone), served; ``folder`` is for downloads.

    Gives url, app, gate, accounts, owner and guest (the gr.Blocks), folder.
    """
    import gradio as gr

    from kto_studio.security import doors

    owner, guest = pages()
    accounts = doors.Accounts()
    gate = {"folders": [folder], "max_upload": 2**20}
    if public:
        kwargs = {"app_kwargs": doors.app_kwargs(gate, guest, accounts=accounts), "auth": accounts.owner_login}
    else:
        kwargs = {"app_kwargs": doors.local_kwargs([folder])}
    gr.set_static_paths([folder])
    app, url, _ = owner.launch(
        **kwargs,
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        server_name="127.0.0.1",
        run_history=False,
        show_error=False,
        favicon_path=Path(doors.__file__).with_name("icon.svg"),
    )
    try:
        yield SimpleNamespace(
            url=url.rstrip("/"), app=app, gate=app.middleware_stack, accounts=accounts, owner=owner, guest=guest,
            folder=folder, port=int(url.rstrip("/").rpartition(":")[2]),
        )  # fmt: skip
    finally:
        owner.close()


def calm(site) -> None:
    """Forget the wrong passwords so far, which would slow those of the next test."""
    from kto_studio.security.logins import Brake

    site.gate.brakes = {role: Brake() for role in site.gate.brakes}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A small app behind the gate, as `kto_studio.launch` puts it: owner page, guest page, one folder of downloads."""
    folder = tmp_path_factory.mktemp("downloads")
    (folder / "model.gguf").write_bytes(b"weights")
    (folder / "page.html").write_text("<script>alert(1)</script>")
    (folder / "icon.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>')
    secret = tmp_path_factory.mktemp("private") / f"secret-{secrets.token_hex(8)}.txt"  # found nowhere else
    secret.write_text("not for you")
    (folder / "link.txt").symlink_to(secret)
    with served(folder) as site:
        site.secret = secret
        yield site


@pytest.fixture(scope="module")
def local_site(tmp_path_factory):
    """The same of an app that only this machine can reach."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "page.html").write_text("<script>alert(1)</script>")
    with served(folder, public=False) as site:
        yield site


@pytest.fixture
def anonymous(site):
    with httpx.Client(base_url=site.url) as client:
        yield client


@contextlib.contextmanager
def login(site, role="kto"):
    """A client that has logged in."""
    password = site.accounts.owner if role == "kto" else site.accounts.guest
    path = "/login" if role == "kto" else "/guest/login"
    with httpx.Client(base_url=site.url) as client:
        assert client.post(path, data={"username": role, "password": password}).status_code == 200
        yield client


def said(capfd) -> list[str]:
    """What the terminal got, but for the server's list of requests, which pytest turns on."""
    return [line for line in "".join(capfd.readouterr()).splitlines() if line.strip() and not line.startswith("INFO:")]


@pytest.fixture
def owner(site):
    with login(site) as client:
        yield client


@pytest.fixture
def visitor(site):
    with login(site, "guest") as client:
        yield client
