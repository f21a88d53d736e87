"""The command line: ``python -m kto_core COMMAND``. `kto_core.cli` has the commands."""

from __future__ import annotations

import os
import sys

from kto_core.cli import main

if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries; ours are shown all the same
    sys.exit(main())
