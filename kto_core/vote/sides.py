"""The two models of a vote: ``a``, a run, against ``b``, its base model or another run of the same base model."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kto_core.chat.target import require_same_base, resolve
from kto_core.errors import ModelError, RunError
from kto_core.plain_text import one_line
from kto_core.runs import folders
from kto_core.runs.run import Run

BASE = "base"
KEYS = ("a", "b")


@dataclass(frozen=True)
class Side:
    """One model of a vote.

    Attributes:
        model: its base model's public name; of a folder of this machine the last part.
        run: the id of the run whose adapter is on; "" for the base model.
        checkpoint: folder name of the run's checkpoint; "" for its finished adapter.
        folder: where the run lies; "" for the base model. Never leaves this machine.
    """

    model: str
    run: str = ""
    checkpoint: str = ""
    folder: str = ""

    @property
    def name(self) -> str:
        """What a person reads."""
        if not self.run:
            return f"base model {self.model}"
        return f"run {self.run}" + (f", step {self.checkpoint.rpartition('-')[2]}" if self.checkpoint else "")

    @property
    def adapter(self) -> str:
        """The run and checkpoint in one word, "" for the base model: what a row notes."""
        return f"{self.run}/{self.checkpoint}" if self.checkpoint else self.run

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, kept: object) -> Side:
        """The inverse of `to_dict`. Raises ValueError."""
        if not isinstance(kept, dict) or not all(isinstance(kept.get(n), str) for n in cls.__dataclass_fields__):
            raise ValueError("not a side")
        return cls(**{n: one_line(kept[n], 4000) for n in cls.__dataclass_fields__})


def find_run(name: str | Run) -> Run:
    """The run of an id or folder.

    Raises:
        ModelError: there is none of that name: a vote needs an adapter.
    """
    if isinstance(name, Run):
        return name
    with contextlib.suppress(RunError):
        return folders.find(name)
    raise ModelError(
        f"{one_line(name, 200)} is not a run. A blind vote compares a run with its base model or another run."
    )


def both(run: str | Run, against: str | Run = BASE, *, checkpoint: str = "") -> tuple[Side, Side]:
    """The sides of a vote.

    Args:
        run: the run that may be better. against: "base", or another run.
        checkpoint: of ``run``: a step or a checkpoint's name, instead of its finished adapter.

    Raises:
        ModelError: no run, no adapter yet, the same adapter twice, or runs of two base models.
        ConfigError: a run's settings cannot be read.
    """
    first = find_run(run)
    one, adapter, name = resolve(first, checkpoint or None)
    a = Side(_public(one.model), name, _checkpoint(adapter), str(first.path))
    if against == BASE:
        return a, Side(a.model)
    second = find_run(against)
    two, other, other_name = resolve(second, None)
    require_same_base(one, two, name, other_name)
    b = Side(a.model, other_name, _checkpoint(other), str(second.path))
    if (a.folder, a.checkpoint) == (b.folder, b.checkpoint):
        raise ModelError(f"{a.name} would be compared with itself. Choose another run, or its base model.")
    return a, b


def _checkpoint(adapter: Path | None) -> str:
    return adapter.name if adapter is not None and adapter.parent.name == "checkpoints" else ""


def _public(model: str) -> str:
    from kto_core.models.facts import public_name

    return Path(model).name if Path(model).is_absolute() else public_name(model)
