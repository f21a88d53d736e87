"""KTO Studio in the browser: ``python app.py [--port N] [--host H] [--share] [--demo]``."""

from __future__ import annotations

import argparse
import sys


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="app.py",
        description="KTO Studio: turn thumbs-up / thumbs-down data into a better language model.",
        epilog="The same without a browser: python -m kto_core --help",
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help="port to listen on (default: 7860, or the next one that is free)"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="H",
        help="address to listen on (default: %(default)s, this machine only); any other asks for a password",
    )
    parser.add_argument(
        "--share", action="store_true", help="also open a public link through Gradio's tunnel, behind a password"
    )
    parser.add_argument("--demo", action="store_true", help="train the example, show the model before and after")
    args = parser.parse_args(argv)
    if args.port is not None and not 0 < args.port < 65536:
        parser.error(f"--port must be from 1 to 65535, not {args.port}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from ui.launch import launch  # gradio takes two seconds: --help does not wait for it

    try:
        launch(host=args.host, port=args.port, share=args.share, demo=args.demo)
    except OSError as e:
        where = f"{args.host}:{args.port}" if args.port else args.host
        print(f"The app cannot listen on {where} ({e}). Choose another with --port or --host.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
