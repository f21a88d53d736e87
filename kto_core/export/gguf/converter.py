"""llama.cpp's converter ``convert_hf_to_gguf.py``, with its packages ``conversion`` and ``gguf``: in the cache, or
fetched into it once, out of the source distribution of llama-cpp-python with its hash checked.
"""

from __future__ import annotations

import ast
import shutil
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from kto_core import files
from kto_core.errors import DiskError, ExportError
from kto_core.guards import child
from kto_core.jobs import Progress, check_cancel, no_progress
from kto_core.paths import cache_dir

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SDIST_BYTES = 76_589_250
SPACE = 400_000_000  # bytes: the archive, and pip's unpacked copy
SCRIPT = "convert_hf_to_gguf.py"
WANTED = (SCRIPT, "LICENSE", "conversion/", "gguf-py/gguf/", "gguf-py/LICENSE")
BROKEN = {  # in the converter's list, but what comes out does not run
    "GPTNeoXForCausalLM": "GPT-NeoX",
    "OPTForCausalLM": "OPT",
}
# pip asks a source distribution's build system for metadata, which would fetch a compiler's tool chain and run code
# out of the archive. This stands in for it and says what pip wants to hear; nothing is built.
BACKEND = f"""
from pathlib import Path
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    info = Path(metadata_directory) / "llama_cpp_python-{VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: {PACKAGE}\\nVersion: {VERSION}\\n")
    return info.name
def build_wheel(*args, **kwargs):
    raise RuntimeError("nothing is built")
"""


def converter(progress: Progress = no_progress, cancel: threading.Event | None = None) -> Path:
    """Path of ``convert_hf_to_gguf.py``; fetched on the first call (77 MB, of which 2 MB are kept).

    Raises:
        ExportError: it cannot be fetched (no network), or is not the expected file.
        DiskError: no room in the cache.
        Cancelled: ``cancel`` was set; nothing half-made is left.
    """
    from filelock import FileLock, Timeout

    home = cache_dir() / "gguf-converter"
    folder = home / VERSION
    if _whole(folder):
        return folder / SCRIPT
    try:
        home.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(home).free
    except OSError as e:
        raise DiskError(
            f"The cache folder {home} is not writable ({e.strerror}). Set KTO_STUDIO_CACHE to another folder."
        ) from e
    lock = FileLock(home / "lock", thread_local=False, is_singleton=False)
    while not lock.is_locked:
        check_cancel(cancel)
        try:
            lock.acquire(timeout=child.POLL)
        except Timeout:
            progress(None, "Waiting for another process to download the GGUF converter…")
    try:
        if _whole(folder):
            return folder / SCRIPT
        if free < SPACE:
            raise DiskError(
                f"The GGUF converter needs {SPACE / 1e6:.0f} MB in {home}, but only {free / 1e6:.0f} MB are free. "
                "Free up disk space, or set KTO_STUDIO_CACHE to another disk."
            )
        files.clean(home)
        work = Path(tempfile.mkdtemp(suffix=".part", dir=home))
        try:
            _extract(_fetch(work, progress, cancel), work / "kept", cancel)
            files.seal(work / "kept")
            files.move_into_place(work / "kept", folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        lock.release()
    progress(1.0, "The GGUF converter is ready.")
    return folder / SCRIPT


def _whole(folder: Path) -> bool:
    return folder.is_dir() and not files.problem(folder)


def _fetch(work: Path, progress: Progress, cancel: threading.Event | None) -> Path:
    """The source distribution, through pip, which checks the hash before it opens the archive."""
    temp, target, backend = work / "pip", work / "sdist", work / "backend" / "scikit_build_core"
    for folder in (temp, target, backend):
        folder.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build.py").write_text(BACKEND)
    wanted = work / "requirements.txt"
    wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation",
               "--require-hashes", "--no-input", "--disable-pip-version-check", "--progress-bar", "off",
               "--dest", str(target), "-r", str(wanted)]  # fmt: skip
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.3):
            files = list(temp.rglob("*.tar.gz")) + list(target.glob("*.tar.gz"))
            got = min(SDIST_BYTES, max((p.stat().st_size for p in files if p.is_file()), default=0))
            progress(
                got / SDIST_BYTES, f"Downloading the GGUF converter: {got / 1e6:.0f} of {SDIST_BYTES / 1e6:.0f} MB"
            )

    watcher = threading.Thread(target=_quietly, args=(watch,), daemon=True)
    watcher.start()
    try:
        environment = {"TMPDIR": str(temp), "PYTHONPATH": str(backend.parent)}
        ended = child.run(command, env=environment, cancel=cancel)
    finally:
        done.set()
        watcher.join()
    found = list(target.glob("*.tar.gz"))
    if ended.code or not found:
        raise ExportError(_why_not_fetched(ended.tail))
    return found[0]


def _quietly(work: Callable[[], None]) -> None:
    try:
        work()
    except OSError:  # a file that went away while it was measured
        return


def _why_not_fetched(tail: str) -> str:
    if "DO NOT MATCH THE HASHES" in tail:
        return (
            f"The downloaded GGUF converter ({PACKAGE} {VERSION}) has an unexpected hash, so it is not used. Check "
            "which package index pip uses."
        )
    if "No module named pip" in tail:
        return (
            "The GGUF converter is downloaded with pip, which is missing from this Python. Run `python -m ensurepip`."
        )
    errors = [line for line in tail.splitlines() if line.startswith("ERROR")]
    reason = errors[-1].removeprefix("ERROR:").strip() if errors else tail[-200:].strip() or "pip failed"
    return (
        f"The GGUF converter ({PACKAGE} {VERSION} from the Python package index) could not be downloaded: {reason}. "
        "Check the network or proxy and try again."
    )


def _extract(archive: Path, folder: Path, cancel: threading.Event | None) -> None:
    """Only what the conversion needs, as plain files."""
    prefix = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
    try:
        with tarfile.open(archive) as tar:
            for entry in tar:
                check_cancel(cancel)
                inner = entry.name.removeprefix(prefix)
                if not (entry.isfile() and entry.name.startswith(prefix) and inner.startswith(WANTED)):
                    continue
                if ".." in PurePosixPath(inner).parts:
                    continue
                target = folder / inner
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(entry).read())
    except (tarfile.TarError, EOFError) as e:
        raise ExportError(
            f"The archive of {PACKAGE} {VERSION} is damaged. Run `python -m pip cache purge` and try again."
        ) from e
    if not (folder / SCRIPT).is_file():
        raise ExportError(
            f"{PACKAGE} {VERSION} does not contain {SCRIPT}, so nothing can be converted. Please report it."
        )


def require_convertible(architecture: str, script: Path | None = None) -> None:
    """Refuse architectures whose GGUF would not run. Without ``script`` only those known to be broken.

    Raises:
        ExportError: llama.cpp's converter does not know it, or writes a file that does not work.
    """
    if architecture in BROKEN:
        raise ExportError(
            f"{BROKEN[architecture]} models cannot be exported to GGUF, because llama.cpp cannot run the converted "
            "files. Export the merged model or the adapter instead."
        )
    if script is None:
        return
    names = _architectures(script.parent / "conversion" / "__init__.py")
    if names and architecture not in names:
        raise ExportError(
            f"llama.cpp's converter does not support the architecture {architecture}. Export the merged model or the "
            "adapter instead."
        )


def _architectures(source: Path) -> set[str]:
    """Keys of the converter's table of text models, read without importing it."""
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "TEXT_MODEL_MAP":
            return set(ast.literal_eval(node.value))
    return set()
