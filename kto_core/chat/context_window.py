"""How much of a conversation a model's context has room for. Knows neither the model nor its chat template."""

from __future__ import annotations

from collections.abc import Callable

from kto_core.errors import ModelError


def fit(
    messages: list[dict], render: Callable[[list[dict]], list[int]], room: int, check: Callable[[], None]
) -> tuple[list[int], int]:
    """Token ids of the newest turns that fit, and how many messages were left out for it.

    What is kept begins with a question; a system prompt at the head stays. Fewer turns never take more tokens, so the
    first turn to keep is found by halving: eleven renderings for two thousand turns, not two thousand.

    Args:
        messages: role/content dicts, the one to be answered last.
        render: messages -> token ids.
        room: tokens that the ids may have.
        check: called before each rendering; raises when nobody wants the answer any more.

    Raises:
        ModelError: the last question alone has no room.
    """
    system = [m for m in messages[:1] if m["role"] == "system"]
    turns = messages[len(system) :]
    starts = [i for i, m in enumerate(turns) if m["role"] == "user"] or [0]
    low, high, at, found = 0, len(starts) - 1, 0, None  # most conversations fit whole: that is tried first
    while low <= high:
        check()
        ids = render(system + turns[starts[at] :])
        if len(ids) <= room:
            found, high = (ids, starts[at]), at - 1
        else:
            low = at + 1
        at = (low + high) // 2
    if found is None:
        raise ModelError(f"This message has {len(ids):,} tokens, but the model accepts at most {room:,}. Shorten it.")
    return found
