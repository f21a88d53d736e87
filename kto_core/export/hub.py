"""Uploads to the Hugging Face Hub: one commit, in a child process, with a token that is kept nowhere.

The token goes to the child through its stdin; it is in no file, command line, log or message.
"""

from __future__ import annotations

import contextlib
import re
import threading
from pathlib import Path

from kto_core.errors import HubError
from kto_core.guards import child
from kto_core.jobs import Progress, no_progress
from kto_core.paths import is_hub_id

TAG = "kto-studio"  # marks a model card as ours: only such a card is written over


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


def prepare(repo: str, private: bool, token: str, *, progress: Progress = no_progress, cancel=None) -> bool:
    """Make the repository unless it is there. Returns whether it is private.

    Raises:
        HubError: refused, not reachable, or a repository that everybody sees although ``private``.
    """
    progress(None, "Contacting the Hub…")
    return _call("ask", {"repo": repo, "private": private, "token": token}, progress, cancel)


def upload(
    repo: str,
    token: str,
    files: list[tuple[Path, str]],
    card: str,
    *,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> str:
    """Upload files and the model card in one commit; what is there unchanged is not sent again.

    A card that somebody else wrote is left alone; of ours, the licence and language that the user put in stay.

    Args:
        files: (local file, path in the repository).

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
        at[0] = int(index or 0)
        show(0.0)

    def bar(line: str) -> None:
        if found := re.search(r"(\d+)%\|", line):
            show(int(found[1]) / 100)

    arguments = {"repo": repo, "token": token, "files": [[str(p), name] for p, name in files], "card": card}
    url = _call("send", arguments, next_file, cancel, bar)
    progress(1.0, f"Uploaded to {repo}.")
    return url


def _call(function: str, arguments: dict, progress: Progress, cancel, on_line=lambda line: None):
    env = {"HF_HUB_DISABLE_PROGRESS_BARS": "0"}
    try:
        more = {"progress": progress, "cancel": cancel, "env": env, "on_line": on_line}
        return child.call("export.hub", function, arguments, what="The upload", **more)
    except child.ChildFailed as e:
        raise HubError(_scrub(str(e), arguments["token"])) from None


def _scrub(text: str, token: str) -> str:
    return text.replace(token, "…") if token else text


# ---- in the child ---------------------------------------------------------------------------------------------------


def ask(repo: str, private: bool, token: str) -> bool:
    """See `prepare`."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with _explained(repo, token):
        api.whoami()
        api.create_repo(repo, private=private, exist_ok=True)
        found = bool(api.model_info(repo, timeout=30).private)
    if private and not found:
        raise HubError(
            f"The repository {repo} already exists and is public. Choose another name, make it private on the Hub, "
            "or allow a public upload."
        )
    return found


def send(repo: str, token: str, files: list[list[str]], card: str) -> str:
    """See `upload`. Large files go first, one by one, then one commit makes all of it visible."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    with _explained(repo, token):
        operations = []
        for i, (path, name) in enumerate(files):
            child.tell(i, name)
            operations.append(CommitOperationAdd(name, path))
            api.preupload_lfs_files(repo, operations[-1:], num_threads=1, free_memory=False)
        child.tell(len(files), "README.md")
        if text := _card_to_write(api, repo, card):
            operations.append(CommitOperationAdd("README.md", text.encode()))
        api.create_commit(repo, operations, commit_message="Upload from KTO Studio")
    return f"{api.endpoint}/{repo}"


def _card_to_write(api, repo: str, card: str) -> str:
    """Our card with what the user added to an earlier one of ours; "" if the card there is not ours."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import EntryNotFoundError

    try:
        there = ModelCard(Path(api.hf_hub_download(repo, "README.md", force_download=True)).read_text("utf-8"))
    except EntryNotFoundError:
        return card
    except ValueError:  # its header is no YAML: somebody wrote it by hand
        return ""
    if there.data.tags and TAG not in there.data.tags:
        return ""
    new = ModelCard(card)
    for field in ("license", "license_name", "license_link", "language"):
        if value := getattr(there.data, field, None):
            setattr(new.data, field, value)
    return str(new)


@contextlib.contextmanager
def _explained(repo: str, token: str):
    """Turn what huggingface_hub raises into one sentence, without the token."""
    import httpx
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise HubError("Offline mode is on (HF_HUB_OFFLINE), so nothing can be uploaded. Unset it.") from None
    except errors.HFValidationError as e:
        raise HubError(f"{repo} is not a valid repository name: {_scrub(_first(e), token)}") from None
    except errors.HfHubHTTPError as e:
        raise HubError(_scrub(_refusal(repo, e), token)) from None
    except httpx.HTTPError as e:
        raise HubError(_unreachable(e)) from None
    except OSError as e:
        if e.filename:
            raise HubError(f"{Path(e.filename).name} is unreadable ({e.strerror}). Create it again.") from None
        raise HubError(_unreachable(e)) from None
    except ValueError as e:
        raise HubError(f"The Hub rejected the upload: {_scrub(_first(e), token)}") from None


def _unreachable(e: BaseException) -> str:
    return (
        f"The Hub cannot be reached ({type(e).__name__}). Check the network or proxy and try again; nothing was "
        "published."
    )


def _refusal(repo: str, e) -> str:
    if getattr(e, "response", None) is None:
        return _unreachable(e)
    code = e.response.status_code
    owner = repo.split("/")[0]
    if code == 401:
        return "The Hub rejected this token (401). Create a new one with write access and try again."
    if code == 403:
        return (
            f"This token has no write access to {repo} (403). Use a token with write access to {owner}, or upload to "
            "your own account."
        )
    if code == 404:
        return f"{repo} does not exist, or this token cannot access it (404). Check the owner's name and the token."
    if code == 413 or "storage" in str(getattr(e, "server_message", "")).lower():
        return f"The storage quota for {repo} is used up ({code}): {_first(e)}"
    if code == 429:
        return "The Hub is limiting requests (429). Wait a few minutes and try again."
    if code >= 500:
        return f"The Hub has a server error ({code}). Nothing was published. Try again later."
    return f"The Hub returned an error for {repo} ({code}): {getattr(e, 'server_message', None) or _first(e)}"


def _first(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return (lines[0] if lines else type(e).__name__)[:300]
