"""What the blind vote shows, as pure functions. Of a pair they get `Shown`, which knows no sides."""

from __future__ import annotations

import html

from kto_core.jobs import Job
from kto_core.vote import wording
from kto_core.vote.counting import Result
from kto_core.vote.session import Session, Shown
from kto_studio.shared.jobs_view import bar
from kto_studio.shared.prose import note, prose

from . import view

INTRODUCTION = (
    '<p class="card-text">Two models answer the same prompts. You say which answer is better and do not see whose it '
    "is: sides are drawn at random. Choose a run under Model and press Start voting. Both answer with the "
    "settings of this tab.</p>"
)
KEYS = '<p class="card-text">Keys: ← left, → right, ↓ no difference.</p>'
SOURCES = (("Held-out rows", "held_out"), ("Dataset", "data"), ("Typed", "typed"))
NO_TEXT = "*No text.*"
ROLES = {"system": "System prompt", "user": "Prompt", "assistant": "Answer"}


def status(session: Session | None, job: Job | None) -> str:
    """What the models do now, or why they do nothing; "" while a pair waits and nothing is wrong."""
    if job is not None and job.state == "failed":
        return note(job.error, "bad")
    if job is not None and job.running and (session is None or session.shown() is None):
        text = prose(job.text or "Loading…")
        return f'{bar(job.fraction, "Making the next pair")}<div class="job-text">{text}</div>'
    if idle(session, job):
        return note("Some prompts of this vote have no answers yet.")
    if session is not None and session.skipped:
        return note(f"{session.skipped:,} lines of this vote cannot be read and do not count.", "bad")
    return ""


def idle(session: Session | None, job: Job | None) -> bool:
    """Whether nobody answers prompts that are left: the app was restarted, or the answering cancelled or failed."""
    waits = session is not None and session.shown() is None and bool(session.unanswered())
    return waits and not (job is not None and job.running)


def prompt(shown: Shown | None) -> str:
    """The prompt of a pair with what came before it; the marker of the styles that there is a pair."""
    if shown is None:
        return ""
    return f'<div class="vote-ready" data-pair="{shown.number}">{"".join(map(_turn, shown.prompt))}</div>'


def _turn(message: dict) -> str:
    role, said = message["role"], html.escape(message["content"])
    return f'<div class="turn {role}"><b>{ROLES[role]}</b><pre>{said}</pre></div>'


def answer(text: str, markdown: bool) -> str:
    """An answer as the conversation shows it, for gr.Markdown."""
    if not text.strip():
        return NO_TEXT
    if not markdown:
        fence = "`" * max(3, 1 + max((len(run) for run in text.split("\n") if set(run.strip()) == {"`"}), default=0))
        return f"{fence}text\n{text}\n{fence}"
    return view.shown(text, True)


def progress(session: Session | None) -> str:
    """How many votes are given and how many prompts are left."""
    if session is None:
        return ""
    counts, left = session.counts(), len(session.unanswered()) + session.waiting()
    if not counts.votes and not left:
        return ""
    done = f"{counts.asked:,} vote{'' if counts.asked == 1 else 's'}"
    skipped = f" · {counts.identical:,} skipped: both answers were the same" if counts.identical else ""
    rest = f"{left:,} left" if left else "no prompts left: add more above, or look at the result"
    share = counts.votes / (counts.votes + left)
    return f'{bar(share, "Votes")}<div class="job-text">{done} · {rest}{skipped}</div>'


def result(session: Session | None) -> str:
    """The judgement with its numbers. Names the sides: this is where they are revealed."""
    if session is None:
        return note("No votes yet.")
    found = wording.judged(session)
    if not found.counts.votes:
        return note("No votes yet.")
    tells = " Looking here after each vote shows which side was which." if session.shown() is not None else ""
    rule = f'<p class="card-text">{prose(wording.RULE + tells)}</p>'
    return _sentence(found, session) + _numbers(found, session) + rule


def _sentence(found: Result, session: Session) -> str:
    s = session.settings
    text = " ".join(filter(None, (wording.sentence(found, s.a, s.b), wording.left(found))))
    return note(text, "good" if found.word == "better" else "bad" if found.word == "worse" else "")


def _numbers(found: Result, session: Session) -> str:
    s = session.settings
    lines = [("For", s.a.name), ("Against", s.b.name), *wording.facts(found)]
    lines += [("Note", text) for text in session.remarks]
    rows = "".join(f'<tr><th scope="row">{html.escape(n)}</th><td>{html.escape(t)}</td></tr>' for n, t in lines)
    return f'<div class="report"><table><tbody>{rows}</tbody></table></div>'


def made(name: str, good: int, bad: int, reference: str) -> str:
    """Which rows the votes became, and what training on them means."""
    return note(f"{good + bad} rows in {name}: {good} 👍 Good, {bad} 👎 Bad. {reference}", "good")
