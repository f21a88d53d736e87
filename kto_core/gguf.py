"""GGUF files: the converter, a file's own facts, its chat template, the kinds we write.

The converter is llama.cpp's ``convert_hf_to_gguf.py`` with its packages ``conversion`` and ``gguf``, out of the source
distribution of llama-cpp-python, fetched once into the cache with its hash checked. Native code runs in
`kto_core.gguf_native`, in a child process.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from . import checkpoints, child
from .errors import DiskError, ExportError
from .jobs import Progress, check_cancel, no_progress
from .paths import cache_dir

QUANTS = {"f16": 2.0, "q8_0": 1.07, "q5_k_m": 0.75, "q4_k_m": 0.65}  # bytes a weight, a little more than is written
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
BOS_PRE = ("llama3", "llama-v3", "llama-bpe")  # BPE tokenizers to which llama.cpp adds a BOS by default
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


def known(quants) -> list[str]:
    """Names of quantizations (a list, or one comma-separated text; any case) in the order of ``QUANTS``, each once.

    Raises:
        ExportError: an unknown one, or none; it lists those that are known.
    """
    names = quants.split(",") if isinstance(quants, str) else list(quants)
    names = [str(n).strip().lower() for n in names if str(n).strip()]
    if wrong := [n for n in names if n not in QUANTS]:
        raise ExportError(f"Unknown GGUF kind: {', '.join(wrong)}. Known are {', '.join(QUANTS)}.")
    if not names:
        raise ExportError(f"Name at least one GGUF kind: {', '.join(QUANTS)}.")
    return [n for n in QUANTS if n in names]


# ---- the converter --------------------------------------------------------------------------------------------------


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
        raise DiskError(f"The cache {home} cannot be written ({e.strerror}). Set KTO_STUDIO_CACHE elsewhere.") from e
    lock = FileLock(home / "lock", thread_local=False, is_singleton=False)
    while not lock.is_locked:
        check_cancel(cancel)
        try:
            lock.acquire(timeout=child.POLL)
        except Timeout:
            progress(None, "Waiting for the GGUF converter, which is being fetched elsewhere…")
    try:
        if _whole(folder):
            return folder / SCRIPT
        if free < SPACE:
            raise DiskError(
                f"Fetching the GGUF converter needs {SPACE / 1e6:.0f} MB in {home}, {free / 1e6:.0f} MB are free. "
                "Free some space or set KTO_STUDIO_CACHE to another disk."
            )
        checkpoints.clean(home)
        work = Path(tempfile.mkdtemp(suffix=".part", dir=home))
        try:
            _extract(_fetch(work, progress, cancel), work / "kept", cancel)
            checkpoints.seal(work / "kept")
            checkpoints.put(work / "kept", folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        lock.release()
    progress(1.0, "The GGUF converter is ready.")
    return folder / SCRIPT


def _whole(folder: Path) -> bool:
    return folder.is_dir() and not checkpoints.problem(folder)


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
            progress(got / SDIST_BYTES, f"Fetching the GGUF converter: {got / 1e6:.0f} of {SDIST_BYTES / 1e6:.0f} MB")

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
            f"The GGUF converter ({PACKAGE} {VERSION}) that was fetched is not the expected file: its hash differs, so "
            "it is not used. Check which package index pip is set to."
        )
    if "No module named pip" in tail:
        return "The GGUF converter is fetched with pip, which this Python lacks. Run `python -m ensurepip`."
    errors = [line for line in tail.splitlines() if line.startswith("ERROR")]
    reason = errors[-1].removeprefix("ERROR:").strip() if errors else tail[-200:].strip() or "pip failed"
    return (
        f"The GGUF converter ({PACKAGE} {VERSION} from the Python package index) could not be fetched: {reason}. "
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
            f"The archive of {PACKAGE} {VERSION} is broken. `python -m pip cache purge`, then again."
        ) from e
    if not (folder / SCRIPT).is_file():
        raise ExportError(f"{PACKAGE} {VERSION} has no {SCRIPT} in it, so nothing can be converted.")


def require_convertible(architecture: str, script: Path | None = None) -> None:
    """Refuse architectures whose GGUF would not run. Without ``script`` only those known to be broken.

    Raises:
        ExportError: llama.cpp's converter does not know it, or writes a file that does not work.
    """
    if architecture in BROKEN:
        raise ExportError(
            f"{BROKEN[architecture]} models cannot be exported to GGUF: llama.cpp does not run what its converter "
            "makes of them. The merged model and the adapter can be exported."
        )
    if script is None:
        return
    names = _architectures(script.parent / "conversion" / "__init__.py")
    if names and architecture not in names:
        raise ExportError(
            f"llama.cpp's converter does not know the architecture {architecture}, so there is no GGUF of it. The "
            "merged model and the adapter can be exported."
        )


def _architectures(source: Path) -> set[str]:
    """Keys of the converter's table of text models, read without importing it."""
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "TEXT_MODEL_MAP":
            return set(ast.literal_eval(node.value))
    return set()


# ---- writing --------------------------------------------------------------------------------------------------------


def convert(model: Path, out: Path, outtype: str, name: str, *, progress: Progress = no_progress, cancel=None) -> None:
    """Model folder -> GGUF (f32, f16, bf16), beside and renamed.

    Raises:
        ExportError: the converter refuses; with its reason.
        Cancelled: nothing half-made is left.
    """
    script = converter(cancel=cancel)
    progress(0.0, "Converting to GGUF: reading the model…")

    def read(line: str) -> None:
        if found := re.search(r"Writing:\s+(\d+)%", line):
            progress(0.3 + 0.7 * int(found[1]) / 100, f"Converting to GGUF: {found[1]} % written")

    with _beside(out) as part:
        arguments = {"script": str(script), "model": str(model), "out": str(part), "outtype": outtype, "name": name}
        try:
            # offline: it would look for a model card of that name
            env = {"HF_HUB_OFFLINE": "1"}
            child.call("gguf_native", "convert", arguments, what="The conversion to GGUF", cancel=cancel, env=env,
                       on_line=read)  # fmt: skip
        except child.ChildFailed as e:
            raise ExportError(_why_not_converted(e)) from e


def _why_not_converted(e: child.ChildFailed) -> str:
    if "pre-tokenizer was not recognized" in e.tail:
        return (
            "llama.cpp does not know this model's tokenizer, so a GGUF would split text differently than the model "
            "has learned. Train on a model with a known tokenizer to export GGUF; the merged model can be exported."
        )
    if "No space left" in e.tail:
        return "The disk is full. Free some space and try again."
    return str(e)


def quantize(source: Path, out: Path, quant: str, *, progress: Progress = no_progress, cancel=None) -> str:
    """f16 (or bf16) GGUF -> ``quant``, beside and renamed. Returns the library that did it. Raises as `convert`."""

    def read(line: str) -> None:
        if found := re.search(r"\[\s*(\d+)\s*/\s*(\d+)\]", line):
            progress(int(found[1]) / int(found[2]), f"Quantizing to {quant}: tensor {found[1]} of {found[2]}")

    progress(0.0, f"Quantizing to {quant}…")
    with _beside(out) as part:
        arguments = {"source": str(source), "out": str(part), "quant": quant, "threads": _threads()}
        return child.call("gguf_native", "quantize", arguments, what=f"Quantizing to {quant}", cancel=cancel,
                          on_line=read)  # fmt: skip


class _beside:
    """``with _beside(path) as part``: part becomes path at the end, or is removed if the block raises."""

    def __init__(self, path: Path):
        self.path, self.part = path, path.with_name(path.name + ".part")

    def __enter__(self) -> Path:
        self.part.unlink(missing_ok=True)
        return self.part

    def __exit__(self, kind, value, trace) -> None:
        if kind is not None:
            self.part.unlink(missing_ok=True)
            return
        with open(self.part, "rb") as f:
            os.fsync(f.fileno())
        os.replace(self.part, self.path)


def _threads() -> int:
    """What the user allows with OMP_NUM_THREADS, else the cores this process may use."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return int(allowed) if allowed.isdigit() and int(allowed) else len(os.sched_getaffinity(0))


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Facts:
    """What a GGUF file says of itself; ids are None where it does not name the token."""

    name: str
    architecture: str
    file_type: str  # "f16", "q4_k_m", …, or "" if it is another one
    template: str
    bos: int | None
    eos: int | None
    pad: int | None
    bos_text: str
    eos_text: str
    add_bos: bool  # llama.cpp and Ollama put a BOS before the text
    pre: str


def read_facts(path: str | os.PathLike) -> Facts:
    """The header of a GGUF file.

    Raises:
        ExportError: it is none, or is cut.
    """
    from gguf import GGUFReader

    from .gguf_native import FTYPES

    try:
        found = GGUFReader(path).fields

        def get(name: str, default=None):
            return found[name].contents() if name in found else default

        tokens = found.get("tokenizer.ggml.tokens")
        ids = [get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos", "padding")]
        texts = ["" if i is None or tokens is None else tokens.contents(i) for i in ids]
        pre = str(get("tokenizer.ggml.pre", ""))
        types = {number: name for name, number in FTYPES.items()}
        return Facts(
            name=str(get("general.name", "")),
            architecture=str(get("general.architecture", "")),
            file_type=types.get(get("general.file_type"), ""),
            template=str(get("tokenizer.chat_template", "")),
            bos=ids[0],
            eos=ids[1],
            pad=ids[2],
            bos_text=texts[0],
            eos_text=texts[1],
            # what llama.cpp does where the file does not say
            add_bos=bool(get("tokenizer.ggml.add_bos_token", get("tokenizer.ggml.model") == "llama" or pre in BOS_PRE)),
            pre=pre,
        )
    except (OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError) as e:
        raise ExportError(f"{Path(path).name} is no whole GGUF file ({e}). Create it again.") from e


def render(facts: Facts, messages: list[dict], generation: bool = True) -> str:
    """Messages through the file's own chat template, as transformers renders it (sandboxed).

    Raises:
        ExportError: the file has no template, or it refuses these messages.
    """
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    if not facts.template:
        raise ExportError("This GGUF file has no chat template, so nobody can talk to it. Create it again.")
    try:
        texts, _ = render_jinja_template(
            [messages],
            chat_template=facts.template,
            add_generation_prompt=generation,
            bos_token=facts.bos_text,
            eos_token=facts.eos_text,
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as e:
        raise ExportError(f"The file's chat template does not render: {e}.") from e
    return texts[0]


def prompt_text(facts: Facts, prompt: str) -> str:
    """One user message, ready to be answered."""
    return render(facts, [{"role": "user", "content": prompt}])


def check(path: Path, prompt: str, max_tokens: int, *, progress: Progress = no_progress, cancel=None) -> dict:
    """`gguf_native.check` in a child."""
    arguments = {"path": str(path), "prompt": prompt, "max_tokens": max_tokens, "threads": _threads()}
    return child.call(
        "gguf_native", "check", arguments, what="The check in llama.cpp", progress=progress, cancel=cancel
    )
