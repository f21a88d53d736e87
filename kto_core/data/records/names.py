"""The names that people give to columns, in any case and spelling."""

from __future__ import annotations

import functools
import re
from typing import Any

QUESTIONS = ("question", "query", "input", "user_prompt", "user_input", "user_message")
PERHAPS = ("user", "human", "problem", "request")  # questions, if there is no better name
PROMPTS = ("prompt", "instruction", *QUESTIONS, *PERHAPS)
ANSWERS = (
    "completion", "response", "answer", "output", "reply", "generation", "model_output", "model_response", "assistant",
    "assistant_response", "bot_response", "solution",
)  # fmt: skip
MESSAGES = ("conversations", "messages", "conversation", "dialogue", "dialog", "chat", "turns", "chat_messages")
CHOSEN = (
    "chosen", "preferred_output", "chosen_response", "chosen_messages", "preferred", "preferred_response",
    "preferred_completion", "response_chosen", "accepted", "winner",
)  # fmt: skip
REJECTED = (
    "rejected", "non_preferred_output", "rejected_response", "rejected_responses", "rejected_messages", "non_preferred",
    "non_preferred_response", "dispreferred", "dispreferred_output", "dispreferred_response",
    "dispreferred_completion", "response_rejected", "loser",
)  # fmt: skip
RANKED = ("completions", "responses", "answers", "generations", "outputs", "candidates", "replies")
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "sys_prompt")
HISTORY = ("history", "chat_history", "conversation_history", "context", "previous_turns")
TOOLS = ("tools", "functions")
IMAGES = ("image", "images", "video", "videos", "audio", "audios", "pixel_values")
ABOUT = re.compile(
    r"(?:.*_)?(?:id|uuid|idx|index|hash|url|source|category|behavior|dataset|model|lang|language|split|subset|type|kind|topic|"
    r"tags?|date|time|timestamp|author|annotator|license|version|meta|metadata|scores?|ratings?|comments?|notes?)"
)

NOTED = frozenset(("source", "model", "adapter", "sampling", "time"))  # columns of rows that this program wrote
WRITTEN = "KTO Studio "  # how the ``source`` of such a row begins


def is_noted(column: str, extra: dict[str, Any]) -> bool:
    """Whether a column of a row only says how this program came by the row: nobody expects it to be trained on."""
    source = extra.get("source")
    return column in NOTED and isinstance(source, str) and source.startswith(WRITTEN)


@functools.lru_cache(1000)
def spelled(name: str) -> str:
    """A column's name in small letters with underscores: ``userPrompt`` and ``User Prompt`` are one."""
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"[\W_]+", "_", text).strip("_").lower()


def holds(value: object) -> bool:
    """Whether a cell says anything: not null, NaN, or empty."""
    return not (value is None or value != value or value == "" or value == [] or value == {})
