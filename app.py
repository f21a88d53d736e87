"""KTO Studio in the browser: ``python app.py [--port N] [--host H] [--share] [--demo]``."""

import sys

from kto_studio.__main__ import main

if __name__ == "__main__":
    sys.exit(main(prog="app.py"))
