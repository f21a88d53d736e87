"""Passwords, sessions and what happens to somebody who guesses."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

OWNER, GUEST = "kto", "guest"

IDLE = 12 * 3600.0  # seconds without a request after which a session ends; an open page makes requests
LONGEST = 7 * 24 * 3600.0  # seconds after which it ends in any case
MAX_SESSIONS = 100  # of the owner, and of all guests; a further login ends the one that was unused longest

WINDOW = 300.0  # seconds for which a wrong password slows the following ones
FIRST_DELAY, MAX_DELAY = 0.25, 5.0  # seconds; doubled by each wrong password within the window
MAX_WAITING = 20  # wrong logins that wait at a time; further ones are refused at once


@dataclass
class Accounts:
    """The two passwords of one start of the app, kept in memory only."""

    owner: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    guest: str = field(default_factory=lambda: secrets.token_urlsafe(12))

    def owner_login(self, user: str, password: str) -> bool:
        return user == OWNER and _same(password, self.owner)

    def guest_login(self, user: str, password: str) -> bool:
        return user == GUEST and _same(password, self.guest)


def _same(a: str, b: str) -> bool:
    return hmac.compare_digest(a.encode("utf-8", "surrogatepass"), b.encode())


@dataclass
class Session:
    """One browser that has logged in.

    Attributes:
        origin: what the browser called our page when it logged in; empty: it did not say.
        begun, used: seconds of `time.monotonic`.
    """

    origin: str
    begun: float
    used: float

    def over(self, now: float) -> bool:
        return now - self.used > IDLE or now - self.begun > LONGEST


class Sessions:
    """The open sessions of one role, by the secret that the cookie carries."""

    def __init__(self):
        self._open: dict[str, Session] = {}  # in the order of their last use

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, origin: str = "", now: float | None = None) -> str:
        """The secret of a new session."""
        now = time.monotonic() if now is None else now
        for secret in [s for s, session in self._open.items() if session.over(now)]:
            del self._open[secret]
        while len(self._open) >= MAX_SESSIONS:
            del self._open[next(iter(self._open))]
        secret = secrets.token_urlsafe(32)
        self._open[secret] = Session(origin, now, now)
        return secret

    def find(self, candidates: Iterable[str], now: float | None = None) -> Session | None:
        """The session that one of these secrets opens; it counts as used now."""
        now = time.monotonic() if now is None else now
        for secret in candidates:
            if not (session := self._open.pop(secret, None)) or session.over(now):
                continue
            session.used = now
            self._open[secret] = session
            return session
        return None

    def end(self, candidates: Iterable[str]) -> None:
        for secret in candidates:
            self._open.pop(secret, None)


def cookie_name(role: str, port: int) -> str:
    """Cookies are shared by all ports of a host: the name keeps two of these apps apart."""
    return f"kto-studio-{port}-{role}"


def cookie_values(headers: Iterable[str], name: str) -> list[str]:
    """All values with this name, whatever else the headers have: other programs' cookies can be anything."""
    pairs = (part.partition("=") for header in headers for part in header.split(";"))
    return [value.strip() for key, _, value in pairs if key.strip() == name]


def set_cookie(name: str, value: str, *, secure: bool) -> bytes:
    """The Set-Cookie header of a session; an empty value deletes it. No request of another site's page carries it."""
    end = "" if value else "; Max-Age=0"
    return f"{name}={value}; Path=/; HttpOnly; SameSite=Strict{'; Secure' if secure else ''}{end}".encode("ascii")


class Brake:
    """Slows wrong passwords of one role. The right one is never held: it has 96 bits, so no lock is needed."""

    def __init__(self):
        self._wrong: deque[float] = deque(maxlen=16)
        self._waiting = 0

    def delay(self, now: float | None = None) -> float:
        """Seconds that a wrong password costs now."""
        now = time.monotonic() if now is None else now
        recent = sum(t > now - WINDOW for t in self._wrong)
        return min(MAX_DELAY, FIRST_DELAY * 2**recent)

    async def wrong(self) -> float:
        """Wait as long as this wrong password costs.

        Returns:
            0.0, or without any waiting the seconds after which to try again: too many wait already.
        """
        delay = self.delay()
        self._wrong.append(time.monotonic())
        if self._waiting >= MAX_WAITING:
            return delay
        self._waiting += 1
        try:
            await asyncio.sleep(delay)
        finally:
            self._waiting -= 1
        return 0.0
