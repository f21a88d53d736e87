"""Where things lie: folders of this machine, which move by an environment variable, and ids on the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import DiskError

_PACKAGE = Path(__file__).resolve().parent
ROOT = _PACKAGE.parent  # what a process of its own needs on its path to import us


def _shipped(name: str) -> Path:
    """A file or folder that comes with the program: inside the package where it was installed, else in the checkout."""
    inside = _PACKAGE / name
    return inside if inside.exists() else ROOT / name


PRESETS = _shipped("presets")
EXAMPLES = _shipped("examples")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
_CONFIGURATION = re.compile(r"[\w.-]+")


def requirements(unsloth: bool) -> Path:
    """The exact versions that were tested, as pip reads them: with Unsloth or without."""
    return _shipped("requirements-unsloth.txt" if unsloth else "requirements.txt")


def runs_dir() -> Path:
    """``$KTO_STUDIO_RUNS``, else ``runs`` in the working directory. Made by whoever writes."""
    return Path(os.environ.get("KTO_STUDIO_RUNS") or "runs").expanduser().resolve()


def cache_dir() -> Path:
    """``$KTO_STUDIO_CACHE``, else ``~/.cache/kto-studio``: demo model, GGUF converter, reference log-probs."""
    return Path(os.environ.get("KTO_STUDIO_CACHE") or "~/.cache/kto-studio").expanduser().resolve()


def data_dir() -> Path:
    """``$KTO_STUDIO_DATA``, else ``data`` beside the runs folder: uploaded files and feedback from the chat."""
    return Path(os.environ.get("KTO_STUDIO_DATA") or runs_dir().parent / "data").expanduser().resolve()


def votes_dir() -> Path:
    """``$KTO_STUDIO_VOTES``, else ``votes`` beside the runs folder: the blind votes. The page serves no file of it."""
    return Path(os.environ.get("KTO_STUDIO_VOTES") or runs_dir().parent / "votes").expanduser().resolve()


def is_hub_id(name: str) -> bool:
    """Whether a name can be a repository's on the Hub (``owner/name``). A folder here may have the same name."""
    return bool(_HUB_ID.fullmatch(name)) and "--" not in name and ".." not in name


def is_hub_dataset(name: str) -> bool:
    """The same for a data set: the oldest have no owner, and a configuration may follow (``owner/name:config``)."""
    repo, colon, configuration = name.partition(":")
    owned = repo if "/" in repo else f"owner/{repo}"
    return is_hub_id(owned) and (not colon or bool(_CONFIGURATION.fullmatch(configuration)))


def make_folder(path: Path, what: str, variable: str) -> Path:
    """Make a folder that is not there yet.

    Args:
        what: what lies in it, for the error.
        variable: the environment variable that moves it.

    Raises:
        DiskError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DiskError(
            f"The folder for {what}, {path}, cannot be created ({e.strerror or e}). Create it, or set {variable} "
            "to another."
        ) from e
    return path
