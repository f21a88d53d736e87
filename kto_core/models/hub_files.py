"""Models on the Hugging Face Hub and in its local cache: is it there, its configuration, its weight files.

Every failure is one sentence that says what to do. Only what `model_gate` lets libraries open is fetched, file by
file: settings, tokenizer, and the weights that the index names. No torch, no transformers.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from pathlib import Path

from kto_core.errors import Cancelled, DiskError, ModelError
from kto_core.jobs import Progress, check_cancel, no_progress
from kto_core.paths import is_hub_id

from .model_gate import INDEX, SINGLE, wanted, weight_names

TIMEOUT = 10  # seconds for one answer of the Hub


def cached_folder(name: str) -> Path | None:
    """Snapshot folder of a Hub id in the local cache if its configuration and all its weights are there.

    Raises:
        ModelError: its index names something else than weights.
    """
    from huggingface_hub import try_to_load_from_cache

    if not is_hub_id(name):
        return None
    with contextlib.suppress(ValueError, OSError):  # HFValidationError: an id that cannot be one
        config = try_to_load_from_cache(name, "config.json")
        if not isinstance(config, str):
            return None
        folder = Path(config).parent
        names = weight_names(folder)
        if names and all((folder / n).is_file() for n in names):
            return folder
    return None


def hub_exists(name: str):
    """What the Hub says about a model id.

    Raises:
        ModelError: no such model, gated, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    if not is_hub_id(name):
        raise ModelError(
            f"Model {name!r} not found: it is neither a local folder nor a Hub id (owner/name). Check the spelling, "
            "or use `demo`."
        )
    with _explained(name):
        return HfApi().model_info(name, timeout=TIMEOUT, files_metadata=True)


def hub_config(name: str) -> Path:
    """``config.json`` of a Hub id, fetched into the cache. Raises ModelError."""
    from huggingface_hub import hf_hub_download

    with _explained(name):
        return Path(hf_hub_download(name, "config.json", etag_timeout=TIMEOUT))


def download(
    name: str, progress: Progress = no_progress, cancel: threading.Event | None = None, *, weights: bool = True
) -> Path:
    """Fetch a model's weights, configuration and tokenizer into the Hub's cache; what is there already is kept.

    Args:
        weights: also the weights; else only what tells of the model, and its tokenizer.

    Returns:
        The snapshot folder.

    Raises:
        ModelError: not there, gated, no network, no safetensors weights, or an index that names something else.
        DiskError: not enough space in the cache.
        Cancelled: ``cancel`` was set; a later call goes on where this one stopped.
    """
    from huggingface_hub import constants, hf_hub_download
    from tqdm import tqdm

    info = hub_exists(name)
    sizes = {f.rfilename: f.size or 0 for f in info.siblings}
    if "config.json" not in sizes:
        raise ModelError(f"{name} has no config.json, so it cannot be loaded. Choose another model.")
    if weights and not sizes.keys() & {SINGLE, INDEX}:
        raise ModelError(
            f"{name} has no safetensors weights, and other formats are not safe to load. Choose another model."
        )
    files = {n: s for n, s in sizes.items() if wanted(n) and not (n == INDEX and SINGLE in sizes)}
    total, done = 0, 0

    class Bar(tqdm):
        """Counts bytes instead of drawing, and is where a download can be interrupted."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "disable": True})
            self.seen = kwargs.get("initial") or 0

        def update(self, n=1):
            check_cancel(cancel)
            self.seen += n or 0
            got = done + self.seen
            progress(min(1.0, got / max(total, 1)), f"Downloading {name}: {got / 1e9:.2f} of {total / 1e9:.2f} GB")

    def fetch(some: dict[str, int]) -> Path:
        nonlocal total, done
        total += sum(some.values())
        _check_space(name, sum(some.values()), Path(constants.HF_HUB_CACHE))
        for file, size in sorted(some.items(), key=lambda f: f[1]):
            check_cancel(cancel)
            with _explained(name):
                got = hf_hub_download(name, file, revision=info.sha, etag_timeout=TIMEOUT, tqdm_class=Bar)
            done += size
        return Path(got).parent

    folder = fetch(files)
    if weights:
        names = {SINGLE} if SINGLE in sizes else weight_names(folder)
        if absent := sorted(names - sizes.keys()):
            raise ModelError(f"{name} lacks {absent[0]}, which its index names. Choose another model.")
        fetch({n: sizes[n] for n in names})
    with _explained(name):  # names this revision as `main` in the cache, so that it is found without a network
        hf_hub_download(name, "config.json", etag_timeout=TIMEOUT)
    return folder


def _check_space(name: str, needed: int, cache: Path) -> None:
    place = next(p for p in (cache, *cache.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise DiskError(
            f"{name} needs {needed / 2**30:.1f} GiB in the Hub cache, but only {free / 2**30:.1f} GiB are free. Free "
            "up disk space, or set HF_HOME to another disk."
        )


@contextlib.contextmanager
def _explained(name: str):
    """Turn what huggingface_hub raises into a ModelError with a remedy, or a DiskError of its cache."""
    import httpx
    from huggingface_hub import constants, errors

    try:
        yield
    except Cancelled:
        raise
    except errors.GatedRepoError as e:
        raise ModelError(
            f"{name} is gated. Accept its license on its Hub page, then run `hf auth login` or set HF_TOKEN."
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise ModelError(
            f"Model {name} does not exist on the Hub, or it is private. Check the spelling, or set HF_TOKEN."
        ) from e
    except errors.EntryNotFoundError as e:
        raise ModelError(f"{name} has no such file on the Hub ({e}). Choose another model.") from e
    except errors.HFValidationError as e:
        raise ModelError(f"{name!r} is neither a local folder nor a valid Hub id. Check the spelling.") from e
    except errors.HfHubHTTPError as e:
        code = getattr(e.response, "status_code", "?")
        raise ModelError(
            f"The Hub returned an error for {name} ({code}). Try again later, or choose a local model folder."
        ) from e
    except (PermissionError, NotADirectoryError, FileExistsError) as e:
        if not e.filename:  # of a connection
            raise ModelError(f"The Hub cannot be reached ({e.strerror or e}). Check the network.") from e
        raise DiskError(
            f"The Hub cache {constants.HF_HUB_CACHE} is not writable ({e.strerror}). Set HF_HOME to another folder."
        ) from e
    except (httpx.HTTPError, OSError) as e:  # no network, a time-out, offline mode
        raise ModelError(
            f"{name} is not on this machine and the Hub cannot be reached ({type(e).__name__}). Check the network, "
            "or choose `demo` or a local model folder."
        ) from e
