"""The command line: ``python -m kto_core COMMAND``. `kto_core.cli` has the commands."""

from __future__ import annotations

import sys

from kto_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
