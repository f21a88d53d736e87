"""How rows become text: with which thoughts, on which date. The same for training and for the chat with its result."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from kto_core.config.run_config import RunConfig

Thinking = Literal["rows", "off", "on"]


@dataclass(frozen=True)
class Style:
    """What a rendering depends on beside the row and the template.

    Attributes:
        thinking: "rows": an answer with a thought follows the prompt that asks for one, an answer without follows the
            prompt that asks for none (in a chat, where no answer is known: what the template does by itself); "off":
            thoughts of the trained answers are left out; "on": every prompt asks for a thought.
        train_thoughts: whether the tokens of an answer's thought are trained; if not they are part of the prompt.
        began: when the run began, in seconds since 1970; templates that write the date write that one. None: today.
    """

    thinking: Thinking = "rows"
    train_thoughts: bool = True
    began: float | None = None

    @classmethod
    def of(cls, config: RunConfig, began: float | None = None) -> Style:
        """How a run's rows are rendered."""
        return cls(config.thinking, config.train_thoughts, began)

    @property
    def variables(self) -> dict[str, Any]:
        """What a template is given for the date."""
        if self.began is None:
            return {}
        return {"strftime_now": datetime.datetime.fromtimestamp(self.began).strftime}


PLAIN = Style()
