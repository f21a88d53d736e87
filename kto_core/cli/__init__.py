"""The command line of KTO Studio.

Exit codes: 0 done, 1 failure (one sentence on stderr), 2 wrong usage, 130 stopped with Ctrl-C, 141 the reader of our
output went away. With ``--json`` stdout carries exactly one JSON object, everything else goes to stderr; a failure is
``{"error": "…"}``. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kto_core.plain_text import printable

from . import chat, checks, data, export, output, runs, train, vote

COMMANDS = (data, train, runs, chat, vote, export, checks)


class Parser(argparse.ArgumentParser):
    """Flags are never abbreviated: a new flag must not change what an old script means."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def _print_message(self, message, file=None) -> None:
        super()._print_message(printable(message), file)  # it repeats what was typed


def parser(argv: Sequence[str] = (), prog: str = "python -m kto_core") -> argparse.ArgumentParser:
    """The parser of all commands. Flags made from the configuration's fields are added only if ``argv`` needs them."""
    top = Parser(
        prog=prog,
        description="Turn thumbs-up / thumbs-down data into a better language model with KTO.",
        epilog="'COMMAND --help' lists the options of a command. The same in the browser: python app.py",
    )
    commands = top.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for module in COMMANDS:
        module.add(commands, argv)
    return top


def main(argv: Sequence[str] | None = None, prog: str = "python -m kto_core") -> int:
    """Run one command and return its exit code. Wrong usage raises SystemExit(2), as argparse does."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser(argv, prog).parse_args(argv)
    return output.guarded(args)
