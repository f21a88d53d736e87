"""What every open page asks for each second, asked once: the active run, the device, the list of runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from kto_core import paths
from kto_core.compare.facts import Table
from kto_core.errors import KTOError
from kto_core.hardware import gpus
from kto_core.runs.run_list import RunList

_lock = threading.Lock()
_known: dict[str, tuple[float, object]] = {}
_list: RunList | None = None
_table: Table | None = None


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


def runs() -> RunList:
    """All runs of the machine, looked at a moment ago."""

    def look() -> RunList:
        global _list
        whole = _list is not None and "runs" not in _known  # something was done: see it now
        if _list is None or _list.root != paths.runs_dir():
            _list, whole = RunList(), False
        _list.look(whole=whole)
        return _list

    return _once("runs", 0.9, look)


def table() -> Table:
    """The facts of all runs."""
    global _table
    known = runs()
    with _lock:
        if _table is None or _table.known is not known:
            _table = Table(known)
        return _table


def active():
    """The run that trains now, or None."""
    found = runs()
    return _once("active", 0.5, found.active)


def listed() -> list:
    """All runs, newest first."""
    return runs().runs()


def device() -> str:
    """The GPU with its memory, or that there is none."""
    return _once("device", 3.0, _device)


def _device() -> str:
    try:
        found = gpus.devices()
    except KTOError as e:
        return str(e)
    if not found:
        return "CPU only, no NVIDIA GPU"
    first = found[0]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    used = first.total_gib - first.free_gib
    return f"{first.name}{more} · {used:.1f} of {first.total_gib:.0f} GiB used"
