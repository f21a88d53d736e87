"""What a model's chat template makes of a data set's rows: what it leaves out, and the thoughts of answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Seen:
    """Counts over the rows of one data set, rendered for one model.

    Attributes:
        train_thoughts: whether thoughts are trained, or only the answers after them.
        rows: reason -> rows of which something is left out, or that are refused; first: reason -> line of the first.
        refused: rows that cannot be trained on, because their answer is cut.
        thoughts: answers with a thought.
    """

    train_thoughts: bool = True
    rows: dict[str, int] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    refused: int = 0
    thoughts: int = 0

    def count(self, line: int, changes: tuple[str, ...], refused: str, thought: bool) -> None:
        for reason in (*changes, *([refused] if refused else ())):
            self.rows[reason] = self.rows.get(reason, 0) + 1
            self.first.setdefault(reason, line)
        self.refused += bool(refused)
        self.thoughts += thought

    @property
    def trained(self) -> str:
        """What is trained of answers with a thought, in words; "" without any."""
        if not self.thoughts:
            return ""
        return "thought and answer" if self.train_thoughts else "the answer only"

    def to_dict(self) -> dict[str, Any]:
        """The part of the report that ``data check --json`` prints."""
        rows = {reason: {"rows": n, "first_line": self.first[reason]} for reason, n in self.rows.items()}
        return {
            "refused": self.refused,
            "left_out": rows,
            "thoughts": {"answers": self.thoughts, "trained": self.trained},
        }

    def sentences(self) -> list[str]:
        """For people: one line for each thing worth knowing."""
        lines = [f"{n:,} rows: {reason} (first: line {self.first[reason]:,})" for reason, n in self.rows.items()]
        if self.thoughts:
            lines.append(f"{self.thoughts:,} answers have a thought; {self.trained} is trained")
        return lines
