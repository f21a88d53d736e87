"""What every open page asks for each second, asked once: the active run, the device, the list of runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from kto_core import hardware
from kto_core import run as runs
from kto_core.errors import KTOError

_lock = threading.Lock()
_known: dict[str, tuple[float, object]] = {}


def _once(key: str, seconds: float, ask: Callable[[], object]):
    """The answer of ``ask``, at most that old."""
    with _lock:
        now = time.monotonic()
        if key in _known and now - _known[key][0] < seconds:
            return _known[key][1]
        answer = ask()
        _known[key] = (now, answer)
        return answer


def forget() -> None:
    """Something was started or deleted: ask anew."""
    with _lock:
        _known.clear()


def active():
    """The run that trains now, or None."""
    return _once("active", 0.5, runs.active)


def listed() -> list:
    """All runs, newest first."""
    return _once("runs", 0.9, runs.list_runs)


def device() -> str:
    """The GPU with its memory, or that there is none."""
    return _once("device", 3.0, _device)


def _device() -> str:
    try:
        found = hardware.devices()
    except KTOError as e:
        return str(e)
    if not found:
        return "CPU, no NVIDIA GPU"
    first = found[0]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    used = first.total_gib - first.free_gib
    return f"{first.name}{more} · {used:.1f} of {first.total_gib:.0f} GiB in use"
