"""Who may do what: puts the gate before every route of the app. SECURITY.md states the model.

The parts: `security_paths` (which routes there are), `security_origin` (whose page asks), `security_logins`
(passwords and sessions), `security_calls` (bodies), `security_answers` (headers, the page's policy), and
`security_gate`, which puts them in order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from starlette.routing import Mount

from .answers import Behind
from .calls import explain
from .gate import Gate
from .logins import GUEST, OWNER, Accounts
from .paths import GUEST_PATH

__all__ = ["GUEST", "GUEST_PATH", "OWNER", "Accounts", "Gate", "app_kwargs", "local_kwargs"]


def local_kwargs(folders: Sequence[Path] = ()) -> dict:
    """``launch(app_kwargs=…)`` of an app that only this machine can reach, and whose pages no password protects.

    Args:
        folders: whose files may be fetched, besides Gradio's own cache.
    """
    return _gated({"folders": folders})


def app_kwargs(gate: dict, guest=None, *, accounts: Accounts, guest_options: dict | None = None) -> dict:
    """``launch(app_kwargs=…)`` of an app that others can reach, with two passwords.

    Args:
        gate: ``folders`` and ``max_upload`` of `Gate`.
        guest: a gr.Blocks that is served at `GUEST_PATH`; None: there is no guest page.
        guest_options: theme, css and the like for ``gr.mount_gradio_app``.
    """
    if guest is None:
        return _gated({**gate, "accounts": accounts})
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware import Middleware

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
        app_kwargs={"middleware": [Middleware(Behind)]},
        **(guest_options or {}),
    )
    guest.has_launched = True  # else Gradio copies any file that a message names: it checks launched pages only
    explain(guest)
    route = next(r for r in parent.routes if isinstance(r, Mount) and r.path == GUEST_PATH)
    gated = _gated({**gate, "accounts": accounts, "guest_app": route.app}, parent.router.lifespan_context)
    return {**gated, "routes": [route]}


def _gated(gate: dict, inner_lifespan=None) -> dict:
    """The gate goes around Gradio's whole application when that starts: its own middleware, CORS among it, would be
    outside of one that it is given. `Behind`, which it is given, refuses everything that did not pass the gate."""
    from starlette.middleware import Middleware

    @contextlib.asynccontextmanager
    async def lifespan(app):
        app.middleware_stack = Gate(app.middleware_stack, app, **gate)
        explain(app.get_blocks())
        async with inner_lifespan(app) if inner_lifespan else contextlib.nullcontext() as state:
            yield state

    skip = GUEST_PATH if inner_lifespan else ""
    return {"lifespan": lifespan, "middleware": [Middleware(Behind, skip=skip)]}
