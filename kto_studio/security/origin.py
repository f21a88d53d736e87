"""Whose page makes a request. Browsers say it: in Host, Origin and the Sec-Fetch headers, which no page can write.

A browser sends our login along for every page of the same "site": other ports of the host, and other names below a
domain that is not on the Public Suffix List (such as a tunnel's). So the login alone proves nothing.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
_ORIGIN = re.compile(r"(https?)://([^/?#@\s]+)")


def refusal(headers: Headers, *, local: bool, page: bool, known: str = "") -> str:
    """Why a request is refused, one sentence; empty: it comes from our own page, from the user, or from no browser.

    Behind a tunnel or a TLS proxy the browser's scheme is https and ours http, and nothing that a proxy says about
    itself is believed. So the Origin's host and port must be those of Host, which the browser writes and a proxy must
    pass on; its scheme must be the one that the session began with.

    Args:
        local: only this machine can reach the app. Its name must be one of this machine's, or a site could give its
            own name this machine's address.
        page: the request is for the page itself: a link to it may stand anywhere.
        known: the Origin with which the session began.
    """
    hosts, origins = headers.getlist("host"), headers.getlist("origin")
    if len(hosts) != 1 or len(origins) > 1:
        return "A request needs one Host header and at most one Origin."
    host = hosts[0].lower()
    if local and re.sub(r":\d+$", "", host) not in LOCAL_NAMES:
        return "Open this page at 127.0.0.1 or localhost, or start the app with --host."
    if origins:
        named = _ORIGIN.fullmatch(origins[0].lower())
        if not named or not _same(host, named[1], named[2]) or (local and named[1] != "http"):
            return "Another page asked. Behind a proxy, the Host header must be passed on as the browser sent it."
        if known and not known.startswith(f"{named[1]}://"):
            return "Another page asked: this session began with another scheme."
    if not from_elsewhere(headers):
        return ""
    return "" if page and _navigates(headers) else "Another page asked."


def _navigates(headers: Headers) -> bool:
    """Whether a whole window goes there, as by a click on a link: not a frame, not a script."""
    told = headers.get("sec-fetch-mode", "navigate"), headers.get("sec-fetch-dest", "document")
    return told == ("navigate", "document")


def from_elsewhere(headers: Headers) -> bool:
    """Whether the browser says that another site's page led here: it does not send our cookie along then.

    To plain HTTP (but on this machine) browsers send no Sec-Fetch headers. A Referer says the same, but a page can
    leave it out: then only reading is prevented there, and what has an Origin, which is all that changes anything.
    """
    if site := headers.get("sec-fetch-site"):
        return site not in ("none", "same-origin")
    came_from = _ORIGIN.match(headers.get("referer", "").lower())
    return came_from is not None and not _same(headers.get("host", "").lower(), came_from[1], came_from[2])


def _same(host: str, scheme: str, address: str) -> bool:
    """Whether a Host header names this address; a scheme's own port may be left out."""
    port = {"http": ":80", "https": ":443"}[scheme]
    return host.removesuffix(port) == address.removesuffix(port)
