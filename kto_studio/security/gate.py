"""The gate: an ASGI middleware before everything else, which decides what of a request goes on.

In this order: the path must be plain and its route on the list; the request must come from our own page; the route
must be open to whoever asks; then logins, logouts and files are answered here, and calls are looked at.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from starlette.datastructures import FormData, Headers
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import FileResponse

from kto_studio.chat.guest import MAX_BODY as MAX_GUEST_BODY

from . import answers, calls, logins, origin
from .paths import ANYONE, GUEST_PATH, OWNER_ONLY, find, plain

MAX_BODY = 8 * 2**20  # bytes of an owner's call
MAX_LOGIN = 4096  # of a login form
# Only these go on to Gradio: not what a proxy says, not the cookies of this and other programs.
_PASSED = {b"host", b"user-agent", b"accept", b"accept-encoding", b"accept-language", b"content-type",
           b"content-length", b"transfer-encoding", b"if-none-match", b"if-modified-since"}  # fmt: skip

_LOGOUT = '<p>Log out of KTO Studio in this browser?</p><form method="post"><button>Log out</button></form>'
# A browser keeps our cookie from a request that another site's page leads to: the page asks once more by itself.
_ONCE_MORE = '<meta http-equiv="refresh" content="0">'


class Gate:
    """Everything that reaches the app from the network passes here.

    Args:
        app: the next ASGI application.
        owner_app: Gradio's application of the owner's page.
        guest_app: the same of the guest's page, mounted at `GUEST_PATH`; None: there is none.
        accounts: the passwords; None: only this machine can reach the app, and everybody there is the owner.
        folders: the only folders, besides Gradio's own cache, whose files the owner may fetch.
        max_upload: bytes of one upload request.
    """

    def __init__(self, app, owner_app, guest_app=None, *, accounts=None, folders=(), max_upload: int = 2 * 2**30):
        self.app, self.apps = app, {logins.OWNER: owner_app, logins.GUEST: guest_app}
        self.accounts, self.max_upload = accounts, max_upload
        self.folders = [Path(f).resolve() for f in folders]
        self.sessions = {role: logins.Sessions() for role in self.apps}
        self.brakes = {role: logins.Brake() for role in self.apps}
        self._inner: dict[str, str] = {}  # Gradio's own token of each role, which never leaves this process

    @property
    def local(self) -> bool:
        return self.accounts is None

    async def __call__(self, scope, receive, send):
        if scope["type"] == "websocket":  # Gradio 6 has none
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope, receive, send):
        path, role = scope["path"], logins.OWNER
        if not plain(scope.get("raw_path") or b"", path):
            return await answers.answer(send, 400, "This address is not written plainly.")
        if path == GUEST_PATH or path.startswith(GUEST_PATH + "/"):
            path, role = path[len(GUEST_PATH) :], logins.GUEST
        found = find(scope["method"], path or "/", guest=role == logins.GUEST)
        if found is None or self.apps[role] is None or (self.local and found[0].kind in ("login", "logout")):
            return await answers.answer(send, 404, "Not found.")
        route, match = found
        headers = Headers(scope=scope)
        secrets_sent = logins.cookie_values(headers.getlist("cookie"), self._cookie(scope, role))
        session = self.sessions[role].find(secrets_sent)
        known = session.origin if session else ""
        if why := origin.refusal(headers, local=self.local, page=route.kind == "page", known=known):
            return await answers.answer(send, 403, why)
        if route.who != ANYONE and not (session or self.local):
            return await answers.answer(send, 401, "Log in first.")
        if route.who == OWNER_ONLY and role != logins.OWNER:
            return await answers.answer(send, 403, "Guests can only chat.")
        if path == "" and role == logins.GUEST:
            return await answers.redirect(send, GUEST_PATH + "/")
        if route.kind == "page" and not self.local and origin.from_elsewhere(headers):
            return await answers.page(send, _ONCE_MORE)
        match route.kind:
            case "login":
                return await self._login(scope, receive, send, role)
            case "logout":
                return await self._logout(scope, send, role, secrets_sent)
            case "file":
                return await self._file(scope, receive, send, match["file"])
        return await self._pass(scope, receive, send, route.kind, role, session)

    # ---- to Gradio

    async def _pass(self, scope, receive, send, kind: str, role: str, session):
        limit = {"upload": self.max_upload, "call": MAX_BODY if role == logins.OWNER else MAX_GUEST_BODY}.get(kind, 0)
        size = Headers(scope=scope).get("content-length", "")
        if size.isdigit() and int(size) > limit:
            return await answers.answer(send, 413, "Too large.")
        if kind == "call":
            if (body := await calls.read(receive, limit)) is None:
                return await answers.answer(send, 413, "Too large.")
            may_send_file = self._may_fetch if role == logins.OWNER else (lambda path: False)
            if why := calls.problem(scope["path"], body, self.apps[role].get_blocks(), may_send_file):
                return await answers.answer(send, 400, why)
            receive = calls.again(body, receive)
        elif kind == "upload":
            receive = _bounded(receive, limit)
        nonce = secrets.token_urlsafe(16)
        inner = {**scope, answers.MARK: nonce, "headers": self._headers(scope, role, session is not None)}
        if session and session.origin.startswith("https://"):
            inner["scheme"] = "https"  # else Gradio's links to files would be http, and a browser refuses those
        out = answers.hardened(send, nonce=nonce if kind == "page" else "", told=calls.watch())
        return await self.app(inner, receive, out)

    def _headers(self, scope, role: str, authenticated: bool) -> list[tuple[bytes, bytes]]:
        passed = [(name, value) for name, value in scope["headers"] if name in _PASSED]
        if authenticated:
            app = self.apps[role]
            token = self._inner.setdefault(role, secrets.token_urlsafe(32))
            app.tokens[token] = role  # set again: Gradio empties them when it is configured
            passed.append((b"cookie", f"access-token-unsecure-{app.cookie_id}={token}".encode("ascii")))
        return passed

    # ---- who

    def _cookie(self, scope, role: str) -> str:
        return logins.cookie_name(role, (scope.get("server") or ("", 0))[1] or 0)

    async def _login(self, scope, receive, send, role: str):
        form = await _form(scope, receive)
        if form is None:
            return await answers.answer(send, 400, "A login needs a user and a password.")
        right = self.accounts.owner_login if role == logins.OWNER else self.accounts.guest_login
        if not right(form["username"], form["password"]):
            if wait := await self.brakes[role].wrong():
                later = [(b"retry-after", str(int(wait) + 1).encode())]
                return await answers.answer(send, 429, "Too many wrong passwords at a time.", later)
            return await answers.answer(send, 400, "Incorrect credentials.")
        named = Headers(scope=scope).get("origin", "")
        cookie = logins.set_cookie(
            self._cookie(scope, role), self.sessions[role].begin(named), secure=named.startswith("https://")
        )
        return await answers.answer(send, 200, "Logged in.", [(b"set-cookie", cookie)])

    async def _logout(self, scope, send, role: str, secrets_sent: list[str]):
        """Asks on GET: what a link can do, another page's link can do."""
        if scope["method"] == "GET":
            return await answers.page(send, _LOGOUT)
        self.sessions[role].end(secrets_sent)
        cookie = logins.set_cookie(self._cookie(scope, role), "", secure=False)
        to = GUEST_PATH + "/" if role == logins.GUEST else "/"
        return await answers.redirect(send, to, [(b"set-cookie", cookie)])

    # ---- files

    async def _file(self, scope, receive, send, name: str):
        """Answered here, not by Gradio: as a download only, and never an address to fetch."""
        if not self._may_fetch(name):
            return await answers.answer(send, 403, "This file cannot be downloaded.")
        if "," in Headers(scope=scope).get("range", ""):
            return await answers.answer(send, 416, "Ask for one range of the file.")
        real = Path(name).resolve()
        response = FileResponse(real, media_type="application/octet-stream", filename=Path(name).name)
        return await response(scope, receive, answers.hardened(send))

    def _may_fetch(self, name: str) -> bool:
        """Links are followed first: what a name leads to decides, not what it is called."""
        from gradio.utils import get_cache_folder, get_upload_folder

        if "\0" in name or not os.path.isabs(name) or name != os.path.normpath(name):
            return False
        try:
            real = Path(name).resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            return False
        allowed = [*self.folders, Path(get_cache_folder()).resolve(), Path(get_upload_folder()).resolve()]
        return real.is_file() and os.access(real, os.R_OK) and any(real.is_relative_to(folder) for folder in allowed)


async def _form(scope, receive) -> dict[str, str] | None:
    """A login form as Gradio's page or any HTML form sends it; None: it is something else."""
    if (body := await calls.read(receive, MAX_LOGIN)) is None:
        return None
    try:
        form: FormData = await Request(scope, calls.again(body, receive)).form(max_files=0, max_fields=10)
    except (HTTPException, MultiPartException, ValueError, KeyError):
        return None
    user, password = form.get("username"), form.get("password")
    if not isinstance(user, str) or not isinstance(password, str):
        return None
    return {"username": user.strip(), "password": password.strip()}


def _bounded(receive, limit: int):
    """An upload without a content-length is counted as it comes, and cut."""
    seen = 0

    async def counted():
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        return {"type": "http.disconnect"} if seen > limit else message

    return counted
