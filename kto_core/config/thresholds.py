"""Where a scale of ratings is cut: the one rule that `good_from` and `bad_to` must keep, whoever gives them."""

from __future__ import annotations


def disorder(good_from: float | None, bad_to: float | None) -> str:
    """Why the two do not fit together, in a sentence that starts with the field's name; "" if they do."""
    if good_from is None or bad_to is None or bad_to < good_from:
        return ""
    return f"bad_to: must be below good_from, but {bad_to:g} is not below {good_from:g}. Lower it, or raise good_from."
