"""Text from outside made harmless for a terminal, a table or an error. Standard library only."""

from __future__ import annotations

import json
import re
import sys
import traceback

# what a terminal obeys or a reader cannot see: controls, separators, bidi and other invisible signs, half characters.
# The joiners of scripts and emoji (200c, 200d), tab and newline are text.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_HALF = re.compile("[\ud800-\udfff]")
_MORE = re.compile(_OBEYED.pattern[:-1] + "\t\n]")


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def printable(text: object) -> str:
    """``text`` with whatever a terminal would obey written out: an escape sequence is shown as ``\\x1b[2J``.

    Lines and tabs stay; a text of plain characters is returned as it is.
    """
    text = str(text)
    return text if text.isprintable() else _OBEYED.sub(_escape, text)


def one_line(text: object, limit: int = 0) -> str:
    """`printable` without line breaks and tabs; cut to ``limit`` characters if that is set."""
    text = str(text)
    text = cut(text, limit) if limit else text
    return text if text.isprintable() else _MORE.sub(_escape, text)


def json_printable(text: str) -> str:
    """`printable` for JSON: the same value, its signs written as JSON writes them."""
    return _OBEYED.sub(_json, text)


def _json(found: re.Match[str]) -> str:
    return json.dumps(found[0])[1:-1]


def cut(text: str, limit: int) -> str:
    """The first ``limit`` characters, the last of them an ellipsis where something is missing."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def shown(value: object, limit: int = 100) -> str:
    """``repr(value)`` for an error: of a large value only the beginning, and never an exception."""
    if isinstance(value, int) and value.bit_length() > 1000:  # too many digits for str()
        return f"a number of about {value.bit_length() * 3 // 10:,} digits"
    if isinstance(value, str | bytes):
        value = value[: limit + 1]
    elif isinstance(value, list | tuple):
        value = value[:limit]
    elif isinstance(value, dict):
        value = dict(list(value.items())[:limit])
    try:
        return one_line(repr(value), limit)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} that cannot be shown"


def whole(text: str) -> str:
    """``text`` without halves of surrogate pairs, which no UTF-8 has: JSON for the page, and files, refuse them."""
    return text if text.isascii() else _HALF.sub("\ufffd", text)


def print_trace(problem: BaseException) -> None:
    """The trace of a bug on stderr; its texts may be anybody's."""
    print(printable("".join(traceback.format_exception(problem))), file=sys.stderr, end="", flush=True)
