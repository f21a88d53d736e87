"""A blind vote as its file: every prompt, pair of answers, edit and vote is a line that is on the disk when it counts.

Two windows, a second process and a restarted app read the same file; only the end that is new is read again. A line
that a crash cut off, or that somebody damaged, is skipped and counted. Nothing of which side is which leaves this
module for a page but `Shown`, which has only what it shows.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kto_core.errors import DataError, DiskError
from kto_core.guards import bounded
from kto_core.runs.event_reader import lines

from . import entries
from .counting import Counts
from .entries import CHOICES, PLACES, Answer, Messages, Pair, Settings
from .sides import KEYS

ENDING = ".jsonl"
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.0, "max_new_tokens": 512}


@dataclass(frozen=True)
class Shown:
    """All that who votes may see of a pair: the same for both sides' names."""

    number: int
    prompt: Messages
    left: str
    right: str
    edited: tuple[str, str]  # of the left and of the right answer, "" for none


@dataclass(frozen=True)
class Drawn:
    """What is drawn for a prompt, from the vote's seed and the prompt's number alone: a crash changes nothing."""

    left: str
    first: str  # the side that answers first
    seed: int


class Session:
    """One vote. `folder` makes and finds it; safe for several threads and processes."""

    def __init__(self, path: Path, settings: Settings):
        self.path, self.settings = path, settings
        self.skipped = 0  # lines that cannot be read
        self.remarks: list[str] = []  # what a reader of the result must know
        self._prompts: dict[int, Messages] = {}
        self._pairs: dict[int, Pair] = {}
        self._offset = 0
        self._stamp: tuple[int, int, int] | None = None
        self._lock = threading.RLock()

    @property
    def id(self) -> str:
        return self.path.name.removesuffix(ENDING)

    # ---- reading

    def refresh(self) -> Session:
        """Read what was added since. Quick where nothing was."""
        with self._lock:
            stamp = bounded.stamp(self.path)
            if stamp is None:
                raise DataError(f"Vote {self.id} no longer exists. Start a new one.")
            if stamp == self._stamp:
                return self
            if stamp[1] < self._offset:  # another file
                self._prompts, self._pairs, self.remarks, self._offset, self.skipped = {}, {}, [], 0, 0
            try:
                for line, offset in lines(self.path, self._offset, stamp[1]):
                    self._fold(line)
                    self._offset = offset
            except OSError as e:
                raise DataError(f"Vote {self.id} cannot be read: {bounded.reason(e)}.") from e
            self._stamp = stamp
            return self

    def _fold(self, line: bytes | None) -> None:
        try:
            found = json.loads(line or b"")
            kind = found.get("kind") if isinstance(found, dict) else None
            if kind == "prompt":
                number, messages = entries.prompt_of(found)
                self._prompts.setdefault(number, messages)
            elif kind == "remark":
                self.remarks += [text] if (text := entries.remark_of(found)) not in self.remarks else []
            elif kind == "pair":
                pair = entries.pair_of(found)
                self._pairs.setdefault(pair.number, pair)
            elif kind in ("vote", "edit"):
                pair = self._pairs[found.get("number")]
                (entries.add_vote if kind == "vote" else entries.add_edit)(pair, found)
            elif kind != "session":
                raise ValueError("no entry")
        except (ValueError, KeyError, TypeError, RecursionError):
            self.skipped += 1

    def pairs(self) -> list[Pair]:
        """Answered prompts, in the order of their numbers."""
        with self._lock:
            return sorted(self._pairs.values(), key=lambda pair: pair.number)

    def prompts(self) -> list[Messages]:
        with self._lock:
            return list(self._prompts.values())

    def unanswered(self) -> list[tuple[int, Messages]]:
        """(number, messages) of the prompts that no pair has yet."""
        with self._lock:
            return sorted((n, m) for n, m in self._prompts.items() if n not in self._pairs)

    def waiting(self) -> int:
        """Pairs that wait for a vote."""
        return sum(pair.waits for pair in self.pairs())

    def shown(self) -> Shown | None:
        """The pair that is to be voted on, or None."""
        pair = next((pair for pair in self.pairs() if pair.waits), None)
        if pair is None:
            return None
        left, right = (pair.side(place) for place in PLACES)
        edited = (pair.edits.get(left, ""), pair.edits.get(right, ""))
        return Shown(pair.number, pair.prompt, pair.answers[left].text, pair.answers[right].text, edited)

    def counts(self) -> Counts:
        """Votes for and against side ``a``."""
        pairs = self.pairs()
        won = [pair.winner for pair in pairs if pair.choice]
        return Counts(
            won.count("a"),
            won.count("b"),
            sum(pair.choice == "tie" for pair in pairs),
            sum(pair.choice == "bad" for pair in pairs),
            sum(pair.identical for pair in pairs),
        )

    def draw(self, number: int) -> Drawn:
        """Which side is left, which answers first, and the answers' seed."""
        drawn = random.Random(f"{self.settings.seed}:{number}")
        return Drawn(drawn.choice(KEYS), drawn.choice(KEYS), drawn.randrange(2**31))

    # ---- writing

    def add_prompts(self, prompts: Iterable[Messages], most: int | None = None) -> int:
        """Add the first ``most`` prompts that are not in this vote yet; how many these were.

        They get the system prompt, if one is set. Raises DiskError.
        """
        with self._writing():
            known = {json.dumps(m, sort_keys=True) for m in self._prompts.values()}
            at, new = max(self._prompts, default=0), list[dict[str, Any]]()
            for messages in prompts:
                if len(new) == most:
                    break
                asked = self._with_system(messages)
                key = json.dumps(asked, sort_keys=True)
                if key not in known:
                    known.add(key)
                    new.append({"kind": "prompt", "number": at + len(new) + 1, "messages": asked, "t": now()})
            if new:
                self._append(new)
            return len(new)

    def add_remarks(self, remarks: Iterable[str]) -> None:
        """Keep what a reader of the result must know. Raises DiskError."""
        with self._writing():
            new = [text for text in remarks if text not in self.remarks]
            self._append([{"kind": "remark", "text": text, "t": now()} for text in new])

    def _with_system(self, messages: Messages) -> Messages:
        system = self.settings.system.strip()
        if not system or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": system}, *messages]

    def add_pair(self, number: int, answers: dict[str, Answer]) -> None:
        """Both sides' answers to a prompt. The first pair of a prompt counts. Raises DiskError."""
        with self._writing():
            drawn, s = self.draw(number), self.settings
            entry = {
                "kind": "pair",
                "number": number,
                "messages": self._prompts[number],
                "answers": {key: answers[key].message() for key in KEYS},
                "left": drawn.left,
                "seed": drawn.seed,
                "sides": {"a": s.a.to_dict(), "b": s.b.to_dict()},
                "sampling": s.sampling,
                "t": now(),
            }
            self._append([entry])

    def touch(self) -> None:
        """Make this the newest vote: the one that a page shows."""
        at = time.time_ns()  # the file system's own clock may stand still for some milliseconds
        with contextlib.suppress(OSError):
            os.utime(self.path, ns=(at, at))

    def vote(self, number: int, choice: str) -> bool:
        """Vote on a pair; False if somebody did already, and that vote stays.

        Raises:
            DataError: no such choice, or no such pair. DiskError.
        """
        if choice not in CHOICES:
            raise DataError(f"A vote is one of {', '.join(CHOICES)}.")
        with self._writing():
            pair = self._pair(number)
            if pair.choice:
                return False
            entry = {"kind": "vote", "number": number, "choice": choice, "t": now()}
            self._append([entry | {"winner": pair.side(choice) if choice in PLACES else ""}])
            return True

    def edit(self, number: int, place: str, text: str) -> None:
        """Keep a better answer for the one at ``place``; an unchanged or empty text takes an edit back.

        Raises:
            DataError: no such place or pair. DiskError.
        """
        if place not in PLACES:
            raise DataError(f"An answer is one of {' or '.join(PLACES)}.")
        with self._writing():
            pair = self._pair(number)
            side, text = pair.side(place), text.strip()
            if text == pair.answers[side].text.strip():
                text = ""
            if text != pair.edits.get(side, ""):
                self._append([{"kind": "edit", "number": number, "side": side, "text": text, "t": now()}])

    def _pair(self, number: int) -> Pair:
        pair = self._pairs.get(number)
        if pair is None:
            raise DataError("This pair of answers is not part of the vote. Reload the page.")
        return pair

    @contextlib.contextmanager
    def _writing(self):
        """One writer at a time on this machine, who knows all that was written before."""
        with self._lock:
            try:
                fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            except FileNotFoundError:
                raise DataError(f"Vote {self.id} no longer exists. Start a new one.") from None
            except OSError as e:
                raise DiskError.of(self.path, e) from e
            self._fd = fd
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                yield self.refresh()
            finally:
                os.close(fd)

    def _append(self, new: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in new)
        try:
            size = os.fstat(self._fd).st_size
            if size and os.pread(self._fd, 1, size - 1) != b"\n":  # a crash cut the last line off
                text = "\n" + text
            data = text.encode("utf-8", "backslashreplace")
            while data:
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)
        except OSError as e:
            raise DiskError.of(self.path, e) from e
        self.refresh()


def now() -> float:
    return round(time.time(), 3)
