"""JSON text as records need it: depth bounded, damage mended and named."""

from __future__ import annotations

import contextlib
import json

import orjson

from kto_core.data.records.rows import DroppedRow, shorten
from kto_core.data.records.turns import NOT_UTF8

MAX_DEPTH = 200  # levels of lists and objects; a record nested deeper is dropped


def decode(raw: bytes) -> tuple[object, list[str]]:
    """The object of a JSON text, and names of the changes made.

    Raises:
        DroppedRow: not JSON, or not UTF-8.
    """
    with contextlib.suppress(orjson.JSONDecodeError):
        obj = _shallow(raw, orjson.loads(raw))
        if not (isinstance(obj, dict) and any(v.__class__ is float and abs(v) >= 2**63 for v in obj.values())):
            return obj, []
    try:  # the standard library reads what the quick parser refuses or rounds: NaN, half surrogates, huge numbers
        obj = json.loads(raw.decode())
    except UnicodeDecodeError as e:
        raise DroppedRow(NOT_UTF8, f"byte {e.start + 1}") from None
    except RecursionError:
        raise DroppedRow("nested too deeply", f"more than {MAX_DEPTH} levels") from None
    except ValueError as e:
        raise DroppedRow("not JSON", shorten(str(e))) from None
    clean = _mend(_shallow(raw, obj))
    return clean, [] if clean == obj or obj != obj else ["broken Unicode replaced"]


def _shallow(raw: bytes, obj: object) -> object:
    """``obj``, if it is nested no deeper than can be written again."""
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH:
        level = [obj]
        for _ in range(MAX_DEPTH):
            level = [v for o in level if isinstance(o, dict | list) for v in (o.values() if isinstance(o, dict) else o)]
        if level:
            raise DroppedRow("nested too deeply", f"more than {MAX_DEPTH} levels")
    return obj


def _mend(value: object) -> object:
    """Half surrogate pairs, which no tokenizer takes, become U+FFFD."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_mend(v) for v in value]
    if isinstance(value, dict):
        return {_mend(k): _mend(v) for k, v in value.items()}
    return value


def encode(obj: object) -> bytes:
    """One line of JSON without its newline. NaN becomes null."""
    try:
        return orjson.dumps(obj, default=_plain, option=orjson.OPT_NON_STR_KEYS)
    except orjson.JSONEncodeError:  # numbers beyond 64 bits, half surrogate pairs
        return json.dumps(obj, default=_plain).encode()


def _plain(value: object) -> object:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


_quoted: dict[str, bytes] = {}


def repeated_key(raw: bytes, obj: object) -> str:
    """A key that a record gives twice with different values (a parser keeps the last in silence); "" if none.

    Looks for top-level keys first, since a whole second parse of every record would cost too much.
    """
    if not isinstance(obj, dict):
        return ""
    for key in obj:
        quoted = _quoted.get(key)
        if quoted is None:
            quoted = json.dumps(key, ensure_ascii=False).encode("utf-8", "replace")
            if len(_quoted) < 1000:
                _quoted[key] = quoted
        if raw.count(quoted) > 1:
            break
    else:
        return ""
    found: list[str] = []

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        out: dict[str, object] = {}
        for k, v in items:
            if k in out and out[k] != v:
                found.append(k)
            out[k] = v
        return out

    try:
        json.loads(raw, object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        return ""
    return found[0] if found else ""
