"""Who may do what: accounts and a gate before every route where others can reach the app, a smaller gate where not.

Gradio's own ``auth`` closes its calls, but leaves some routes open (streams, heartbeats, cancel) and never counts
failed logins. `Gate` is an ASGI middleware in front of all of it: what is not named in `OPEN` asks for a login, logins
are limited, bodies are bounded, files are served only from where downloads are made. `LocalGate` keeps pages of other
sites away from an app on this machine. SECURITY.md states the model.
"""

from __future__ import annotations

import hmac
import re
import secrets
import time
from collections import deque
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import unquote

OWNER, GUEST = "kto", "guest"
GUEST_PATH = "/guest"
MAX_FAILURES, WINDOW = 5, 300.0  # failed logins from one address in this many seconds; then refused until they age
MAX_FAILURES_ALL = 50  # from all addresses: behind a tunnel everybody has the same or a changing one
MAX_BODY = 8 * 2**20  # bytes of any request but an upload

# Needed to show the login page, and nothing that belongs to anybody.
OPEN = re.compile(
    r"/(assets/.*|static/.*|svelte/.*|theme\.css|gradio_api/theme\.css|favicon\.ico|robots\.txt|manifest\.json"
    r"|pwa_icon(/\d+)?|login/?|login_check/?|gradio_api/login_check/?|gradio_api/app_id/?|gradio_api/startup-events)?"
)
# Nobody needs these here, logged in or not: token echo, proxies, recordings, monitoring, code editing, reload.
SHUT = re.compile(
    r"/(gradio_api/(token|proxy=.*|process_recording|vibe-.*|undo-vibe-edit|dev/.*|runs|run-history/.*|deep_link"
    r"|component_server.*|info|openapi\.json|call/.*|api/.*)|monitoring.*|docs.*|redoc.*|openapi\.json)/?"
)
FILE = re.compile(r"/gradio_api/file[=/](?P<path>.*)", re.DOTALL)
UPLOAD = re.compile(r"/gradio_api/upload/?")


@dataclass
class Accounts:
    """The two passwords of one start of the app, kept in memory only."""

    owner: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    guest: str = field(default_factory=lambda: secrets.token_urlsafe(12))

    def owner_login(self, user: str, password: str) -> bool:
        return user == OWNER and _same(password, self.owner)

    def guest_login(self, user: str, password: str) -> bool:
        return user == GUEST and _same(password, self.guest)


def _same(a: str, b: str) -> bool:
    return hmac.compare_digest(a.encode(), b.encode())


@dataclass
class LoginLimit:
    """Failed logins of the last `WINDOW` seconds, by address and in all."""

    by_address: dict[str, deque] = field(default_factory=dict)
    everyone: deque = field(default_factory=deque)

    def wait(self, address: str, now: float | None = None) -> float:
        """Seconds until this address may try again; 0: now."""
        now = time.monotonic() if now is None else now
        own = self.by_address.get(address, deque())
        waits = [
            times[-limit] + WINDOW - now
            for times, limit in ((own, MAX_FAILURES), (self.everyone, MAX_FAILURES_ALL))
            if len(times) >= limit
        ]
        return max(0.0, *waits) if waits else 0.0

    def tried(self, address: str, now: float | None = None) -> None:
        """Counted before the password is looked at: requests that come together do not slip through."""
        now = time.monotonic() if now is None else now
        for stale in [a for a, times in self.by_address.items() if times[-1] < now - WINDOW]:
            del self.by_address[stale]  # bounded by the failures of one window
        self.by_address.setdefault(address, deque(maxlen=MAX_FAILURES)).append(now)
        self.everyone.append(now)
        while len(self.everyone) > MAX_FAILURES_ALL:
            self.everyone.popleft()

    def succeeded(self, address: str) -> None:
        self.by_address.pop(address, None)
        if self.everyone:
            self.everyone.pop()


class Gate:
    """ASGI middleware before every route of the app and of the guest page mounted in it.

    Args:
        app: the next ASGI application.
        guest_app: Gradio's application under `GUEST_PATH`, which has its own logins; None: there is no guest page.
        folders: the only folders, besides Gradio's own upload cache, whose files a logged-in owner may fetch.
        max_upload: bytes of one upload request.
    """

    def __init__(self, app, *, guest_app=None, folders: list[Path] = (), max_upload: int = 2 * 2**30):
        self.app, self.guest_app, self.max_upload = app, guest_app, max_upload
        self.folders = [Path(f).resolve() for f in folders]
        self.limit = LoginLimit()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "websocket":  # Gradio 6 has none
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, guest = scope["path"], False
        if path == GUEST_PATH or path.startswith(GUEST_PATH + "/"):
            path, guest = path[len(GUEST_PATH) :] or "/", True
        refusal = self._refusal(scope, path, guest)
        if refusal:
            await _answer(send, *refusal)
        elif scope["method"] == "POST" and path.rstrip("/") == "/login":
            await self._login(scope, receive, send, guest)
        else:
            await self.app(scope, self._bounded(path, receive), _hardened(send))

    def _refusal(self, scope, path: str, guest: bool) -> tuple[int, str] | None:
        size = _header(scope, b"content-length")
        if size.isdigit() and int(size) > self._max_body(path):
            return 413, "Too large."
        if scope["method"] not in ("GET", "HEAD", "POST", "OPTIONS"):
            return 405, "Not allowed."
        if SHUT.fullmatch(path):
            return 404, "Not found."
        if OPEN.fullmatch(path):
            return None
        if not self._logged_in(scope, guest):
            return 401, "Log in first."
        if guest and (UPLOAD.fullmatch(path) or FILE.fullmatch(path)):
            return 403, "Guests can only chat."
        if (match := FILE.fullmatch(path)) and not self._may_fetch(unquote(match["path"])):
            return 403, "This file is not for download."
        return None

    def _max_body(self, path: str) -> int:
        return self.max_upload if UPLOAD.fullmatch(path) else MAX_BODY

    def _logged_in(self, scope, guest: bool) -> bool:
        app = self.guest_app if guest else scope["app"]
        if app is None:
            return False
        try:
            cookies = SimpleCookie(_header(scope, b"cookie"))
        except CookieError:
            return False
        # Gradio sets two: this one is not sent along when another site's page makes the request
        name = f"access-token-unsecure-{app.cookie_id}"
        return name in cookies and bool(app.tokens.get(cookies[name].value))

    def _may_fetch(self, name: str) -> bool:
        """Links are followed first: what a name leads to decides, not what it is called."""
        from gradio.utils import get_cache_folder, get_upload_folder

        if "://" in name or "\0" in name:
            return False
        try:
            real = Path(name).resolve(strict=True)
        except OSError:
            return False
        allowed = [*self.folders, Path(get_cache_folder()).resolve(), Path(get_upload_folder()).resolve()]
        return real.is_file() and any(real.is_relative_to(folder) for folder in allowed)

    async def _login(self, scope, receive, send, guest: bool):
        address = f"{(scope.get('client') or ('?',))[0]} {GUEST if guest else OWNER}"
        if wait := self.limit.wait(address):
            text = f"Too many failed logins. Try again in {int(wait) + 1} seconds."
            await _answer(send, 429, text, [(b"retry-after", str(int(wait) + 1).encode())])
            return

        self.limit.tried(address)

        async def watch(message):
            if message["type"] == "http.response.start" and message["status"] == 200:
                self.limit.succeeded(address)
            await send(message)

        await self.app(scope, self._bounded("/login", receive), _hardened(watch))

    def _bounded(self, path: str, receive):
        """A body without a content-length is counted as it comes."""
        limit, seen = self._max_body(path), 0

        async def counted():
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            return {"type": "http.disconnect"} if seen > limit else message

        return counted


class LocalGate:
    """ASGI middleware of an app that only this machine can reach, and whose pages no password protects.

    A page of another site can send requests here, and can give its own name this machine's address: both show in the
    request's Origin or Host.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif not (_here(_header(scope, b"host")) and _from_here(_header(scope, b"origin"))):
            await _answer(send, 403, "Open this page as 127.0.0.1 or localhost, or start the app with --host.")
        elif SHUT.fullmatch(scope["path"]):
            await _answer(send, 404, "Not found.")
        else:
            await self.app(scope, receive, _hardened(send))


def _here(host: str) -> bool:
    """Whether ``host`` (perhaps with a port) names this machine."""
    return re.sub(r":\d+$", "", host.lower()) in ("localhost", "127.0.0.1", "[::1]")


def _from_here(origin: str) -> bool:
    """Whether a page of this machine asks, or no page at all. ``null`` (a sandboxed frame) is somebody else's."""
    return not origin or _here(origin.partition("://")[2])


def _header(scope, name: bytes) -> str:
    return next((v.decode("latin-1") for k, v in scope["headers"] if k == name), "")


def _hardened(send):
    extra = [
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"x-frame-options", b"DENY"),
        (b"content-security-policy", b"img-src 'self' data: blob:; media-src 'self' data: blob:"),  # not from elsewhere
    ]

    async def with_headers(message):
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await send(message)

    return with_headers


async def _answer(send, status: int, text: str, headers: list = ()):
    body = f'{{"detail": "{text}"}}'.encode()
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": body})


def local_kwargs() -> dict:
    """``launch(app_kwargs=…)`` with a `LocalGate` in front."""
    from starlette.middleware import Middleware

    return {"middleware": [Middleware(LocalGate)]}


def app_kwargs(gate: dict, guest=None, *, accounts: Accounts | None = None, guest_options: dict | None = None) -> dict:
    """``launch(app_kwargs=…)`` with a `Gate` in front and, given ``guest`` (a gr.Blocks), its page at `GUEST_PATH`.

    Args:
        gate: arguments of `Gate` except ``guest_app``.
        accounts: whose guest password opens the guest page; needed with ``guest``.
        guest_options: theme, css and the like for ``gr.mount_gradio_app``.
    """
    from fastapi import FastAPI
    from starlette.middleware import Middleware

    if guest is None:
        return {"middleware": [Middleware(Gate, **gate)]}
    import gradio as gr

    parent = FastAPI()  # lends us the mounted route and its start-up; it never serves
    gr.mount_gradio_app(
        parent,
        guest,
        GUEST_PATH,
        auth=accounts.guest_login,
        run_history=False,
        show_error=False,
        footer_links=[],
        ssr_mode=False,
        **(guest_options or {}),
    )
    route = next(r for r in parent.routes if getattr(r, "path", "") == GUEST_PATH)
    return {
        "routes": [route],
        "lifespan": parent.router.lifespan_context,
        "middleware": [Middleware(Gate, **gate, guest_app=route.app)],
    }
