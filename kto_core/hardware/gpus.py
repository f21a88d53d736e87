"""What this machine has: GPUs through NVML, memory through psutil. Never imports torch; works without a driver.

What a run needs is in `memory_plan`, who uses the GPU now in `gpu_owner`.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kto_core.errors import HardwareError

if TYPE_CHECKING:
    import torch

GIB = 2**30
LIMIT = "KTO_STUDIO_GPU_GIB"  # of every GPU, at most that much memory is planned with and taken
CONTEXT_GIB = 0.7  # CUDA's context, which lies beside what torch allocates; measured (`benchmarks/RESULTS.md`)


@dataclass(frozen=True)
class Device:
    """One GPU. Sizes in GiB (2**30 bytes)."""

    index: int  # as CUDA counts within CUDA_VISIBLE_DEVICES
    name: str
    total_gib: float
    free_gib: float
    used_by_others_gib: float  # by other processes and the driver, of the total; ours is not in it
    capability: tuple[int, int]  # (8, 6) for an RTX 3090
    uuid: str = ""

    @property
    def available_gib(self) -> float:
        """What this process can have when it gives back all it holds now."""
        return max(0.0, self.total_gib - self.used_by_others_gib)


def devices() -> list[Device]:
    """The NVIDIA GPUs this process may use, in CUDA's order; empty without a GPU or driver. A few milliseconds."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, no driver, no permission: all mean that CUDA has no GPU for us
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        uuids = [_text(pynvml.nvmlDeviceGetUUID(h)) for h in handles]
        chosen = visible(uuids, os.environ.get("CUDA_VISIBLE_DEVICES"))
        return [_device(pynvml, n, handles[i], uuids[i]) for n, i in enumerate(chosen)]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def imagined(gib: float) -> Device:
    """A GPU of so many GiB that nobody else uses, to plan for a card that is not in this machine."""
    return Device(0, f"a GPU of {gib:g} GiB", gib, gib, 0.0, (8, 6))


def visible(uuids: list[str], setting: str | None) -> list[int]:
    """Positions of the GPUs that CUDA_VISIBLE_DEVICES leaves, in its order: numbers or starts of UUIDs.

    As CUDA does, the list ends at the first entry that names no GPU.
    """
    if setting is None:
        return list(range(len(uuids)))
    chosen: list[int] = []
    for entry in (e.strip() for e in setting.split(",")):
        found: int | None
        if entry.isdigit() and int(entry) < len(uuids):
            found = int(entry)
        else:
            found = next((i for i, u in enumerate(uuids) if entry.startswith("GPU-") and u.startswith(entry)), None)
        if found is None or found in chosen:
            break
        chosen.append(found)
    return chosen


def _device(pynvml: ModuleType, index: int, handle: Any, uuid: str) -> Device:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    physical, used = memory.total / GIB, memory.used / GIB
    total = min(physical, _limit())
    others = used - _ours(pynvml, handle) / GIB
    return Device(
        index=index,
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        total_gib=total,
        free_gib=max(0.0, min(total, physical - used)),
        used_by_others_gib=max(0.0, others - (physical - total)),  # beside the limit there is room for them
        capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
        uuid=uuid,
    )


def _limit() -> float:
    """GiB that the user allows of each GPU. A setting that is no number is said, not skipped."""
    try:
        return float(os.environ.get(LIMIT) or "inf")
    except ValueError:
        raise HardwareError(f"{LIMIT} must be a number of GiB, not {os.environ[LIMIT]!r}. Fix or unset it.") from None


def prepare() -> None:
    """Make torch ready for a model on the GPU; called before one is loaded.

    cuDNN's attention, which torch prefers on the H100 and its like, is off: it plans for every shape that it has not
    met. Without it TRL's step was up to 1.3 times as fast, and the first token of an answer came three times as soon
    (`benchmarks/RESULTS.md`). And the process is held to what the user allows of its GPU's memory.

    Raises:
        HardwareError: the limit is no number, or leaves nothing beside CUDA's context.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)
    keep_to_limit()


def keep_to_limit() -> None:
    """Hold this process to what the user allows of its GPU's memory, CUDA's context included.

    Other GPUs are not touched: each would get a context of this process.

    Raises:
        HardwareError: the limit is no number, or leaves nothing beside the context.
    """
    import torch

    if (limit := _limit()) == float("inf") or not torch.cuda.is_available():
        return
    if limit <= CONTEXT_GIB:
        raise HardwareError(f"{LIMIT} must be more than {CONTEXT_GIB}, the GiB that CUDA itself uses. Raise it.")
    index = int(os.environ.get("LOCAL_RANK", 0))
    total = torch.cuda.get_device_properties(index).total_memory / GIB
    torch.cuda.set_per_process_memory_fraction(min(1.0, (limit - CONTEXT_GIB) / total), index)


def allowed(device: torch.device | str | int) -> float:
    """Bytes that torch may hold on a GPU (a torch.device), what it holds now included: within the limit, and within
    what others leave."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    most: float = free + torch.cuda.memory_reserved(device)
    with contextlib.suppress(AttributeError, RuntimeError):
        most = min(most, torch.cuda.get_per_process_memory_fraction(device) * total)
    return most


def _ours(pynvml: ModuleType, handle: Any) -> int:
    """Bytes of the GPU's memory that this process holds; 0 where NVML does not tell processes apart (containers)."""
    try:
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return 0
    return sum(p.usedGpuMemory or 0 for p in running if p.pid == os.getpid())


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def memory_gib() -> tuple[float, float]:
    """(total, available) main memory in GiB; a container's limit counts where it is lower."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = memory.total / GIB, memory.available / GIB
    limit = _container("memory.max")
    if limit and limit / GIB < total:
        taken = _container("memory.current") - _container("memory.stat", "inactive_file")  # file pages are given back
        total, available = limit / GIB, min(available, max(0.0, (limit - taken) / GIB))
    return total, available


def _container(name: str, key: str = "") -> int:
    """A number of the container's control group; 0 where there is none, or no limit."""
    try:
        with open(f"/sys/fs/cgroup/{name}", encoding="ascii") as f:
            text = f.read()
        return int(dict(line.split() for line in text.splitlines())[key] if key else text)
    except (OSError, ValueError, KeyError):
        return 0
