"""Is everything in place? Python, packages against their pins, torch and CUDA, GPU, memory, disk, Hub token.

Quick: reads package metadata and asks NVML; torch is imported only where a GPU is to be tried, and in a child process.
Needs no network. Never shows a token.
"""

from __future__ import annotations

import ast
import importlib.metadata as metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from kto_core import paths
from kto_core.guards import confine

from . import gpus as hardware

PYTHON = ((3, 11), (3, 14))  # from, up to and without
DISK_NEED, DISK_ROOM = 3, 30  # GiB: the demo and a checkpoint; a 4-bit 7B model, a merge and its GGUF
CUDA_TIMEOUT = 90  # seconds
CUDA_CODE = """
import json, torch
x = torch.ones(256, 256, device="cuda", dtype=torch.float16)
ok = bool(((x @ x) == 256).all().item())
print(json.dumps({"ok": ok, "name": torch.cuda.get_device_name(0), "count": torch.cuda.device_count()}))
"""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool | None  # None: a remark, nothing is wrong
    value: str
    remedy: str = ""  # what to do, where ok is not True


def doctor() -> list[Check]:
    """All checks, in the order to mend them. Changes nothing; takes a second, some more with a GPU."""
    unsloth = _version("unsloth") is not None
    file = paths.requirements(unsloth)
    gpus = hardware.devices()
    checks = [_python(), _system(), *_packages(file), _optional(unsloth, bool(gpus)), *_torch(gpus, file)]
    checks += [_gpu(g) for g in gpus] or [_no_gpu()]
    return [*checks, _memory(), *_disk(), _confinement(), _token()]


# ---- Python and packages --------------------------------------------------------------------------------------------


def _python() -> Check:
    low, high = PYTHON
    ok = low <= sys.version_info[:2] < high
    remedy = f"Create a virtual environment with Python {low[0]}.{low[1]} to {high[0]}.{high[1] - 1}."
    return Check("Python", ok, f"{platform.python_version()} ({sys.prefix})", "" if ok else remedy)


def _system() -> Check:
    ok = True if sys.platform == "linux" else None
    remedy = "" if ok else "Only Linux is tested. On Windows, use WSL 2. 4-bit training needs an NVIDIA GPU."
    return Check("System", ok, platform.platform(), remedy)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages(file: Path) -> list[Check]:
    """Every line of a requirements file against what is installed."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:  # nothing is installed yet: pip brings a copy of its own
        from pip._vendor.packaging.requirements import InvalidRequirement, Requirement  # type: ignore[assignment]

    install = f"python -m pip install -r {file.name}"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        return [Check(file.name, False, f"unreadable: {e.strerror}", "Download the project's files again.")]
    checks = []
    for line in lines:
        text = line.partition("#")[0].strip()
        if not text or text.startswith("-"):
            continue
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            checks.append(Check(file.name, False, f"not understood: {text}", "Download the project's files again."))
            continue
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        found = _version(wanted.name)
        ok = found is not None and wanted.specifier.contains(found, prereleases=True)
        value = f"{found or 'not installed'}" + (f", required {wanted.specifier}" if not ok else "")
        checks.append(Check(wanted.name, ok, value, "" if ok else f"{install} (or: pip install '{text}')"))
    return checks


def _optional(unsloth: bool, gpu: bool) -> Check:
    if unsloth and not gpu:
        return Check(
            "Unsloth", None, "installed, but there is no GPU",
            "Unsloth needs a GPU. Without one, install requirements.txt into a new virtual environment.",
        )  # fmt: skip
    if unsloth:
        return Check("Unsloth", True, "installed; engine unsloth is available")
    remedy = "To use engine unsloth: pip install -r requirements-unsloth.txt in a separate virtual environment."
    return Check("Unsloth", None, "not installed (optional)", remedy if gpu else "It needs an NVIDIA GPU.")


# ---- torch and GPU --------------------------------------------------------------------------------------------------


def _torch(gpus: list[hardware.Device], file: Path) -> list[Check]:
    version = _version("torch")
    if version is None:
        return []  # _packages has said it
    cuda = torch_cuda()
    if not gpus:
        return [Check("torch build", True, f"{version}, " + (f"CUDA {cuda}" if cuda else "CPU only"))]
    if cuda is None:
        remedy = (
            "This build of torch cannot use the GPU. Uninstall torch and install it again from your usual package "
            f"index, which has the CUDA build for Linux: pip uninstall -y torch && pip install -r {file.name}"
        )
        return [Check("torch build", False, f"{version}, CPU only, but there is a GPU", remedy)]
    driver, most = _driver()
    build = Check("torch build", True, f"{version}, CUDA {cuda}")
    old = most is not None and most[0] < int(cuda.partition(".")[0])
    remedy = f"torch was built for CUDA {cuda}. Update the NVIDIA driver to a version that supports it."
    what = f"{driver}, CUDA up to {most[0]}.{most[1]}" if most else driver
    return [build, Check("NVIDIA driver", not old, what, remedy if old else ""), _try_cuda()]


def torch_cuda() -> str | None:
    """The CUDA version torch was built with, None for a CPU build. Reads torch/version.py, imports nothing."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return None
    try:
        tree = ast.parse((Path(spec.origin).parent / "version.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return None
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = {t.id for t in targets if isinstance(t, ast.Name)}
        if "cuda" in names and isinstance(node.value, ast.Constant):
            return node.value.value if isinstance(node.value.value, str) else None
    return None


def _driver() -> tuple[str, tuple[int, int] | None]:
    """(driver version, newest CUDA version it serves)."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            cuda = pynvml.nvmlSystemGetCudaDriverVersion()
            return str(pynvml.nvmlSystemGetDriverVersion()), (cuda // 1000, cuda % 1000 // 10)
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # NVML can vanish between two calls when a driver is being updated
        return "unknown", None


def _try_cuda() -> Check:
    """Multiply two matrices on the GPU, in a child process: a broken CUDA may take its process down."""
    remedy = "Run this in a terminal to see the full message: python -c 'import torch; torch.ones(2).cuda()'"
    try:
        done = subprocess.run(
            [sys.executable, "-c", CUDA_CODE], capture_output=True, text=True, timeout=CUDA_TIMEOUT, check=False
        )
    except (subprocess.TimeoutExpired, OSError) as e:
        return Check("CUDA", False, f"torch did not respond ({type(e).__name__})", remedy)
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Check("CUDA", False, last[:300], remedy)
    return Check("CUDA", found["ok"], f"torch uses {found['name']} ({found['count']} GPU)", remedy)


def _gpu(gpu: hardware.Device) -> Check:
    major, minor = gpu.capability
    value = (
        f"{gpu.name}, {gpu.total_gib:.1f} GiB, {gpu.free_gib:.1f} free, "
        f"{gpu.used_by_others_gib:.1f} used by others, compute capability {major}.{minor}"
    )
    name = f"GPU {gpu.index}"
    if gpu.capability < (7, 5):
        return Check(name, False, value, "This GPU is too old for torch's CUDA build. Use one from 2018 or later.")
    if gpu.available_gib < 6:
        return Check(name, None, value, "Less than 6 GiB is free. Close other programs, or use preset demo or 3b.")
    if gpu.capability < (8, 0):
        return Check(
            name, None, value, "This GPU does not support bfloat16. Training uses float16, and attention is slower."
        )
    return Check(name, True, value)


def _no_gpu() -> Check:
    remedy = "Preset demo trains on the CPU. The other presets need an NVIDIA GPU and its driver."
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        remedy += f" CUDA_VISIBLE_DEVICES is set to {os.environ['CUDA_VISIBLE_DEVICES']!r}, which may hide a GPU."
    return Check("GPU", None, "none found", remedy)


# ---- memory, disk, Hub ----------------------------------------------------------------------------------------------


def _memory() -> Check:
    try:
        total, available = hardware.memory_gib()
    except ImportError:
        return Check("Memory", None, "unknown (psutil is missing)", "Install the packages above first.")
    value = f"{total:.1f} GiB, {available:.1f} available, {os.cpu_count()} CPU cores"
    if available < 3:
        return Check("Memory", False, value, "Preset demo needs about 3 GiB. Close other programs.")
    ok = True if total >= 8 else None
    return Check("Memory", ok, value, "" if ok else "Merging a 7B model and creating GGUF files needs about 16 GiB.")


def _disk() -> list[Check]:
    """Free space where runs, caches and downloads lie, and whether we may write there."""
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub"
    places = {
        "Disk for runs": (paths.runs_dir(), "KTO_STUDIO_RUNS"),
        "Disk for the cache": (paths.cache_dir(), "KTO_STUDIO_CACHE"),
        "Disk for Hub models": (Path(hub).expanduser(), "HF_HOME"),
    }
    checks = []
    for name, (folder, variable) in places.items():
        there = next(p for p in (folder, *folder.parents) if p.exists())
        move = f"set {variable} to another folder"
        if not os.access(there, os.W_OK):
            checks.append(Check(name, False, f"{folder} is not writable", f"Change its permissions, or {move}."))
            continue
        free = shutil.disk_usage(there).free / hardware.GIB
        value = f"{free:.1f} GiB free at {folder}"
        if free < DISK_NEED:
            checks.append(Check(name, False, value, f"Free up disk space, or {move}."))
        elif free < DISK_ROOM:
            remedy = (
                f"Enough for small models; a 7B model with a merge and GGUF files needs {DISK_ROOM} GiB. Free up "
                f"disk space, or {move}."
            )
            checks.append(Check(name, None, value, remedy))
        else:
            checks.append(Check(name, True, value))
    return checks


def _confinement() -> Check:
    """Whether llama.cpp and tokenizers can be kept from writing files and opening connections."""
    abi = confine.landlock_abi()
    if abi >= 4:
        return Check("Confinement", True, f"Landlock {abi}: native readers of model files write nowhere, no network")
    remedy = "Check and load only models that you trust, or use a Linux kernel from 6.7 on with Landlock switched on."
    value = f"Landlock {abi}: files are closed, the network is not" if abi else "none: this system has no Landlock"
    return Check("Confinement", None, value, remedy)


def _token() -> Check:
    """Whether a Hub token is there; never what it is."""
    try:
        from huggingface_hub import get_token

        present = bool(get_token())
    except Exception as e:  # not installed, or its file cannot be read
        return Check("Hub token", None, f"unreadable ({type(e).__name__})", "Install the packages above first.")
    if present:
        return Check("Hub token", True, "present")
    return Check(
        "Hub token", None, "none", "Needed only for gated models and uploads. Run `hf auth login`, or set HF_TOKEN."
    )
