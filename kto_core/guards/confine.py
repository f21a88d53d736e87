"""A child process that reads files of strangers with native code: what it may take, where it may write, no network.

Called in the child, before the file is opened. Limits work wherever POSIX does. Folders and network are closed with
Landlock, which Linux has since 5.13 (files) and 6.7 (TCP); elsewhere `landlock_abi` is 0 and doctor says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

CREATE, ADD, RESTRICT = 444, 445, 446  # the same system calls on every processor
NO_NEW_PRIVILEGES = 38  # prctl
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
MAKE_AND_REMOVE = 0x1FF0  # bits 4 to 12: remove and make files, folders, links, sockets, devices
REFER, TRUNCATE, IOCTL = 1 << 13, 1 << 14, 1 << 15  # since ABI 2, 3, 5
TCP = 3  # bind and connect, since ABI 4
SCOPES = 3  # abstract sockets and signals, since ABI 6
FILES = 256  # open files
NEW_NETWORK = 0x40000000  # unshare: a network of its own, with nobody in it


def limit(*, seconds: int | None = None, memory: int | None = None) -> None:
    """Limits of this process: processor time from now on, and bytes of its own memory (Linux)."""
    if seconds is not None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(usage.ru_utime + usage.ru_stime) + seconds + 1
        _lower(resource.RLIMIT_CPU, soft)
    if memory is not None:
        _lower(resource.RLIMIT_DATA, memory)
    _lower(resource.RLIMIT_CORE, 0)


def _lower(what: int, wanted: int) -> None:
    soft, hard = resource.getrlimit(what)
    for now in (soft, hard):
        if now != resource.RLIM_INFINITY:
            wanted = min(wanted, now)
    with contextlib.suppress(ValueError, OSError):  # not every system has every limit
        resource.setrlimit(what, (wanted, hard))


def landlock_abi() -> int:
    """Version of Landlock that this kernel has switched on; 0 without."""
    if sys.platform != "linux":
        return 0
    version: int = ctypes.CDLL(None, use_errno=True).syscall(CREATE, None, 0, 1)
    return max(0, version)


def close_in(writable: Sequence[str | Path] = ()) -> bool:
    """From now on this thread, and all that it starts, writes in ``writable`` only and opens no TCP connection.

    Reading stays as it was. Cannot be undone. Call it before a library starts threads.

    Returns:
        False where the kernel has no Landlock; then nothing is held.
    """
    _lower(resource.RLIMIT_NOFILE, FILES)
    abi = landlock_abi()
    if not abi:
        return False
    handled = WRITE_FILE | MAKE_AND_REMOVE | (REFER if abi >= 2 else 0) | (TRUNCATE if abi >= 3 else 0)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.unshare(NEW_NETWORK)  # UDP, too; only root may, others have what follows

    def call(number: int, *arguments: object) -> int:
        done: int = libc.syscall(number, *arguments)
        if done < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return done

    fields = [handled, TCP if abi >= 4 else 0, SCOPES if abi >= 6 else 0]
    sizes = 8 if abi < 4 else 16 if abi < 6 else 24
    rules = struct.pack("=QQQ", *fields)[:sizes]
    ruleset = call(CREATE, rules, ctypes.c_size_t(sizes), 0)
    try:
        for folder in (*writable, "/dev/null"):
            place = os.open(folder, os.O_PATH | os.O_CLOEXEC)
            try:
                allowed = handled if os.path.isdir(folder) else handled & (WRITE_FILE | TRUNCATE)
                call(ADD, ruleset, 1, struct.pack("=Qi", allowed, place), 0)
            finally:
                os.close(place)
        if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0):
            raise OSError("no_new_privs")
        call(RESTRICT, ruleset, 0)
    finally:
        os.close(ruleset)
    return True
