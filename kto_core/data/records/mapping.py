"""Which column of a data set is which: what its owner says, and what was found.

This module knows the names of columns, nothing of what stands in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from .names import ABOUT, ANSWERS, CHOSEN, HISTORY, MESSAGES, PROMPTS, RANKED, REJECTED, SYSTEM, TOOLS, spelled
from .turns import DroppedRow

Found = tuple[tuple[str, str], ...]  # what a row needs, and the column that it was read from

NOT_THERE = "mapped column missing"  # a reason of dropped rows
_NEEDED = {"prompt", "completion", "label", "messages", "chosen", "rejected"}  # the others may be missing in a row
_OURS = frozenset(
    ("prompt", "completion", "label", "conversations", "messages", "chosen", "rejected", "tools", "system")
)
_MOST = 200  # columns that are named
_INSTEAD = {  # a target that was mapped: names that are no longer looked for
    "prompt": PROMPTS,
    "completion": (*ANSWERS, *MESSAGES, *CHOSEN, *REJECTED, *RANKED),
    "messages": (*MESSAGES, *PROMPTS, *ANSWERS, *CHOSEN, *REJECTED, *RANKED),
    "chosen": (*CHOSEN, *ANSWERS, *RANKED),
    "rejected": (*REJECTED, *RANKED),
    "system": SYSTEM,
    "history": HISTORY,
    "tools": TOOLS,
}


class Columns:
    """The columns of one data set.

    Args:
        given: what a row needs (`kto_core.config.column_map.TARGETS`) -> the data set's column, as its owner says.
    """

    def __init__(self, given: dict[str, str] | None = None):
        self.given = given or {}
        self.label = self.given.get("label", "label")  # the column's own name
        names = {n for target in self.given for n in _INSTEAD.get(target, ())}
        self._instead = frozenset(names)
        self._from = {column: target for target, column in self.given.items()}
        self._keys: set[tuple[str, ...]] = set()
        self._names: dict[str, None] = {}
        self._found: Counter[Found] = Counter()
        self.noting = True

    def again(self) -> Columns:
        return Columns(self.given)

    def put(self, obj: dict[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
        """A record with the given columns under our names, and those of its columns that keep their names unread.

        Raises:
            DroppedRow: it lacks a column that it needs.
        """
        for target, column in self.given.items():
            if column not in obj and target in _NEEDED:
                raise DroppedRow(NOT_THERE, column)
        out = {target: obj[column] for target, column in self.given.items() if column in obj}
        unread = set()
        for key, value in obj.items():
            given = self._from.get(key)
            if given is not None and (given != "label" or key == "label"):
                continue  # only numbers of a scale stay with their row
            hidden = given is not None or spelled(key) in self._instead
            name = key
            if key in out or (hidden and key in _OURS):
                name = f"original_{key}"
                while name in obj or name in out:
                    name += "_"
            elif hidden:
                unread.add(key)
            out[name] = value
        return out, frozenset(unread)

    def meet(self, keys: tuple[str, ...]) -> None:
        """A record has these columns."""
        if self.noting and keys not in self._keys and len(self._keys) < _MOST:
            self._keys.add(keys)
            for key in keys:
                if len(self._names) < _MOST:
                    self._names[key] = None

    def note(self, found: Found) -> None:
        """A row was read from these columns."""
        if self.noting:
            self._found[found] += 1

    # --- the whole data set -------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """All columns, as they were met."""
        return list(self._names)

    def mapping(self, order: Sequence[str]) -> dict[str, list[str]]:
        """What rows need, in this order -> the columns it was read from, the most frequent first."""
        counts: dict[str, Counter[str]] = {target: Counter() for target in order}
        for found, n in self._found.items():
            for target, column in found:
                counts.setdefault(target, Counter())[column] += n
        return {target: [c for c, _ in named.most_common()] for target, named in counts.items() if named}

    def missing(self) -> str:
        """Why the given columns do not fit the data set, in a sentence; "" if they do."""
        lost = next((c for c in self.given.values() if c not in self._names), None)
        if lost is None or not self._names or len(self._names) == _MOST:
            return ""
        return (
            f"map: no row has the column {lost}. Columns of this dataset: {', '.join(self._names)}. Name one of them."
        )


def example(names: Sequence[str]) -> str:
    """A flag that maps columns of these names, to begin with; the user knows better which is which."""
    worth = [n for n in names if not ABOUT.fullmatch(spelled(n)) and "," not in n and n == n.strip()]
    if "chosen" in names and "rejected" in names:
        return f"--map prompt={next((n for n in worth if n not in ('chosen', 'rejected')), 'COLUMN')}"
    worth += ["COLUMN"] * 3
    return f"--map prompt={worth[0]},completion={worth[1]},label={worth[2]}"
