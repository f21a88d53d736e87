"""The layout of a GGUF file: its fields, and where its tensors lie.

The format is llama.cpp's (its docs/gguf.md). gguf's own reader makes an array of each string: seven seconds and 665 MB
for a vocabulary of 128,000 words, where this takes a fraction of a second. Dequantizing is left to that library.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from typing import Any

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT = "general.alignment"


@dataclass(frozen=True, slots=True)
class Tensor:
    """``shape`` as torch has it; ``kind``: llama.cpp's number of the type; ``start``: its place in the file, bytes."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True, slots=True)
class Layout:
    fields: dict[str, Any]
    tensors: list[Tensor]


def read(path: str | os.PathLike) -> Layout:
    """All fields and the places of all tensors.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no GGUF file of version 2 or 3, or it is cut or damaged.
    """
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data)
        try:
            return reader.layout()
        except (struct.error, IndexError, OverflowError, UnicodeDecodeError, KeyError) as e:
            raise ValueError("its header is cut or damaged") from e


class _Reader:
    def __init__(self, data: mmap.mmap):
        self.data, self.at, self.size = data, 0, len(data)

    def layout(self) -> Layout:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.at = 4
        version, tensors, fields = self.number("I"), self.number("Q"), self.number("Q")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, not 2 or 3")
        self.require(tensors * 24 + fields * 13)  # the least that so many take
        found: dict[str, Any] = {}
        for _ in range(fields):
            name = self.string()
            found[name] = self.value(self.number("I"))
        places = [self.tensor() for _ in range(tensors)]
        step = int(found.get(ALIGNMENT, 32))
        if step < 1:
            raise ValueError("its alignment is not positive")
        begin = -(-self.at // step) * step
        return Layout(found, [Tensor(t.name, t.shape, t.kind, begin + t.start) for t in places])

    def require(self, count: int) -> None:
        if count > self.size - self.at:
            raise ValueError("it is cut")

    def number(self, code: str):
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.number("Q")
        self.require(length)
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8", errors="replace")

    def value(self, kind: int):
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(NUMBERS[kind])
        of, count = self.number("I"), self.number("Q")
        if of == STRING:
            self.require(count * 8)
            return [self.string() for _ in range(count)]
        if of == ARRAY:
            self.require(count * 12)
            return [self.value(ARRAY) for _ in range(count)]
        code = NUMBERS[of]
        width = struct.calcsize("<" + code)
        self.require(count * width)
        self.at += count * width
        return list(struct.unpack_from(f"<{count}{code}", self.data, self.at - count * width))

    def tensor(self) -> Tensor:
        name, dimensions = self.string(), self.number("I")
        self.require(dimensions * 8)
        shape = [self.number("Q") for _ in range(dimensions)]
        return Tensor(name, tuple(reversed(shape)), self.number("I"), self.number("Q"))
