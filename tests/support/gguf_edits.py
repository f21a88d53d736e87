"""Faults planted into a GGUF file: fields and tensors changed in place, as a broken converter would write them."""

import mmap
import struct
from pathlib import Path

import numpy as np

from kto_core.export.gguf import layout


def _value_at(raw: bytes, key: str) -> int:
    """Where the value of a field begins (after its type)."""
    name = key.encode()
    at = raw.index(struct.pack("<Q", len(name)) + name)
    return at + 8 + len(name) + 4


def patch(file: Path, key: str, code: str, value) -> None:
    """Another number in a field."""
    raw = bytearray(file.read_bytes())
    struct.pack_into("<" + code, raw, _value_at(raw, key), value)
    file.write_bytes(raw)


def rename(file: Path, old: str, new: str) -> None:
    """The first place of a text in the header becomes another one of the same length."""
    assert len(old) == len(new)
    raw = file.read_bytes()
    at = raw.index(old.encode())
    file.write_bytes(raw[:at] + new.encode() + raw[at + len(old) :])


def text(file: Path, key: str, value: str) -> None:
    """Another text in a field, of any length; what follows it moves."""
    raw = file.read_bytes()
    at = _value_at(raw, key)
    (length,) = struct.unpack_from("<Q", raw, at)
    new = struct.pack("<Q", len(value.encode())) + value.encode()
    _moved(file, raw, at, at + 8 + length, new)


def flag(file: Path, key: str, value: bool) -> None:
    """A new field of the type bool."""
    raw = bytearray(file.read_bytes())
    (count,) = struct.unpack_from("<Q", raw, 16)
    struct.pack_into("<Q", raw, 16, count + 1)
    field = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<IB", 7, value)
    _moved(file, bytes(raw), 24, 24, field)


def _moved(file: Path, raw: bytes, begin: int, end: int, new: bytes) -> None:
    head, data = _header_end(file), min(t.start for t in layout.read(file).tensors)
    header = raw[:begin] + new + raw[end:head]
    file.write_bytes(header + bytes(-len(header) % 32) + raw[data:])


def _header_end(file: Path) -> int:
    with open(file, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = layout._Reader(data)
        reader.layout()
        return reader.at


def swap_tokens(file: Path) -> None:
    """Neighbours of the same length change places in the vocabulary."""
    raw = bytearray(file.read_bytes())
    at = _value_at(raw, "tokenizer.ggml.tokens")
    _, count = struct.unpack_from("<IQ", raw, at)
    at += 12
    before = None
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", raw, at)
        here = (at + 8, at + 8 + length)
        at = here[1]
        if before and before[1] - before[0] == length and raw[before[0] : before[1]].isalpha():
            a, b = bytes(raw[slice(*before)]), bytes(raw[slice(*here)])
            raw[slice(*before)], raw[slice(*here)] = b, a
            before = None
        else:
            before = here
    file.write_bytes(raw)


def tensor(file: Path, name: str, change) -> None:
    """``change(weights)`` of one F16 tensor, in place."""
    found = next(t for t in layout.read(file).tensors if t.name == name)
    count = int(np.prod(found.shape))
    kind = {0: np.float32, 1: np.float16}[found.kind]
    weights = np.fromfile(file, kind, count=count, offset=found.start).reshape(found.shape)
    changed = np.ascontiguousarray(change(weights.copy()), dtype=kind)
    with open(file, "r+b") as f:
        f.seek(found.start)
        f.write(changed.tobytes())
