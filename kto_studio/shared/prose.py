"""Sentences of the library on a page: plain text with names and values between backticks, alone or set apart."""

from __future__ import annotations

import html
import re

_REMEDIES = (  # the command line's, and the page's
    (" Set good_from", "Say in the Data tab where good begins and bad ends."),
    (" Set --good-from", "Say in the Data tab whether a 1 is good or bad."),
    (" Say which column is which", "Choose in the Data tab which column is which."),
)
_CODE = re.compile(r"`([^`\n]+)`")


def prose(text: object) -> str:
    """Escaped HTML of a sentence; what stands between backticks becomes code, as it reads in a terminal."""
    return _CODE.sub(r"<code>\1</code>", html.escape(str(text)))


def note(text: str, tone: str = "") -> str:
    """A line set apart; ``tone`` is "", "good" or "bad"."""
    role = ' role="alert"' if tone == "bad" else ""
    return f'<div class="note{f" note-{tone}" if tone else ""}"{role}>{prose(text)}</div>'


def in_app(text: str) -> str:
    """A data set's problem with the page's remedy in place of the command line's."""
    for command, page in _REMEDIES:
        before, found, _ = text.partition(command)
        text = f"{before} {page}" if found else text
    return text
