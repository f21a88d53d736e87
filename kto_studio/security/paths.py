"""Which requests there are: how an address may be written, and the list of the routes that the pages need.

Gradio has some 160 routes, each release adds others, and each router reads a path in its own way. So a path that can
be read in two ways is refused before anybody reads it, and a route that is not listed here does not exist.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

GUEST_PATH = "/guest"
ANYONE, LOGGED_IN, OWNER_ONLY = "anyone", "logged in", "owner"

_RAW = re.compile(rb"/(?:[!$&'()*+,\-./0-9:;=@A-Z_a-z~]|%[0-9A-Fa-f]{2})*")
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")


def plain(raw: bytes, path: str) -> bool:
    """Whether a path can be read in one way only.

    No control character, backslash, ``//``, ``.`` or ``..`` segment and nothing encoded twice, whether written as it
    is or encoded; only bytes that a path may have; and the server has decoded it as we do.

    Args:
        raw: the path as it was sent, without the query.
        path: the same as the server decoded it, which is what routers look at.
    """
    if not _RAW.fullmatch(raw):
        return False
    try:
        decoded = unquote_to_bytes(raw).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return (
        decoded == path
        and "\\" not in path
        and "//" not in path
        and not re.search(r"%[0-9A-Fa-f]{2}", path)
        and not {".", ".."} & set(path.split("/"))
        and not any(unicodedata.category(c) in _UNPRINTABLE for c in path)
    )


@dataclass(frozen=True)
class Route:
    """One line of the list.

    Attributes:
        methods: names with a space between.
        path: a pattern of the whole path, without `GUEST_PATH`.
        who: `ANYONE`, `LOGGED_IN` (the owner; a guest below `GUEST_PATH`) or `OWNER_ONLY`.
        kind: how `kto_studio.security.gate` treats it. "": passed on. "call": its body is looked at first. "page",
            "upload", "file", "login", "logout": see there.
        guest: it is there below `GUEST_PATH` too.
    """

    methods: str
    path: str
    who: str
    kind: str = ""
    guest: bool = True


ROUTES = (
    Route("GET HEAD", "/", ANYONE, "page"),
    # what the login page needs: nothing in it belongs to anybody
    Route("GET", "/(assets|static)/.+", ANYONE),
    Route("GET", r"/theme\.css", ANYONE),
    Route("GET", r"/(favicon\.ico|manifest\.json|pwa_icon)", ANYONE, guest=False),
    Route("GET", "/gradio_api/startup-events", ANYONE, guest=False),  # Gradio's launch asks for it
    Route("POST", "/login", ANYONE, "login"),
    Route("GET POST", "/logout", LOGGED_IN, "logout"),
    # calls and their answers
    Route("POST", "/gradio_api/(run/predict|queue/join|cancel|reset)", LOGGED_IN, "call"),
    Route("GET", "/gradio_api/queue/data", LOGGED_IN),
    Route("GET", "/gradio_api/heartbeat/[A-Za-z0-9_-]{1,64}", LOGGED_IN),
    Route("GET", "/gradio_api/app_id", LOGGED_IN),  # a page that lost its connection asks whether the app is the same
    Route("GET", "/config", LOGGED_IN),  # and loads its description anew
    # files
    Route("POST", "/gradio_api/upload", OWNER_ONLY, "upload", guest=False),
    Route("GET", "/gradio_api/upload_progress", OWNER_ONLY, guest=False),
    Route("GET HEAD", "/gradio_api/file=(?P<file>.+)", OWNER_ONLY, "file", guest=False),
)
_COMPILED = [(route, set(route.methods.split()), re.compile(route.path, re.DOTALL)) for route in ROUTES]


def find(method: str, path: str, *, guest: bool = False) -> tuple[Route, re.Match] | None:
    """The listed route of a `plain` path (below `GUEST_PATH` without that prefix), and how its pattern matched."""
    for route, methods, pattern in _COMPILED:
        if method in methods and (route.guest or not guest) and (match := pattern.fullmatch(path)):
            return route, match
    return None
