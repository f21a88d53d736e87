"""What `upload` does at the Hub, in a child process; what huggingface_hub raises becomes one sentence here."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from kto_core.errors import HubError
from kto_core.guards import child
from kto_core.jobs import duration

from . import origin
from .upload import scrub

TAG = "kto-studio"  # marks a model card as ours: only such a card is written over
FIRST = {".gitattributes"}  # all that a new repository has


def ask(repo: str, private: bool, token: str, base: str) -> dict[str, Any]:
    """See `upload.prepare`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi(token=token)
    with _explained(repo, token):
        who = api.whoami()
        try:
            is_private: bool | None = bool(api.model_info(repo, timeout=30).private)
        except RepositoryNotFoundError:
            is_private = None
    if not _may_write(who, repo, new=is_private is None):
        raise HubError(_no_write_access(repo))
    if private and is_private is False:
        raise HubError(
            f"The repository {repo} already exists and is public. Choose another name, make it private on the Hub, "
            "or allow a public upload."
        )
    if not private and is_private:
        raise HubError(
            f"The repository {repo} already exists and is private. Upload privately, choose another name, or make it "
            "public on the Hub first."
        )
    return {"exists": is_private is not None, "base": _stated(api, base) if base else {}}


def _may_write(who: dict[str, Any], repo: str, new: bool) -> bool:
    """Whether a token may write, as far as the Hub says so; what it does not say is found out by the upload."""
    token = (who.get("auth") or {}).get("accessToken") or {}
    owner = repo.split("/")[0]
    if new and owner not in [who.get("name"), *(o.get("name") for o in who.get("orgs") or [])]:
        return False
    scoped = (token.get("fineGrained") or {}).get("scoped")
    if token.get("role") == "fineGrained" and isinstance(scoped, list):
        names = {owner.lower(), repo.lower()}
        return any(
            "repo.write" in (s.get("permissions") or [])
            and str((s.get("entity") or {}).get("name", "")).lower() in names
            for s in scoped
        )
    return token.get("role") != "read"


def _stated(api, base: str) -> dict[str, Any]:
    """What the card of a public base states; a base without one, or that cannot be seen, states nothing."""
    import httpx
    from huggingface_hub import errors

    try:
        return origin.stated(Path(api.hf_hub_download(base, "README.md")).read_text("utf-8"))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, httpx.HTTPError, OSError, ValueError):
        return {}


def send(repo: str, token: str, files: list[list[str]], card: str, new: bool, private: bool) -> str:
    """See `upload.upload`. Large files go first, one by one, then one commit makes all of it visible."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    with _explained(repo, token):
        if new:
            api.create_repo(repo, private=True)
        operations = []
        for i, (path, name) in enumerate(files):
            child.tell(i, name)
            operations.append(CommitOperationAdd(name, path))
            api.preupload_lfs_files(repo, operations[-1:], num_threads=1, free_memory=False)
        child.tell(len(files), "README.md")
        if text := _card_to_write(api, repo, card):
            operations.append(CommitOperationAdd("README.md", text.encode()))
        api.create_commit(repo, operations, commit_message="Upload from KTO Studio")
    if new and not private:
        child.tell(None, "Making the repository public…")
        try:
            with _explained(repo, token):
                api.update_repo_settings(repo, visibility="public")
        except HubError as e:
            raise HubError(
                f"Everything was uploaded to {repo}, but it is still private: {e} Make it public on the Hub."
            ) from None
    return f"{api.endpoint}/{repo}"


def tidy(repo: str, token: str) -> bool:
    """Delete a repository that this upload made and put nothing into. Returns whether it did."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi(token=token)
    with _explained(repo, token):
        try:
            there = {s.rfilename for s in api.model_info(repo, timeout=30).siblings or []}
        except RepositoryNotFoundError:
            return False
        if there - FIRST:
            return False
        api.delete_repo(repo, missing_ok=True)
    return True


def _card_to_write(api, repo: str, card: str) -> str:
    """Our card with what the user added to an earlier one of ours; "" if the card there is not ours."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import EntryNotFoundError

    try:
        text = Path(api.hf_hub_download(repo, "README.md", force_download=True)).read_text("utf-8")
        there: Any = ModelCard(text).data  # a ModelCardData
    except EntryNotFoundError:
        return card
    except ValueError:  # its header is no YAML: somebody wrote it by hand
        return ""
    if there.tags and TAG not in there.tags:
        return ""
    new = ModelCard(card)
    for field in origin.STATED:
        if value := getattr(there, field, None):
            setattr(new.data, field, value)
    return str(new)


# ---- what went wrong ------------------------------------------------------------------------------------------------


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
        raise HubError(f"{repo} is not a valid repository name: {scrub(_first(e), token)}") from None
    except errors.HfHubHTTPError as e:
        raise HubError(scrub(_refusal(repo, e), token)) from None
    except httpx.HTTPError as e:
        raise HubError(_unreachable(e)) from None
    except OSError as e:
        if e.filename:
            raise HubError(f"{Path(e.filename).name} is unreadable ({e.strerror}). Create it again.") from None
        raise HubError(_unreachable(e)) from None
    except ValueError as e:
        raise HubError(f"The Hub rejected the upload: {scrub(_first(e), token)}") from None


def _unreachable(e: BaseException) -> str:
    return (
        f"The Hub cannot be reached ({type(e).__name__}). Check the network or proxy and try again; nothing was "
        "published."
    )


def _no_write_access(repo: str) -> str:
    return (
        f"This token has no write access to {repo} (403). Use a token with write access to {repo.split('/')[0]}, or "
        "upload to your own account."
    )


def _refusal(repo: str, e) -> str:
    if getattr(e, "response", None) is None:
        return _unreachable(e)
    code = e.response.status_code
    said = str(getattr(e, "server_message", None) or _first(e))
    if code == 401:
        return "The Hub rejected this token (401). Create a new one with write access and try again."
    if code in (402, 403, 413) and "storage" in said.lower():
        return _full(repo, said, code)
    if code == 403:
        return _no_write_access(repo)
    if code == 404:
        return f"{repo} does not exist, or this token cannot access it (404). Check the owner's name and the token."
    if code == 413:
        return f"The Hub refuses a file as too large (413): {said}"
    if code == 429:
        return f"The Hub is limiting requests (429). {_wait(e)} Nothing was published."
    if code >= 500:
        return f"The Hub has a server error ({code}). Nothing was published. Try again later."
    return f"The Hub returned an error for {repo} ({code}): {said}"


def _full(repo: str, said: str, code: int) -> str:
    owner = repo.split("/")[0]
    kind, way = "storage", ""
    if "private" in said.lower():
        kind, way = "storage for private repositories", "upload publicly, "
    return (
        f"The {kind} of {owner} on the Hub is used up ({code}): {said.rstrip('.')}. Delete what is no longer needed "
        f"there, {way}or get more storage."
    )


def _wait(e) -> str:
    """How long to wait, if the Hub says so."""
    after = str(e.response.headers.get("Retry-After", ""))
    found = re.search(r"[Rr]etry after (\d+) seconds", str(e))
    seconds = int(after) if after.isdigit() else int(found[1]) if found else 0
    return f"Try again in {duration(seconds)}." if seconds else "Wait a few minutes and try again."


def _first(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return (lines[0] if lines else type(e).__name__)[:300]
