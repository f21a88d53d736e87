"""Models on the Hugging Face Hub and in its local cache: is it there, its configuration, its weight files.

Every failure is one sentence that says what to do. Files of other kinds than safetensors, JSON and tokenizers are
never fetched. No torch, no transformers.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
import shutil
import struct
import threading
from pathlib import Path

from .errors import Cancelled, DiskError, ModelError
from .events import fold, read
from .jobs import Progress, check_cancel, no_progress

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model*", "*.txt")
UNWANTED = ("consolidated*", "*/*")  # a second copy in another format, other formats in folders
TIMEOUT = 10  # seconds for one answer of the Hub


def cached_folder(name: str) -> Path | None:
    """Snapshot folder of a Hub id in the local cache if its configuration and all its weights are there."""
    from huggingface_hub import try_to_load_from_cache

    if not HUB_ID.match(name):
        return None
    with contextlib.suppress(ValueError, OSError):  # HFValidationError: an id that cannot be one
        config = try_to_load_from_cache(name, "config.json")
        if not isinstance(config, str):
            return None
        folder = Path(config).parent
        index = folder / "model.safetensors.index.json"
        names = {"model.safetensors"}
        if index.is_file():
            names = set(json.loads(index.read_text())["weight_map"].values())
        if names and all((folder / n).is_file() for n in names):
            return folder
    return None


def tensor_header(file: Path) -> dict[str, dict]:
    """Name -> dtype, shape, place of each tensor in a safetensors file, and ``__metadata__`` if it has any.

    Raises:
        OSError, ValueError, struct.error, MemoryError: it cannot be read, or is no such file.
    """
    with open(file, "rb") as f:
        return json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))


def hub_exists(name: str):
    """What the Hub says about a model id.

    Raises:
        ModelError: no such model, gated, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    if not HUB_ID.match(name):
        raise ModelError(
            f"There is no model {name!r}: neither a folder here nor a Hub id (which looks like owner/name). "
            "Check the spelling, or use `demo`."
        )
    with _explained(name):
        return HfApi().model_info(name, timeout=TIMEOUT, files_metadata=True)


def hub_config(name: str) -> Path:
    """``config.json`` of a Hub id, fetched into the cache. Raises ModelError."""
    from huggingface_hub import hf_hub_download

    with _explained(name):
        return Path(hf_hub_download(name, "config.json", etag_timeout=TIMEOUT))


def download(name: str, progress: Progress = no_progress, cancel: threading.Event | None = None) -> Path:
    """Fetch a model's weights, configuration and tokenizer into the Hub's cache; what is there already is kept.

    Returns:
        The snapshot folder.

    Raises:
        ModelError: not there, gated, no network, or no safetensors weights.
        DiskError: not enough space in the cache.
        Cancelled: ``cancel`` was set; a later call goes on where this one stopped.
    """
    from huggingface_hub import constants, hf_hub_download
    from tqdm import tqdm

    info = hub_exists(name)
    files = {f.rfilename: f.size or 0 for f in info.siblings if _wanted(f.rfilename)}
    if not any(f.endswith(".safetensors") for f in files):
        raise ModelError(f"{name} has no safetensors weights; other formats are not safe to load. Choose another.")
    total, done = sum(files.values()), 0
    _check_space(name, total, Path(constants.HF_HUB_CACHE))

    class Bar(tqdm):
        """Counts bytes instead of drawing, and is where a download can be interrupted."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "disable": True})
            self.seen = kwargs.get("initial") or 0

        def update(self, n=1):
            check_cancel(cancel)
            self.seen += n or 0
            got = done + self.seen
            progress(min(1.0, got / max(total, 1)), f"Fetching {name}: {got / 1e9:.2f} of {total / 1e9:.2f} GB")

    path = ""
    for file, size in sorted(files.items(), key=lambda f: f[1]):
        check_cancel(cancel)
        with _explained(name):
            got = hf_hub_download(name, file, revision=info.sha, etag_timeout=TIMEOUT, tqdm_class=Bar)
        done += size
        path = got if file == "config.json" else path
    if not path:
        raise ModelError(f"{name} has no config.json, so it is not a model that can be loaded. Choose another.")
    with _explained(name):  # names this revision as `main` in the cache, so that it is found without a network
        hf_hub_download(name, "config.json", etag_timeout=TIMEOUT)
    return Path(path).parent


def _wanted(file: str) -> bool:
    def match(patterns):
        return any(fnmatch.fnmatch(file, p) for p in patterns)

    return match(WANTED) and not match(UNWANTED)


def _check_space(name: str, needed: int, cache: Path) -> None:
    place = next(p for p in (cache, *cache.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise DiskError(
            f"{name} needs {needed / 2**30:.1f} GiB in the Hub's cache, {free / 2**30:.1f} GiB are free. "
            "Free some space or set HF_HOME to another disk."
        )


@contextlib.contextmanager
def _explained(name: str):
    """Turn what huggingface_hub raises into a ModelError with a remedy."""
    import httpx
    from huggingface_hub import errors

    try:
        yield
    except Cancelled:
        raise
    except errors.GatedRepoError as e:
        raise ModelError(
            f"{name} is gated: accept its licence on its page, then run `hf auth login` or set HF_TOKEN."
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise ModelError(
            f"There is no model {name} at the Hub, or it is private. Check the spelling or set HF_TOKEN."
        ) from e
    except errors.EntryNotFoundError as e:
        raise ModelError(f"{name} has no such file at the Hub ({e}). Choose another model.") from e
    except errors.HFValidationError as e:
        raise ModelError(f"{name!r} is neither a folder here nor a valid Hub id. Check the spelling.") from e
    except errors.HfHubHTTPError as e:
        code = getattr(e.response, "status_code", "?")
        raise ModelError(f"The Hub answered {code} for {name}. Try again later, or choose a model folder here.") from e
    except (httpx.HTTPError, OSError) as e:  # no network, a time-out, offline mode
        raise ModelError(
            f"{name} is not on this machine and the Hub cannot be reached ({type(e).__name__}). Check the network, or "
            "choose `demo` or a model folder that is here."
        ) from e


def adapter_origin(folder: str | Path) -> dict:
    """Where an adapter comes from, without a path of this machine: the id of its ``run`` (and the ``checkpoint``), else
    the last part of its ``folder``. ``began_from``, if that run noted one, is the same of the adapter it went on from.
    """
    path = Path(folder).expanduser().resolve()
    of_checkpoint = path.parent.name == "checkpoints"
    run = path.parents[1] if of_checkpoint else path.parent
    if not all((run / name).is_file() for name in ("config.yaml", "events.jsonl")):
        return {"folder": path.name}
    earlier = fold(read(run / "events.jsonl")[0]).used.get("began_from")
    return (
        {"run": run.name}
        | ({"checkpoint": path.name} if of_checkpoint else {})
        | ({"began_from": earlier} if isinstance(earlier, dict) and earlier else {})
    )


def require_adapter(folder: Path) -> None:
    """Whether ``folder`` has a safetensors adapter.

    Raises:
        ModelError: it has none.
    """
    if not all((folder / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors")):
        raise ModelError(
            f"{folder} has no adapter (adapter_config.json and adapter_model.safetensors). Choose a finished run."
        )
