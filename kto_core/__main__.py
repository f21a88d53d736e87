"""The command line: ``python -m kto_core COMMAND``, or ``kto COMMAND``. `kto_core.cli` has the commands."""

from __future__ import annotations

import os
import sys

from . import cli


def main(prog: str = "kto") -> int:
    """What the console script calls."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries; ours are shown all the same
    return cli.main(prog=prog)


if __name__ == "__main__":
    sys.exit(main("python -m kto_core"))
