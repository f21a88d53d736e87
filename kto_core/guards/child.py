"""Long work in a process of its own: its output while it comes, cancel at any moment, all its memory back at the end.

`run` starts any command; `call` starts one function of this package in a fresh interpreter:

    parent: call("merging", "merge", {...}) ── arguments as one line of JSON on stdin ──▶ child: main()
            progress, result or error  ◀── lines "@@{...}" on stdout ──────────────────── say(...)

The child's stdin stays open as long as its parent lives. When it closes, the child ends itself: nobody would rename
what it writes. Arguments never appear in a command line or in the environment, so a token may be among them.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kto_core import errors
from kto_core.jobs import Progress, check_cancel, no_progress
from kto_core.paths import ROOT
from kto_core.plain_text import print_trace

MARK = "@@"
POLL = 0.1  # seconds between two looks at `cancel`
TAIL = 40  # lines kept for an error message
BAR = re.compile(r"\d+%\|")  # tqdm's bars are no reason for anything


@dataclass(frozen=True)
class Ended:
    """``code``: exit status (negative: the signal that killed it); ``tail``: its last lines, without progress bars."""

    code: int
    tail: str


def run(
    command: list[str],
    *,
    env: Mapping[str, str | None] | None = None,
    given: str | None = None,
    on_line: Callable[[str], None] = lambda line: None,
    cancel: threading.Event | None = None,
) -> Ended:
    """Run a command to its end; a progress bar's updates (carriage returns) count as lines.

    Args:
        env: variables added to ours; None takes one away.
        given: text for its stdin, which then stays open until the end; None: no stdin.

    Raises:
        Cancelled: ``cancel`` was set; the command and its children are killed.
    """
    check_cancel(cancel)
    tail: collections.deque[str] = collections.deque(maxlen=TAIL)
    with subprocess.Popen(
        command,
        env={k: v for k, v in (os.environ | (env or {})).items() if v is not None},
        stdin=subprocess.DEVNULL if given is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a Ctrl-C in the terminal is ours to handle; its own children are killed with it
    ) as process:
        try:
            if given is not None and process.stdin:
                with contextlib.suppress(BrokenPipeError):  # it died at once: its exit code tells
                    process.stdin.write(given.encode() + b"\n")
                    process.stdin.flush()
            for line in _lines(process, cancel):
                if not BAR.search(line):
                    tail.append(line)
                on_line(line)
            check_cancel(cancel)
        finally:
            with contextlib.suppress(ProcessLookupError):  # the group outlives its leader if a grandchild does
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdin:
                with contextlib.suppress(OSError):
                    process.stdin.close()
    return Ended(process.returncode, "\n".join(tail))


def _lines(process: subprocess.Popen[bytes], cancel: threading.Event | None) -> Iterator[str]:
    """Its output, line by line as it comes, until it has ended."""
    assert process.stdout, "started with a pipe"
    fd, rest = process.stdout.fileno(), b""
    while True:
        check_cancel(cancel)
        if not select.select([fd], [], [], POLL)[0]:
            if process.poll() is not None:  # ended, though something else holds its output open
                break
            continue
        data = os.read(fd, 1 << 16)
        if not data:
            break
        *whole, rest = re.split(rb"[\r\n]", rest + data)
        for line in whole:
            if text := line.decode(errors="replace").rstrip():
                yield text
    if text := rest.decode(errors="replace").rstrip():
        yield text
    while process.poll() is None:  # closed its output, not gone yet
        check_cancel(cancel)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL)


class ChildFailed(errors.ExportError):
    """The child ended without an answer. ``tail`` has its last lines, ``code`` its exit status."""

    def __init__(self, ended: Ended, what: str):
        lines = [line for line in ended.tail.splitlines() if line.strip()]
        self.tail, self.code = ended.tail, ended.code
        if ended.code == -signal.SIGKILL:
            why = (
                "the operating system killed it, most likely because memory ran out. Close other programs and try again"
            )
        elif ended.code < 0:
            why = f"it crashed ({signal.Signals(-ended.code).name}): {lines[-1][:300] if lines else 'no message'}"
        else:
            why = lines[-1][:300] if lines else f"exit code {ended.code}"
        super().__init__(f"{what} failed: {why}.".replace("..", "."))


def call(
    module: str,
    function: str,
    arguments: dict[str, Any],
    *,
    what: str,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
    env: Mapping[str, str | None] | None = None,
    on_line: Callable[[str], None] = lambda line: None,
) -> Any:
    """``kto_core.<module>.<function>(**arguments)`` in a child; arguments and result are JSON.

    Args:
        what: the work in a word or two, for the message when the child dies ("The merge").
        on_line: gets the output that is not the child's own messages (progress bars of libraries).

    Raises:
        KTOError: the one the function raised, of the same class.
        ChildFailed: it died, or raised something else.
        Cancelled: ``cancel`` was set.
    """
    answer: dict[str, Any] = {}

    def read(line: str) -> None:
        if not line.startswith(MARK):
            on_line(line)
            return
        message = json.loads(line[len(MARK) :])
        if "text" in message:
            progress(message["fraction"], message["text"])
        answer.update({k: v for k, v in message.items() if k in ("result", "error", "kind")})

    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ended = run(
        [sys.executable, "-m", "kto_core.guards.child"],
        env={"PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": None} | dict(env or {}),
        given=json.dumps({"module": module, "function": function, "arguments": arguments}),
        on_line=read,
        cancel=cancel,
    )
    if "error" in answer:
        raise getattr(errors, answer["kind"])(answer["error"])
    if "result" not in answer:
        raise ChildFailed(Ended(ended.code, _without_messages(ended.tail)), what)
    return answer["result"]


def _without_messages(tail: str) -> str:
    return "\n".join(line for line in tail.splitlines() if not line.startswith(MARK))


# ---- in the child ---------------------------------------------------------------------------------------------------


def say(**message: object) -> None:
    """One message to the parent."""
    sys.stdout.write("\n" + MARK + json.dumps(message) + "\n")  # on a line of its own, whatever came before
    sys.stdout.flush()


def tell(fraction: float | None, text: str) -> None:
    """Progress to the parent."""
    say(fraction=fraction, text=text)


def main() -> int:
    """Read what to call, call it, say how it ended."""
    import importlib

    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        module = importlib.import_module(f"kto_core.{asked['module']}")
        say(result=getattr(module, asked["function"])(**asked["arguments"]))
    except errors.KTOError as e:
        say(error=str(e), kind=type(e).__name__)
        return 1
    except MemoryError as e:
        print_trace(e)
        say(error="Not enough memory. Close other programs and try again.", kind="HardwareError")
        return 1
    except Exception as e:  # safetensors' error of a full disk has a class of its own
        if "No space left on device" not in str(e):
            raise
        say(error="The disk is full. Free up disk space and try again.", kind="DiskError")
        return 1
    return 0


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main())
