"""Files of a run folder, which may come from anybody: read within bounds, or refused with a short reason.

Standard library only. Only plain files are opened (a pipe would wait for ever), never more of one than it may have.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

SMALL = 1 << 22  # bytes of a JSON file: manifests of thousands of files have less


class Unreadable(Exception):
    """A file that is there and cannot be used. The text says why, in a few words that follow ``cannot be read:``."""


def reason(e: BaseException) -> str:
    """Why a file could not be read, without its path."""
    if isinstance(e, OSError):
        return e.strerror or type(e).__name__
    if isinstance(e, UnicodeError):
        return "it is not UTF-8"
    if isinstance(e, RecursionError):
        return "it is nested too deeply"
    return "it is not of the form that it should have"


def stamp(path: str | os.PathLike[str]) -> tuple[int, int, int] | None:
    """What changes when a file does: (change ns, bytes, inode); None where there is none.

    Not the time of modification: anybody can set that, and a change of permissions has none.
    """
    try:
        s = os.stat(path)
    except (OSError, ValueError):
        return None
    return s.st_ctime_ns, s.st_size, s.st_ino


def open_plain(path: str | os.PathLike[str]) -> io.FileIO:
    """Open a plain file to read its bytes, unbuffered.

    Raises:
        OSError: it is not there, no plain file, or may not be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(0, "it is no file" if not stat.S_ISDIR(os.fstat(fd).st_mode) else "it is a folder")
        return os.fdopen(fd, "rb", buffering=0)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(fd)
        raise


def read_text(path: str | os.PathLike[str], limit: int = SMALL) -> str:
    """A file's text.

    Raises:
        FileNotFoundError: there is none.
        Unreadable: it cannot be read, is no UTF-8, or has more than ``limit`` bytes.
    """
    try:
        with open_plain(path) as f:
            data = b""
            while block := f.read(limit + 1 - len(data)):
                data += block
        if len(data) > limit:
            raise Unreadable(f"it has more than {limit:,} bytes")
        return data.decode("utf-8")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as e:
        raise Unreadable(reason(e)) from None


def read_json(path: str | os.PathLike[str], limit: int = SMALL) -> object:
    """A file's JSON. Raises as `read_text`; NaN and the like are refused too."""
    text = read_text(path, limit)
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as e:
        raise Unreadable(reason(e)) from None


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)


def read_dict(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A small JSON file with an object in it; {} where there is none that can be read."""
    try:
        found = read_json(path)
    except (OSError, Unreadable):
        return {}
    return found if isinstance(found, dict) else {}


def is_file(path: str | os.PathLike[str]) -> bool:
    """As `Path.is_file`, and False where that raises: a folder that may not be entered has no file for us."""
    return os.path.isfile(path)


def put_json(path: Path, value: object) -> None:
    """Write beside and rename. Raises OSError."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8", errors="replace")
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
