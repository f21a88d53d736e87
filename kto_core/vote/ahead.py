"""Pairs of answers are made ahead, in the background, while somebody reads the one before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from kto_core import jobs
from kto_core.chat.chat import Chat
from kto_core.data.records import thoughts
from kto_core.jobs import Progress, check_cancel, no_progress

from .entries import Answer, Messages
from .session import Session
from .sides import KEYS, Side

WAITING = 3  # pairs that wait for a vote, the one that is shown included, before the models pause
JOB = "Blind vote "
Load = Callable[[Session, Progress, threading.Event], Chat]


def target(side: Side) -> tuple[str, str]:
    """(target, checkpoint) of a side, as `Chat.load` and `Chat.join` take them."""
    return side.folder or side.run, side.checkpoint


def load(session: Session, progress: Progress = no_progress, cancel: threading.Event | None = None) -> Chat:
    """A Chat of one's own with both sides on one set of weights. Raises as `Chat.load`."""
    name, checkpoint = target(session.settings.a)
    loaded = Chat.load(name, checkpoint=checkpoint or None, progress=progress, cancel=cancel)
    try:
        beside(loaded, session, progress, cancel)
    except BaseException:
        loaded.unload()
        raise
    return loaded


def beside(loaded: Chat, session: Session, progress: Progress = no_progress, cancel=None) -> None:
    """Put side ``b``'s adapter beside a loaded side ``a``, if ``b`` is a run. Raises as `Chat.join`."""
    if session.settings.b.run:
        name, checkpoint = target(session.settings.b)
        loaded.join(name, checkpoint=checkpoint or None, progress=progress, cancel=cancel)


def make_pair(
    session: Session, loaded: Chat, number: int, messages: Messages, cancel: threading.Event | None = None
) -> None:
    """Answer a prompt with both sides and keep the pair. Which side goes first is drawn; nothing is shown before both
    are complete.

    Raises:
        Cancelled, Unloaded, ModelError: as `Chat.stream`; nothing is kept then.
    """
    drawn, answers = session.draw(number), {}
    order = (drawn.first, *(key for key in KEYS if key != drawn.first))
    for key in order:
        options: dict[str, Any] = dict(session.settings.sampling)
        options |= {"tuned": key == "a", "other": key == "b" and bool(session.settings.b.run)}
        stream = loaded.stream(messages, seed=drawn.seed, cancel=cancel, gives_way=True, **options)
        text = "".join(stream)
        check_cancel(cancel)  # an answer that was cut off is no answer
        thought, said = thoughts.split(text, unfinished=True)
        answers[key] = Answer(said.strip(), thought)
    session.add_pair(number, answers)


def fill(
    session: Session, loaded: Chat, progress: Progress = no_progress, cancel: threading.Event | None = None
) -> None:
    """Make pairs until `WAITING` wait for a vote, or every prompt is answered. Raises as `make_pair`."""
    while (waits := session.refresh().waiting()) < WAITING and (left := session.unanswered()):
        check_cancel(cancel)
        progress(waits / WAITING, f"Both models answer prompt {left[0][0]}…")
        make_pair(session, loaded, *left[0], cancel)


class Ahead:
    """Keeps a vote supplied with pairs. ``job``: the newest filling, None before the first.

    Args:
        load: gives the loaded models; called in the background, each time anew.
    """

    def __init__(self, session: Session, load: Load):
        self.session, self.load = session, load
        self.job: jobs.Job | None = None
        self._starting = threading.Lock()

    def kick(self, before: Callable[[Progress, threading.Event], None] | None = None) -> None:
        """Begin to fill, if there is something to do and nobody does it.

        Args:
            before: what has to be done first, with progress and cancel (to read prompts); a filling that goes on is
                ended for it.
        """
        with self._starting:
            if before is not None:
                self.stop()
            elif (self.job is not None and self.job.running) or not self._wanted():
                return
            self.job = jobs.start(JOB + self.session.id, lambda progress, cancel: self._work(before, progress, cancel))

    def _wanted(self) -> bool:
        return self.session.waiting() < WAITING and bool(self.session.unanswered())

    def _work(self, before, progress: Progress, cancel: threading.Event) -> None:
        if before is not None:
            before(progress, cancel)
        if self._wanted():
            loaded = self.load(self.session, progress, cancel)
            fill(self.session, loaded, progress, cancel)

    def stop(self) -> None:
        """End what is being made now, and wait for it."""
        if self.job is not None and self.job.running:
            self.job.cancel()
            self.job.wait(20)
