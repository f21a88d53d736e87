"""What the blind vote does behind the page: which vote is shown, who answers for it, prompts from where. No layout."""

from __future__ import annotations

import threading
from typing import Any

from kto_core.chat import chat
from kto_core.errors import DataError, ModelError
from kto_core.jobs import Progress, check_cancel
from kto_core.vote import ahead, folder, prompts, sides
from kto_core.vote.ahead import Ahead
from kto_core.vote.entries import Messages
from kto_core.vote.session import Session
from kto_studio.shared import data_sources, model_choices

from .session import POLL, Settings

MOST = 2000  # prompts at once
_supplies: dict[str, Ahead] = {}
_table = threading.Lock()


def supply(session: Session) -> Ahead:
    """Who makes pairs for a vote; one for each vote of this process."""
    with _table:
        return _supplies.setdefault(session.id, Ahead(session, load))


def load(session: Session, progress: Progress, cancel: threading.Event) -> chat.Chat:
    """The app's one loaded model with both sides; somebody else's answer is not cut off.

    Raises:
        ModelError: it could not be loaded. Cancelled.
    """
    side = session.settings.a
    wanted = (side.run, side.checkpoint)
    while (loaded := chat.current()) is None or loaded.asked != wanted:
        if loaded is not None and loaded.answering:
            progress(None, "Waiting until the other model has answered…")
            check_cancel(cancel)
            cancel.wait(POLL)
            continue
        job = model_choices.load(f"run:{side.run}", side.checkpoint)
        while job.running:
            progress(job.fraction, job.text)
            if cancel.wait(POLL):
                job.cancel()
                check_cancel(cancel)
        if job.state != "done":
            raise ModelError(job.error or "The model could not be loaded.")
    ahead.beside(loaded, session, progress, cancel)
    return loaded


def opponents(choice: str | None) -> list[tuple[str, str]]:
    """(label, id) of what the chosen run may be compared with."""
    own = (choice or "").partition(":")[2]
    return [("Its base model", sides.BASE), *((label, name) for name, label in model_choices.talkable() if name != own)]


def sampling(s: Settings) -> dict[str, float]:
    """The tab's settings as `Chat.stream` takes them."""
    return {
        "temperature": s.temperature,
        "top_p": s.top_p,
        "top_k": int(s.top_k),
        "repetition_penalty": s.repetition_penalty,
        "max_new_tokens": int(s.max_tokens),
    }


def begin(s: Settings, against: str, source: str, typed: str, data_id: str, count: Any, new: bool) -> Session:
    """Make a vote, or go on with the last one of these models and settings, and let both models answer.

    Raises:
        KTOError: the models cannot be compared, or there are no prompts.
    """
    if not s.model:
        raise ModelError("Choose a run under Model.")
    a, b = sides.both(model_choices.target(s.model), against or sides.BASE, checkpoint=s.checkpoint or "")
    asked = prompts.typed(typed or "") if source == "typed" else None
    if source == "data":
        data_sources.locate(data_id)
    session = None if new else folder.resume(a, b, sampling(s), s.system)
    if session is None:
        seed = None if s.seed is None or s.seed < 0 else int(s.seed)
        session = folder.create(a, b, sampling(s), s.system, seed)
    most = min(MOST, max(1, int(count or 1)))

    def read(progress: Progress, cancel: threading.Event) -> None:
        found = asked if asked is not None else _prompts(session, source, data_id, progress, cancel)
        if not session.add_prompts(found, most) and not session.unanswered() and not session.waiting():
            raise DataError("All of these prompts were voted on already. Choose others, or start a new vote.")

    session.touch()
    supply(session).kick(read)
    return session


def _prompts(session: Session, source: str, data_id: str, progress: Progress, cancel) -> list[Messages]:
    s = session.settings
    if source == "data":
        loaded = data_sources.load(data_id, progress, cancel)
        return prompts.of_rows(loaded.rows, s.seed, data_sources.name(data_id), cancel)
    progress(None, "Reading the held-out rows…")
    found, remarks = prompts.of_held_out(s.a, s.b, s.seed, progress, cancel)
    session.add_remarks(remarks)
    return found
