"""Uploads to the Hugging Face Hub: one commit, in a child process, with a token that is kept nowhere.

The token goes to the child through its stdin; it is in no file, command line, log or message. A new repository is made
at the last moment and is private until all of it is there; one that stays empty is deleted. What runs in the child is
in `calls`.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kto_core.errors import HubError, KTOError
from kto_core.guards import child
from kto_core.jobs import Progress, no_progress
from kto_core.paths import is_hub_id

RETRY = re.compile(r"(?:Retrying in|Waiting) ([\d.]+)s.*\[Retry (\d+)/(\d+)\]")  # huggingface_hub's own log


@dataclass(frozen=True)
class Found:
    """What the Hub says before an upload. ``exists``: the repository is there, as visible as asked.

    ``base``: what the base model's card states (`origin.STATED`), or {}.
    """

    exists: bool
    base: dict[str, Any]


def find_token(token: str | None = None) -> str | None:
    """The given token, else the one of the environment (HF_TOKEN) or of ``hf auth login``."""
    from huggingface_hub import get_token

    return (token or "").strip() or get_token()


def require(repo: str, token: str | None) -> tuple[str, str]:
    """(repo, token), checked as far as that goes without a network.

    Raises:
        HubError: not owner/name; no token.
    """
    repo = (repo or "").strip()
    if not is_hub_id(repo):
        raise HubError("Enter the repository as owner/name, for example jane/my-model.")
    found = find_token(token)
    if not found:
        raise HubError(
            "No access token found. Set HF_TOKEN, run `hf auth login`, or enter a token with write access "
            "(huggingface.co/settings/tokens)."
        )
    if not found.isascii() or any(c.isspace() for c in found):
        raise HubError("The access token contains invalid characters. Copy it again, without spaces.")
    return repo, found


def prepare(
    repo: str, private: bool, token: str, base: str = "", *, progress: Progress = no_progress, cancel=None
) -> Found:
    """Look whether this token may write there, before hours of work; nothing is made.

    Args:
        base: Hub id of the base model, whose licence and languages are looked up, or "".

    Raises:
        HubError: refused, not reachable, or a repository that is there with another visibility than asked for.
    """
    progress(None, "Contacting the Hub…")
    arguments = {"repo": repo, "private": private, "token": token, "base": base}
    return Found(**_call("ask", arguments, progress, cancel))


def upload(
    repo: str,
    token: str,
    files: list[tuple[Path, str]],
    card: str,
    *,
    new: bool = False,
    private: bool = True,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> str:
    """Upload files and the model card in one commit; what is there unchanged is not sent again.

    A card that somebody else wrote is left alone; of ours, the licence and language that the user put in stay.

    Args:
        files: (local file, path in the repository).
        new: the repository is not there yet. It is made private, filled, and made public if not ``private``.

    Returns:
        The repository's address.

    Raises:
        HubError: refused or not reachable; nothing of this upload is then visible at the Hub.
        Cancelled: ``cancel`` was set; likewise.
    """
    sizes = [path.stat().st_size for path, _ in files]
    total, at = max(1, sum(sizes)), [0]

    def show(share: float) -> None:
        sent = sum(sizes[: at[0]]) + share * (sizes[at[0]] if at[0] < len(sizes) else 0)
        name = files[at[0]][1] if at[0] < len(files) else "the commit"
        progress(0.98 * min(1.0, sent / total), f"Uploading {name}: {sent / 1e6:,.0f} of {total / 1e6:,.0f} MB")

    def next_file(index: float | None, text: str) -> None:
        if index is None:
            progress(None, text)
            return
        at[0] = int(index)
        show(0.0)

    def bar(line: str) -> None:
        if found := re.search(r"(\d+)%\|", line):
            show(int(found[1]) / 100)

    arguments = {"repo": repo, "token": token, "files": [[str(p), name] for p, name in files], "card": card,
                 "new": new, "private": private}  # fmt: skip
    try:
        url = _call("send", arguments, next_file, cancel, bar)
    except KTOError:
        if new:
            with contextlib.suppress(HubError):  # what went wrong first is what the user needs to know
                _call("tidy", {"repo": repo, "token": token}, no_progress, None)
        raise
    progress(1.0, f"Uploaded to {repo}.")
    return url


def _call(
    function: str, arguments: dict, progress: Progress, cancel, on_line: Callable[[str], None] = lambda line: None
):
    def read(line: str) -> None:
        if found := RETRY.search(line):
            seconds, attempt, of = found.groups()
            progress(None, f"The Hub does not answer. Trying again in {float(seconds):.0f} s ({attempt} of {of})…")
        on_line(line)

    env = {"HF_HUB_DISABLE_PROGRESS_BARS": "0"}
    try:
        more = {"progress": progress, "cancel": cancel, "env": env, "on_line": read}
        return child.call("export.hub.calls", function, arguments, what="The upload", **more)
    except child.ChildFailed as e:
        raise HubError(scrub(str(e), arguments["token"])) from None


def scrub(text: str, token: str) -> str:
    """A text without the token."""
    return text.replace(token, "…") if token else text
