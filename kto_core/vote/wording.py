"""The result of a vote in words and as numbers, for the terminal and the page."""

from __future__ import annotations

from typing import Any

from . import counting
from .counting import MOST, WORDS, Result
from .session import Session
from .sides import Side

RULE = "The interval holds however often you look and whenever you stop."


def judged(session: Session) -> Result:
    """The result so far."""
    return counting.result(session.refresh().counts())


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def sentence(found: Result, a: Side, b: Side) -> str:
    """Better, no difference yet, or worse."""
    if not found.counts.votes:
        return "No votes yet."
    if found.word == WORDS[1]:
        return f"No difference between {a.name} and {b.name} can be told yet."
    return f"{a.name[0].upper()}{a.name[1:]} is {found.word} than {b.name}."


def left(found: Result) -> str:
    """How many votes more would settle it; "" where nothing is to be settled."""
    if not found.counts.votes or found.more == 0:
        return ""
    if found.more is not None:
        votes = "1 vote more" if found.more == 1 else f"{found.more:,} votes more"
        return f"At the present rate about {votes} would settle it."
    if found.counts.wins == found.counts.losses:
        return "So far neither side is ahead, so no number of votes can be named."
    return f"At the present rate more than {MOST:,} decided votes would be needed: take it as no difference."


def facts(found: Result) -> list[tuple[str, str]]:
    """(name, value) of the numbers, for side ``a``."""
    c, low, high = found.counts, *found.interval
    identical = f", {c.identical} not asked (identical answers)" if c.identical else ""
    lines = [
        ("Votes", f"{c.asked}: {c.wins} for, {c.losses} against, {c.ties} no difference, {c.bad} both bad{identical}")
    ]
    if found.rate is not None:
        lines.append(("Win rate", f"{percent(found.rate)} (ties half)"))
    if found.decided is not None:
        of = f"{percent(found.decided)} of {c.wins + c.losses} decided votes"
        lines.append(("Interval", f"{of}, 95 % interval {percent(low)} to {percent(high)}"))
    return lines


def to_dict(session: Session) -> dict[str, Any]:
    """What `vote result --json` prints."""
    found, s = judged(session), session.settings
    c = found.counts
    return {
        "vote": session.id,
        "a": {"model": s.a.model, "run": s.a.run, "checkpoint": s.a.checkpoint},
        "b": {"model": s.b.model, "run": s.b.run, "checkpoint": s.b.checkpoint},
        "sampling": s.sampling,
        "seed": s.seed,
        "votes": c.asked,
        "wins": c.wins,
        "losses": c.losses,
        "ties": c.ties,
        "both_bad": c.bad,
        "identical": c.identical,
        "win_rate": found.rate,
        "decided_win_rate": found.decided,
        "interval": list(found.interval),
        "verdict": found.word,
        "votes_more": found.more,
        "sentence": sentence(found, s.a, s.b),
        "remarks": session.remarks,
        "prompts_left": len(session.unanswered()) + session.waiting(),
        "skipped_lines": session.skipped,
    }
