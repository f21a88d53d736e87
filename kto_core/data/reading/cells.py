"""Messages that a table's cell holds as text: JSON, Python's notation, or numpy's, which has no commas between."""

from __future__ import annotations

import ast
import re
import warnings

import orjson

from kto_core.data.records.rows import DroppedRow, shorten

MOST = 2**21  # characters of a cell that is read as Python's notation; JSON is read whatever its length
UNREADABLE = "messages in a cell cannot be read; save the data as JSONL"

_LISTED = re.compile(r"""\s*(?:array\(\s*)?\[?\s*\{\s*['"](?:role|from|content|value)['"]\s*:""")
_TEXT = re.compile(r"""[bru]?'(?:[^'\\]|\\.)*'|[bru]?"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_OPENS = frozenset("[{ \n\ta")
_ARRAY = re.compile(r"\barray\(|,\s*dtype=[\w.'<>]+\s*(?=\))")


def may_hold(cell: str) -> bool:
    """Whether a text is worth a second look; most are not."""
    return cell[:1] in _OPENS and _LISTED.match(cell) is not None


def messages(cell: str) -> object:
    """The messages written in a cell for which `may_hold` is true; else the text itself.

    Raises:
        DroppedRow: it looks like a list of messages from first to last, and cannot be read as one.
    """
    text = cell.strip()
    found = _json(text)
    if found is None and len(text) <= MOST:
        found = _python(text)
    items = found if isinstance(found, list) else [found]
    if items and all(
        isinstance(m, dict) and len(m) > 1 and isinstance(m.get("role", m.get("from")), str) for m in items
    ):
        return found
    if found is None and text[-1:] in ("]", ")") and not text.startswith('[{"'):
        raise DroppedRow(UNREADABLE, shorten(cell))
    return cell


def _json(text: str) -> object:
    try:
        return orjson.loads(text)
    except ValueError:
        return None


def _python(text: str) -> object:
    """A literal, never a call: whatever else stands there is refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # backslashes of a text
            return ast.literal_eval(_with_commas(text))
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None


def _with_commas(text: str) -> str:
    """numpy's notation as Python's: a comma between the items of a list, no ``array(…, dtype=…)`` around it."""
    out: list[str] = []
    open_ = [""]  # brackets that are open
    ended = False  # whether the last thing was a whole item
    pos = 0
    while pos < len(text):
        if quoted := _TEXT.match(text, pos):
            out += [", " if ended and open_[-1] == "[" else "", quoted[0]]
            ended, pos = True, quoted.end()
            continue
        if taken := _ARRAY.match(text, pos):
            out.append("(" if taken[0][0] == "a" else "")
            if taken[0][0] == "a":
                open_.append("(")
            ended, pos = ended and taken[0][0] != "a", taken.end()
            continue
        c = text[pos]
        pos += 1
        if c in "[{(":
            out.append(", " if ended and open_[-1] == "[" else "")
            open_.append(c)
        elif c in "]})" and len(open_) > 1:
            open_.pop()
        out.append(c)
        if not c.isspace():
            ended = c in "]})"
    return "".join(out)
