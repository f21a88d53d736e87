"""What several of the scripts share: names in a flag, separated by commas, and settings of a run that is its steps."""

from __future__ import annotations

import argparse
from collections.abc import Collection

# of a run whose steps are measured: no search for a rate before them, no verdict after them, all rows trained on
STEPS_ALONE = {"learning_rate": 5e-7, "test_size": 0.0, "verdict": False}


def listed(text: str) -> list[str]:
    """The names between the commas, without the blanks."""
    return [name.strip() for name in text.split(",") if name.strip()]


def chosen(parser: argparse.ArgumentParser, names: list[str], known: Collection[str], what: str) -> list[str]:
    """``names``; the parser's error, which ends the script, if one is not among the ``known``."""
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown {what} {unknown[0]}; choose from {', '.join(known)}")
    return names
