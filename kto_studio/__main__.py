"""``kto-studio [--port N] [--host H] [--share] [--demo]``: the app in the browser. ``python app.py`` is the same."""

from __future__ import annotations

import argparse
import sys

from kto_core.errors import KTOError
from kto_core.plain_text import printable


def parse(argv: list[str] | None = None, prog: str = "kto-studio") -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="KTO Studio: turn thumbs-up / thumbs-down data into a better language model.",
        epilog="The same on the command line: python -m kto_core --help",
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help="port to listen on (default: 7860, or the next one that is free)"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="H",
        help="address to listen on (default: %(default)s, this machine only); any other requires a password",
    )
    parser.add_argument("--share", action="store_true", help="also open a public Gradio link, protected by a password")
    parser.add_argument(
        "--demo", action="store_true", help="train on the example and compare the model before and after"
    )
    args = parser.parse_args(argv)
    if args.port is not None and not 0 < args.port < 65536:
        parser.error(f"--port must be from 1 to 65535, not {args.port}")
    return args


def main(argv: list[str] | None = None, prog: str = "kto-studio") -> int:
    args = parse(argv, prog)
    from .launch import launch  # gradio takes two seconds: --help does not wait for it

    try:
        launch(host=args.host, port=args.port, share=args.share, demo=args.demo)
    except KTOError as e:
        print(printable(e), file=sys.stderr)
        return 1
    except OSError as e:
        where = f"{args.host}:{args.port}" if args.port else args.host
        text = f"The app cannot listen on {where} ({e}). Choose another address with --port or --host."
        print(printable(text), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
