"""What goes out: the headers of every answer, the page's Content-Security-Policy, and no trace for a request."""

from __future__ import annotations

import errno
import json
import re
import sys
import traceback
from collections.abc import Callable, Sequence

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

MARK = "kto_studio.nonce"  # in a request's scope: it has come through the gate

# Gradio compiles the plots' expressions and the handlers written in JavaScript at run time, so 'unsafe-eval' must stay;
# its components set styles in place. Inline scripts run only with the nonce, which `Behind` gives to the page's own.
_PAGE = (
    "default-src 'none'; script-src 'self' 'nonce-{nonce}' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "manifest-src 'self'; form-action 'self'; base-uri 'self'; frame-ancestors 'none'"
)
_REST = "default-src 'none'; frame-ancestors 'none'; sandbox"  # a file, a script, data: never a page of ours
_FORM = "default-src 'none'; form-action 'self'; frame-ancestors 'none'"

_COMMON = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),  # not "no-referrer": a form of ours would have the Origin "null"
    (b"x-frame-options", b"DENY"),
    (b"x-robots-tag", b"noindex"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
]
_OURS = {name for name, _ in _COMMON} | {b"content-security-policy", b"set-cookie", b"server"}


def hardened(send: Callable, *, nonce: str = "", told: Sequence[str] = ()) -> Callable:
    """A ``send`` that sets our headers and drops Gradio's own cookies and permissions for other pages.

    Args:
        nonce: of a page's inline scripts; empty: what is sent is not a page.
        told: of `security_calls.watch`: a failure in it is the caller's, not ours.
    """
    policy = _PAGE.format(nonce=nonce) if nonce else _REST
    replaced = False

    async def with_headers(message):
        nonlocal replaced
        if message["type"] == "http.response.start":
            status = message["status"]
            if status == 422:  # FastAPI's own lists every field of its models
                replaced = True
                await answer(send, 422, "This request is not understood.")
                return
            kept = [
                (name, value)
                for name, value in message.get("headers", [])
                if name.lower() not in _OURS and not name.lower().startswith(b"access-control-")
            ]
            headers = [*kept, *_COMMON, (b"content-security-policy", policy.encode())]
            message = {**message, "status": 422 if status == 500 and told else status, "headers": headers}
        if not replaced:
            await send(message)

    return with_headers


async def answer(send: Callable, status: int, text: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """One sentence as JSON; Gradio's page shows the one field or the other."""
    body = json.dumps({"detail": text, "error": text}).encode()
    await _send(send, status, b"application/json", body, _REST, headers)


async def page(send: Callable, body: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """A page of ours without scripts."""
    html = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>KTO Studio</title>{body}</html>'
    await _send(send, 200, b"text/html; charset=utf-8", html.encode(), _FORM, headers)


async def redirect(send: Callable, to: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """To a path of ours; without a host, so that it holds behind a proxy."""
    await _send(send, 303, b"text/plain", b"", _REST, [(b"location", to.encode()), *headers])


async def _send(
    send: Callable, status: int, kind: bytes, body: bytes, policy: str, headers: Sequence[tuple[bytes, bytes]]
) -> None:
    fixed = [
        (b"content-type", kind),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        (b"content-security-policy", policy.encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *_COMMON, *headers]})
    await send({"type": "http.response.body", "body": body})


class Behind:
    """The innermost ASGI middleware: refuses what has not come through the gate, and ends a request that fails.

    It sits inside Gradio's compression, so it sees a page as text and can give the nonce to its scripts.
    """

    def __init__(self, app, skip: str = ""):
        self.app, self.skip = app, skip  # below this path is another application, which has one of its own

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if MARK not in scope:
            return await answer(send, 503, "This app is not behind its gate.")
        if self.skip and scope["path"].startswith(self.skip + "/"):
            return await self.app(scope, receive, send)
        out = _Watched(send, scope[MARK])
        try:
            await self.app(scope, receive, out)
        except Exception as e:
            status, text = _what_happened(e, scope["path"])
            if status == 500:
                last = traceback.extract_tb(e.__traceback__)[-1]
                what = f"{type(e).__name__} in {last.name}, line {last.lineno} of {last.filename}"
                print(f"The app could not answer {scope['method']} {scope['path']}: {what}", file=sys.stderr)
            if not out.started:
                await answer(send, status, text)
            elif not out.ended:
                await send({"type": "http.response.body", "body": b""})
        return None


class _Watched:
    """A ``send`` that knows how far an answer is, and that marks the inline scripts of a page with the nonce."""

    def __init__(self, send: Callable, nonce: str):
        self.send, self.nonce = send, nonce.encode()
        self.started = self.ended = False
        self._page: dict | None = None
        self._body = b""

    async def __call__(self, message):
        if message["type"] == "http.response.start":
            self.started = True
            kind = dict(message.get("headers", [])).get(b"content-type", b"")
            if self.nonce and kind.startswith(b"text/html"):
                self._page = message
                return
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)
            if self._page is not None:
                self._body += message.get("body", b"")
                if self.ended:
                    await self._send_page()
                return
        await self.send(message)

    async def _send_page(self):
        # text in the page cannot contain a tag: Gradio writes its "<" as \u003c
        body = re.sub(rb"<script(?=[\s>])", b'<script nonce="%s"' % self.nonce, self._body)
        headers = [(n, v) for n, v in self._page["headers"] if n != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self.send({**self._page, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _what_happened(e: BaseException, path: str) -> tuple[int, str]:
    """Status and sentence for a request that ended in an exception; 500: it is our fault."""
    if isinstance(e, OSError) and e.errno == errno.ENOSPC:
        return 507, "The disk is full. Free up disk space, then try again."
    cause: BaseException | None = e
    while cause is not None:  # a caller who went away, or who asked for a stream that is not there
        if isinstance(cause, HTTPException | ClientDisconnect):
            return 400, "The request was cut off."
        cause = cause.__cause__ or cause.__context__
    if path.endswith("/upload") and not isinstance(e, OSError):  # Gradio reads whatever form it gets
        return 400, "This upload is not understood."
    return 500, "The app could not answer; its terminal says more."
