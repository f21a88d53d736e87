"""What Chromium does at the gate: pages of the same site, links, TLS in front, the page's policy, downloads."""

import contextlib
import http.server
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading

import pytest

from tests.support import browser

pytestmark = pytest.mark.browser
PASSWORD = re.compile(r"User: kto +Password: (\S+)[\s\S]*guest +Password: (\S+)")
NAMES = "--host-resolver-rules=MAP *.tunnel.test 127.0.0.2, MAP other.example 127.0.0.2"
ROWS = "\n".join(f'{{"prompt": "Q{i}?", "completion": "A{i}.", "label": {str(i % 2 == 0).lower()}}}' for i in range(6))


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """The app as others reach it: port, the owner's and the guest's password, its folder, what its terminal says."""
    folder = tmp_path_factory.mktemp("public")
    port = browser.free_port()
    command = [sys.executable, "app.py", "--host", "127.0.0.2", "--port", str(port)]
    env = {"KTO_STUDIO_RUNS": str(folder / "runs"), "KTO_STUDIO_DATA": str(folder / "data"), "HF_HUB_OFFLINE": "1"}
    with browser.started(command, folder, env) as (_, said):
        owner, guest = PASSWORD.search(said()).groups()
        yield port, owner, guest, folder
        assert "Traceback" not in said() and "could not answer" not in said(), said()[-6000:]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The app on this machine: its port and folder."""
    folder = tmp_path_factory.mktemp("local")
    with browser.app(folder) as url:
        yield int(url.rstrip("/").rpartition(":")[2]), folder


@pytest.fixture(scope="module")
def window():
    with browser.chromium(NAMES) as program:
        yield program


@contextlib.contextmanager
def another_server(host: str):
    """Any other program's page on this host: its port, and the cookies that browsers bring it."""
    cookies: list[str] = []

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            cookies.append(self.headers.get("cookie", ""))
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>other</title><body>other</body>")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer((host, 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, cookies
        server.shutdown()


@contextlib.contextmanager
def opened(window, **options):
    """A page that fails the test where it breaks its own policy, or says an error."""
    context = window.new_context(accept_downloads=True, reduced_motion="reduce", **options)
    context.set_default_timeout(browser.PATIENCE)
    page, problems = context.new_page(), []
    page.add_init_script(
        "document.addEventListener('securitypolicyviolation',"
        " e => console.error('policy: ' + e.violatedDirective + ' ' + e.blockedURI))"
    )
    browser.watch(page, None, problems)
    try:
        yield page, problems
    finally:
        context.close()


def log_in(page, url: str, user: str, password: str) -> None:
    page.goto(url)
    page.get_by_label("username").fill(user)
    page.locator("input[type=password]").fill(password)
    page.get_by_role("button", name="Login").click()
    ready = page.get_by_role("tab", name="Train").last if user == "kto" else page.locator("#guest-talk")
    ready.wait_for()


ATTACK = """async target => {
  const call = JSON.stringify({fn_index: 0, data: [], session_hash: 's'});
  const form = new FormData(); form.append('files', new Blob(['planted']), 'planted.jsonl');
  const asked = {
    read: ['/config', {}],
    static: ['/theme.css', {}],
    call: ['/gradio_api/run/predict', {method: 'POST', body: call, headers: {'content-type': 'application/json'}}],
    simple: ['/gradio_api/run/predict', {method: 'POST', body: call, mode: 'no-cors'}],
    upload: ['/gradio_api/upload', {method: 'POST', body: form}],
    blind: ['/gradio_api/upload', {method: 'POST', body: form, mode: 'no-cors'}],
    logout: ['/logout', {method: 'POST', mode: 'no-cors'}],
    look: ['/gradio_api/heartbeat/abc', {mode: 'no-cors'}],
  };
  const got = {};
  for (const [name, [path, options]] of Object.entries(asked))
    got[name] = await fetch(target + path, {credentials: 'include', ...options}).then(r => r.type, () => 'blocked');
  for (const tag of ['img', 'script', 'iframe'])
    await new Promise(done => {
      const part = document.createElement(tag);
      part.onload = part.onerror = done; part.src = target + '/logout'; setTimeout(done, 2000);
      document.body.append(part);
    });
  return got;
}"""


def attack(page, url: str, target: str) -> tuple[dict, list]:
    """What a page at ``url`` gets of the app at ``target``, and the statuses that the app answers with."""
    answers: list = []
    page.on("response", lambda r: answers.append(r.status) if r.url.startswith(target) else None)
    page.goto(url)
    got = page.evaluate(ATTACK, target)
    page.evaluate(
        "target => { const f = document.createElement('form'); f.method = 'post'; f.action = target + '/logout';"
        " document.body.append(f); f.submit(); }",
        target,
    )
    page.wait_for_url(target + "/**")
    return got, answers


def planted(folder) -> list:
    return list(folder.rglob("planted*"))


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ("127.0.0.2", "127.0.0.2"),  # another port of the host: the browser tells whose page asks
        ("app.tunnel.test", "evil.tunnel.test"),  # a sibling name on plain HTTP: it tells by Origin only
    ],
)
def test_a_page_of_the_same_site_is_not_the_owner(ours, theirs, public, window):
    port, password, _, folder = public
    target = f"http://{ours}:{port}"
    with another_server("127.0.0.2") as (their_port, cookies), opened(window) as (page, _):
        log_in(page, target, "kto", password)
        other = page.context.new_page()
        got, answers = attack(other, f"http://{theirs}:{their_port}/", target)
        assert {got[name] for name in ("read", "static", "call", "upload")} == {"blocked"}
        assert answers and set(answers) <= {401, 403, 404}, answers
        assert bool("kto-studio" in cookies[0]) == (ours == theirs), "the browser has a cookie to send along"
        assert page.evaluate("fetch('/config').then(r => r.status)") == 200, "still logged in"
        assert not planted(folder)


@pytest.mark.parametrize("theirs", ["127.0.0.1", "localhost"])
def test_a_page_of_another_local_port_is_not_the_owner(theirs, local, window):
    port, folder = local
    with another_server("127.0.0.1") as (their_port, _), opened(window) as (page, _):
        got, answers = attack(page, f"http://{theirs}:{their_port}/", f"http://127.0.0.1:{port}")
        assert {got[name] for name in ("read", "static", "call", "upload")} == {"blocked"}
        assert answers and set(answers) <= {403, 404}, answers
        assert not planted(folder)


@pytest.mark.parametrize("ours", ["127.0.0.2", "app.tunnel.test"])
def test_a_link_opens_the_page_of_somebody_who_is_logged_in(ours, public, window):
    port, password, _, _ = public
    url = f"http://{ours}:{port}/"
    with another_server("127.0.0.2") as (their_port, _), opened(window) as (page, _):
        log_in(page, url, "kto", password)
        for elsewhere in (f"http://other.example:{their_port}/", f"http://{ours}:{their_port}/"):
            page.goto(elsewhere)
            page.evaluate(
                "url => { const a = document.createElement('a'); a.href = url; document.body.append(a); a.click(); }",
                url,
            )
            page.get_by_role("tab", name="Train").last.wait_for()
            page.reload()
            page.get_by_role("tab", name="Train").last.wait_for()
        page.goto("about:blank")
        page.goto(url)  # as typed
        page.get_by_role("tab", name="Train").last.wait_for()


def test_a_link_opens_the_page_on_this_machine(local, window):
    port, _ = local
    with another_server("127.0.0.1") as (their_port, _), opened(window) as (page, _):
        page.goto(f"http://localhost:{their_port}/")
        page.evaluate("url => { location.href = url }", f"http://127.0.0.1:{port}/")
        page.get_by_role("tab", name="Train").last.wait_for()


def test_logout_asks_and_ends_this_browsers_session(public, window):
    port, password, _, _ = public
    url = f"http://127.0.0.2:{port}/"
    with opened(window) as (page, problems), opened(window) as (other, _):
        log_in(page, url, "kto", password)
        log_in(other, url, "kto", password)
        page.goto(url + "logout")
        page.get_by_role("button", name="Log out").click()
        page.get_by_label("username").wait_for()
        assert not problems
        other.reload()
        other.get_by_role("tab", name="Train").last.wait_for()


def walk_tabs(page, folder) -> None:
    """All tabs: an upload and its report, a message, what Export shows, the theme, and the dark page."""
    for name in ("Train", "Chat", "Export", "Data"):
        browser.tab(page, name)
        page.locator(f"#tab-{name.lower()}").wait_for()
    rows = folder / "rows.jsonl"
    rows.write_text(ROWS + "\nno row\n")
    page.locator("#tab-data input[type=file]").first.set_input_files(rows)
    page.locator("#data-facts", has_text="rows.jsonl").or_(page.locator("#data-table", has_text="Q1?")).first.wait_for()
    with page.expect_download() as download:
        page.locator("#data-report").click()
    assert "no row" in download.value.path().read_text() or download.value.path().stat().st_size
    page.locator("#data-table", has_text="Q1?").wait_for()
    page.locator("#data-table tr[data-index]").first.click()
    page.locator(".theme-toggle[aria-label='Dark theme']").click()
    page.locator(".theme-toggle[aria-label='Light theme']").click()


@pytest.mark.parametrize("mode", ["public", "local"])
def test_the_page_keeps_its_own_policy(mode, public, local, window, tmp_path):
    with opened(window) as (page, problems):
        if mode == "public":
            url = f"http://127.0.0.2:{public[0]}/"
            log_in(page, url, "kto", public[1])
        else:
            url = f"http://127.0.0.1:{local[0]}/"
            page.goto(url)
        page.get_by_role("tab", name="Train").last.wait_for()
        walk_tabs(page, tmp_path)
        page.goto(url + "?__theme=dark")
        page.get_by_role("tab", name="Train").last.wait_for()
        assert not problems


def test_the_policy_stops_what_it_forbids(local, window):
    """Else the test before could not fail."""
    with opened(window) as (page, problems):
        page.goto(f"http://127.0.0.1:{local[0]}/")
        page.get_by_role("tab", name="Train").last.wait_for()
        page.evaluate(
            """async () => {
              const put = html => document.body.insertAdjacentHTML('beforeend', html);
              put('<img src="http://other.example/x.png"><object data="/theme.css"></object><img src=x onerror=1>');
              const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s);
              await fetch('http://other.example/').catch(() => 0);
              const b = document.createElement('script'); b.src = 'http://other.example/x.js'; document.body.append(b);
              put('<iframe src="/theme.css"></iframe>');
              await new Promise(r => setTimeout(r, 500));
            }"""
        )
        said = " ".join(problems)
        for directive in ("img-src", "object-src", "script-src-elem", "script-src-attr", "connect-src", "frame-src"):
            assert f"policy: {directive}" in said, (directive, said)
        assert page.evaluate("window.ran") is None


def test_a_guest_logs_in_and_chats(public, window):
    """Nobody has loaded a model: the guest is told so."""
    port, _, password, _ = public
    with opened(window) as (page, problems):
        log_in(page, f"http://127.0.0.2:{port}/guest", "guest", password)
        page.get_by_placeholder("Type a message").fill("Hello")
        page.keyboard.press("Enter")
        page.get_by_text("No model is loaded yet").first.wait_for()
        assert not problems


def test_a_page_among_the_files_does_not_run(local, window):
    port, folder = local
    (folder / "data" / "x.html").write_text("<script>document.title = 'ran'</script>")
    with opened(window) as (page, _):
        page.goto(f"http://127.0.0.1:{port}/")
        with page.expect_download() as download:
            page.evaluate("path => { location.href = '/gradio_api/file=' + path }", str(folder / "data" / "x.html"))
        assert download.value.suggested_filename == "x.html" and page.title() != "ran"


@contextlib.contextmanager
def tls_in_front(folder, port: int):
    """A port that speaks TLS and hands what it gets to the app as it is, like a proxy; its number."""
    program = shutil.which("openssl")
    assert program, "openssl is missing. On Debian: apt-get install openssl"
    key, cert = folder / "key.pem", folder / "cert.pem"
    make = [program, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=app.tunnel.test"]
    subprocess.run([*make, "-keyout", key, "-out", cert], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    listener = socket.create_server(("127.0.0.2", 0))

    def pump(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def serve(raw):
        with (
            contextlib.suppress(OSError),
            context.wrap_socket(raw, server_side=True) as outer,
            socket.create_connection(("127.0.0.2", port)) as inner,
        ):
            back = threading.Thread(target=pump, args=(inner, outer), daemon=True)
            back.start()
            pump(outer, inner)
            back.join()

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


def test_it_works_behind_a_tls_proxy(public, window, tmp_path):
    """The browser says https and another port; the app hears plain HTTP and believes nobody but Host and Origin."""
    port, password, _, _ = public
    with tls_in_front(tmp_path, port) as front, opened(window, ignore_https_errors=True) as (page, problems):
        url = f"https://app.tunnel.test:{front}/"
        log_in(page, url, "kto", password)
        (cookie,) = page.context.cookies()
        assert cookie["secure"] and cookie["sameSite"] == "Strict" and cookie["httpOnly"]
        walk_tabs(page, tmp_path)
        page.goto(url + "guest")
        page.get_by_label("username").wait_for()
        assert page.url == url + "guest/" and not problems
