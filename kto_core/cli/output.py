"""What the commands print, and where: results on stdout, everything else on stderr; errors become exit codes."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from kto_core.errors import Cancelled, ConfigError, KTOError
from kto_core.plain_text import json_printable, one_line, print_trace, printable

OK, FAILED, USAGE, INTERRUPTED, PIPE = 0, 1, 2, 130, 141

_stdout: list = []  # the real stdout while `--json` keeps it clean


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on stdout, everything else on stderr"
    )


def asks_for(argv: list[str], command: str) -> bool:
    """Whether the arguments are of this command: only its settings are looked up, so that others start quickly."""
    return next((a for a in argv if not a.startswith("-")), None) == command


def number(kind: type, low: float, high: float | None = None):
    """A type for argparse: an int or float from ``low`` to ``high``."""

    def read(text: str):
        value = kind(text)
        if not (value >= low and (high is None or value <= high)):
            raise argparse.ArgumentTypeError(f"{text}: must be {f'from {low} to {high}' if high else f'{low} or more'}")
        return value

    read.__name__ = kind.__name__  # argparse says "invalid int value"
    return read


def say(text: str) -> None:
    """A remark for the person at the terminal."""
    _print(text, sys.stderr)


def _print(text: str, file, end: str = "\n") -> None:
    """All that the commands print as text goes through here: nothing of it is obeyed by the terminal."""
    text, encoding = printable(text), getattr(file, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), file=file, end=end, flush=True)


def show(text: str, end: str = "\n") -> None:
    """The result of a command, as text."""
    _print(text, sys.stdout, end)


def emit(obj: dict) -> None:
    """The result of a command, as its one JSON object."""
    text = json_printable(json.dumps(obj, ensure_ascii=False, default=str))
    print(text, file=_stdout[-1] if _stdout else sys.stdout, flush=True)


def guarded(args: argparse.Namespace) -> int:
    """Run ``args.run(args)``; what it raises becomes a sentence and an exit code."""
    as_json = getattr(args, "json", False)
    try:
        with _clean_stdout(as_json):
            try:
                code = args.run(args)
                sys.stdout.flush()
                return code
            except BrokenPipeError:
                raise
            except Exception as e:
                message = sentence(e)
                say(message)
                if as_json:
                    emit({"error": message})
                if isinstance(e, Cancelled):
                    return INTERRUPTED
                return USAGE if isinstance(e, ConfigError) else FAILED
    except KeyboardInterrupt:
        say("\nStopped.")
        return INTERRUPTED
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # the interpreter flushes stdout once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE


def sentence(problem: Exception) -> str:
    """What happened and what to do. A KTOError speaks for itself; a bug of ours is shown with its trace."""
    if isinstance(problem, KTOError):
        return str(problem)
    if isinstance(problem, OSError) and problem.errno == errno.ENOSPC:
        return (
            "The disk is full. Free up disk space, or set KTO_STUDIO_RUNS (runs) or KTO_STUDIO_CACHE (cache) to "
            "another disk."
        )
    if isinstance(problem, PermissionError) and problem.filename:
        return f"Permission denied: {problem.filename}. Change its permissions, or choose another folder."
    print_trace(problem)
    return f"Unexpected {type(problem).__name__}: {problem}. This is a bug: please report it with the lines above."


@contextlib.contextmanager
def _clean_stdout(wanted: bool) -> Iterator[None]:
    """Send all that is printed, by native libraries too, to stderr; `emit` still writes to the real stdout."""
    if not wanted:
        yield
        return
    own = sys.stdout is sys.__stdout__  # not so in a test that captures it: then only Python's own prints are moved
    with contextlib.ExitStack() as stack:
        if own:
            sys.stdout.flush()
            real: TextIO = stack.enter_context(os.fdopen(os.dup(1), "w", encoding="utf-8"))
            stack.callback(os.dup2, real.fileno(), 1)
            stack.callback(sys.stdout.flush)
            os.dup2(2, 1)
        else:
            real = sys.stdout
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        _stdout.append(real)
        stack.callback(_stdout.pop)
        yield


class Bar:
    """A `Progress` for the terminal: a bar where there is one, else a line a second while the text changes."""

    def __init__(self):
        self._bar, self._text, self._shown = None, "", time.monotonic()

    def __call__(self, fraction: float | None, text: str) -> None:
        if not sys.stderr.isatty():
            if text != self._text and time.monotonic() - self._shown > 1:
                self._text, self._shown = text, time.monotonic()
                say(text)
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=100,
                file=sys.stderr,
                leave=False,
                disable=False,
                bar_format="{desc} {percentage:3.0f}% |{bar}| {remaining}",
            )
        self._bar.set_description_str(one_line(text), refresh=False)
        self._bar.n = self._bar.n if fraction is None else round(100 * fraction, 1)
        self._bar.refresh()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()


def table(rows: list[tuple]) -> str:
    """Rows of cells as columns, the first row as the head."""
    rows = [tuple(one_line(c) for c in r) for r in rows]
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows)
