"""Every route of the installed Gradio, in some thirty spellings, for everybody: what passes is this table, no more."""

import asyncio
import fnmatch
import json
import re
from urllib.parse import quote, unquote

import gradio as gr
import httpx
import pytest

from kto_studio.security import doors
from kto_studio.security.gate import Gate
from kto_studio.security.logins import cookie_name
from tests.support import gated

ANYONE, LOGGED_IN, OWNER = {"anonymous", "forged", "guest", "owner"}, {"guest", "owner"}, {"owner"}
CALL = {"fn_index": 0, "data": ["a"], "session_hash": "s"}

# (method, path with wildcards): who of the people below may; a guest's own routes lie below /guest
PAGES = {
    ("GET", "/"): ANYONE,
    ("HEAD", "/"): ANYONE,
    ("GET", "/assets/*"): ANYONE,
    ("GET", "/static/*"): ANYONE,
    ("GET", "/theme.css"): ANYONE,
    ("POST", "/login"): ANYONE,
    ("GET", "/logout"): LOGGED_IN,
    ("POST", "/logout"): LOGGED_IN,
    ("GET", "/config"): LOGGED_IN,
    ("GET", "/gradio_api/app_id"): LOGGED_IN,
    ("POST", "/gradio_api/run/predict"): LOGGED_IN,
    ("POST", "/gradio_api/queue/join"): LOGGED_IN,
    ("POST", "/gradio_api/cancel"): LOGGED_IN,
    ("POST", "/gradio_api/reset"): LOGGED_IN,
    ("GET", "/gradio_api/queue/data"): LOGGED_IN,
    ("GET", "/gradio_api/heartbeat/????"): LOGGED_IN,
}
OWNERS = {
    ("GET", "/favicon.ico"): ANYONE,
    ("GET", "/manifest.json"): ANYONE,
    ("GET", "/pwa_icon"): ANYONE,
    ("GET", "/gradio_api/startup-events"): ANYONE,
    ("POST", "/gradio_api/upload"): OWNER,
    ("GET", "/gradio_api/upload_progress"): OWNER,
    ("GET", "/gradio_api/file=FILE"): OWNER,
    ("HEAD", "/gradio_api/file=FILE"): OWNER,
}
PARAMETERS = {"api_name": "predict", "session_hash": "abcd", "path": "img/a.svg", "path_or_url": "FILE"}
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE")


def spellings(path: str):
    """(how it is sent, whether it can be read in more than one way) of a path."""
    plain = quote(path, safe="/=~:@!$&'()*+,;")
    yield plain, False
    yield "/%" + f"{ord(plain[1]):02x}{plain[2:]}" if len(plain) > 1 and plain[1] not in "%/" else plain, False
    yield plain + "/", plain.endswith("/")
    yield plain.upper(), False
    yield plain + ";x", False
    yield plain + ".json", False
    yield plain + "~", False
    yield plain + "%20", False
    yield plain + "%3f", False
    yield plain + "%23", False
    yield "/guest" + plain, False
    yield "/gradio_api" + plain, False
    for bad in (
        "%0a",
        "%0d",
        "%00",
        "%09",
        "%7f",
        "%c2%85",
        "%e2%80%a8",
        "%5c",
        "\\",
        "%2f%2f",
        "//",
        "%",
        "%zz",
        "%u002f",
    ):
        yield plain + bad, True
    for bad in ("%c0%af", "%ff", "%ed%a0%80", "%250a", "%252f", "%25%32%66", "#", '"', "<", "\x7f"):
        yield plain + bad, True
    for bad in ("/.", "/..", "/%2e", "/%2e%2e", "/%2E%2e/x", "/./x", "/../x"):
        yield plain.rstrip("/") + bad, True
    for bad in (
        "/",
        "/.",
        "/..",
        "/x/..",
        "/%2f",
        "%2f",
        "\\",
        "/%5c",
        "/%2e",
        "/guest/",
        "/guest/%2f",
        "/guest/..",
        "/%0a",
        "http://x",
    ):
        glued = bad + plain
        yield (
            glued,
            not glued.startswith("/") or "//" in unquote(glued) or bool(re.search(r"%0a|\\|%5c|/(\.|%2e)", glued)),
        )


def concrete(app):
    """All routes as (method, path), with something in the place of each parameter."""
    for route in app.routes:
        path = getattr(route, "path", "")
        if path == doors.GUEST_PATH:
            yield from ((m, doors.GUEST_PATH + p) for m, p in concrete(route.app))
        elif hasattr(route, "original_router"):
            yield from concrete(route.original_router)
        else:
            filled = re.sub(r"\{(\w+)(:\w+)?\}", lambda m: PARAMETERS.get(m[1], "0"), path)
            yield from ((method, filled) for method in sorted(getattr(route, "methods", None) or ["GET"]))


class World:
    """A gate with Gradio's applications behind it, each of which only notes that it was reached."""

    def __init__(self, folder, *, public: bool):
        from fastapi import FastAPI
        from gradio.routes import App

        self.file = folder / "model.gguf"
        self.file.write_bytes(b"weights")
        owner, guest = gated.pages()
        owner.fns[0].inputs = owner.fns[0].inputs[:1]
        self.app, self.reached, guest_app = App.create_app(owner), False, None
        if public:
            mounted = gr.mount_gradio_app(FastAPI(), guest, doors.GUEST_PATH)
            route = next(r for r in mounted.routes if getattr(r, "path", "") == doors.GUEST_PATH)
            self.app.router.routes.insert(0, route)
            guest_app = route.app
        accounts = doors.Accounts() if public else None
        self.gate = Gate(self.behind, self.app, guest_app, accounts=accounts, folders=[folder])
        self.cookies = {"anonymous": "", "local": ""}
        if public:
            self.log_in()
            ids = [
                f"access-token-unsecure-{a.cookie_id}=x; access-token-{a.cookie_id}=x" for a in (self.app, guest_app)
            ]
            self.cookies["forged"] = "; ".join([f"{cookie_name('kto', 7860)}=x; {cookie_name('guest', 7860)}=x", *ids])

    def log_in(self):
        for person, role in (("owner", "kto"), ("guest", "guest")):
            secret = self.gate.sessions[role].begin()
            both = [f"{cookie_name(r, 7860)}={secret}" for r in ("kto", "guest")]  # under the wrong name too
            self.cookies[person] = "; ".join(both)

    async def behind(self, scope, receive, send):
        self.reached = True
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask(self, method: str, raw: str, person: str) -> tuple[int, str]:
        """Status and detail of one request, as uvicorn makes it."""
        sent, body = [], json.dumps(CALL | {"event_id": None}).encode()
        if raw.endswith(("cancel", "reset")):
            body = json.dumps({"session_hash": "s", "fn_index": 0, "event_id": "e"}).encode()
        kind, self.reached = b"application/json", False
        if raw.endswith("login"):
            kind, body = b"application/x-www-form-urlencoded", b"username=kto"
        headers = [(b"host", b"127.0.0.1:7860"), (b"content-type", kind), (b"cookie", self.cookies[person].encode())]
        scope = {"type": "http", "method": method, "path": unquote(raw), "raw_path": raw.encode(), "query_string": b"",
                 "headers": headers, "server": ("127.0.0.1", 7860), "root_path": "", "http_version": "1.1",
                 "scheme": "http", "app": self.app}  # fmt: skip

        given = False

        async def receive():
            nonlocal given
            if given:
                await asyncio.sleep(3600)  # the connection stays open
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message):
            sent.append(message)

        await self.gate(scope, receive, send)
        if "logout" in raw and sent[0]["status"] == 303:
            self.log_in()
        text = b"".join(m.get("body", b"") for m in sent[1:])
        return sent[0]["status"], json.loads(text)["detail"] if text.startswith(b'{"detail"') else ""

    def expected(self, method: str, path: str, person: str, public: bool) -> bool:
        """Whether the table lets this person through."""
        below = path.startswith(doors.GUEST_PATH + "/") or path == doors.GUEST_PATH
        if below:
            path = path[len(doors.GUEST_PATH) :] or "/"
        table = PAGES if below else PAGES | OWNERS
        for (m, pattern), people in table.items():
            pattern = pattern.replace("FILE", str(self.file))
            if m != method or not fnmatch.fnmatchcase(path, pattern) or (path + "*" == pattern):
                continue
            if not public:
                return not below and path not in ("/login", "/logout")
            return person in people and (people is ANYONE or (person == "guest") == below)
        return False


@pytest.mark.parametrize("mode", ["public", "local"])
def test_what_passes_is_the_table(mode, tmp_path):
    public = mode == "public"
    world = World(tmp_path, public=public)
    routes = sorted({(m, p.replace("FILE", str(world.file))) for m, p in concrete(world.app)})
    listed = [(m, p) for m, p in PAGES | OWNERS if "?" not in p and "*" not in p]
    routes += [(m, base + p.replace("FILE", str(world.file))) for m, p in listed for base in ("", doors.GUEST_PATH)]
    people = ["anonymous", "forged", "guest", "owner"] if public else ["local"]
    wrong, passed, tried = [], set(), 0

    async def walk():
        nonlocal tried
        for method, path in routes:
            for i, (raw, ambiguous) in enumerate(spellings(path)):
                for person in people:
                    for m in METHODS if i == 0 else (method,):
                        status, detail = await world.ask(m, raw, person)
                        tried += 1
                        if ambiguous:
                            good = status == 400 and "plainly" in detail and not world.reached
                        else:
                            decoded = unquote(raw)
                            through = world.reached or status in (200, 206, 303) or "needs a user" in detail
                            good = through == world.expected(m, decoded, person, public)
                            if through:
                                passed.add((m, decoded))
                            elif not world.reached:
                                good = good and status in (401, 403, 404)
                        if not good:
                            wrong.append((m, raw, person, status, detail, world.reached))

    asyncio.run(walk())
    shown = "\n".join(str(w) for w in wrong[:30])
    assert not wrong, f"{len(wrong)} wrong:\n{shown}"
    assert len(routes) > 100 and tried > 20 * len(routes) * len(people)
    for (method, pattern), _ in (PAGES | OWNERS).items():
        pattern = pattern.replace("FILE", str(world.file))
        there = any(m == method and fnmatch.fnmatchcase(p, pattern) for m, p in passed)
        assert there or not public and pattern in ("/login", "/logout"), f"nobody got through to {method} {pattern}"


def test_the_table_names_routes_that_gradio_has(tmp_path):
    """What passes the gate is what Gradio's router takes it for: each line leads to one route of its own."""
    world = World(tmp_path, public=True)
    there = set(concrete(world.app))
    for method, pattern in PAGES | OWNERS:
        if (method, pattern) in {("GET", "/logout"), ("POST", "/logout"), ("HEAD", "/gradio_api/file=FILE")}:
            continue  # answered by the gate itself
        found = [p for m, p in there if m == method and fnmatch.fnmatchcase(p, pattern)]
        assert found, f"Gradio has no {method} {pattern} any more"


def test_a_server_reads_a_path_as_this_test_does(tmp_path):
    """The same spellings over a real connection."""
    import http.client

    with gated.served(tmp_path) as site:
        connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=30)
        connection._validate_path = lambda path: None
        for raw, ambiguous in spellings("/gradio_api/token"):
            if not raw.isascii() or re.search(r"[\x00-\x20\x7f]", raw):
                continue
            connection.putrequest("GET", raw, skip_accept_encoding=True)
            connection.endheaders()
            answer = connection.getresponse()
            answer.read()
            assert answer.status == (400 if ambiguous else 404), raw
        assert httpx.get(site.url).status_code == 200
