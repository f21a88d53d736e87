"""safetensors files read and written tensor by tensor, so that a file of any size takes the memory of one tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kto_core.errors import ModelError, first_line
from kto_core.files import beside, write_whole

if TYPE_CHECKING:
    import torch

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOATING = ("F64", "F32", "F16", "BF16")
FRESH = 64 * 2**20  # bytes read from a file before it is opened anew: pages that were read count as this process's


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its name, its dtype in safetensors' words, its shape."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.numbers * BYTES[self.kind]

    @property
    def numbers(self) -> int:
        found = 1
        for n in self.shape:
            found *= n
        return found


class Reader:
    """The tensors of a folder, one at a time. ``files``: name of a tensor -> name of its file."""

    def __init__(self, folder: Path, files: dict[str, str]):
        self._folder, self._files = folder, files
        self._open: Any = None
        self._name, self._read = "", 0

    def __call__(self, name: str) -> torch.Tensor:
        """A tensor, valid until the next but a few calls: copy what must last.

        Raises:
            ModelError: it cannot be read.
        """
        from safetensors import safe_open

        try:
            file = self._files[name]
            if file != self._name or self._read > FRESH:
                self._open = None  # what it has mapped goes, as soon as nobody holds a tensor of it
                self._open, self._name, self._read = safe_open(self._folder / file, framework="pt"), file, 0
            found = self._open.get_tensor(name)
        except Exception as e:  # safetensors_rust.SafetensorError derives from Exception only
            raise ModelError(
                f"The weight {name[:100]} of {self._folder.name} cannot be read ({first_line(e)}). Download the model "
                "again."
            ) from e
        self._read += found.numel() * found.element_size()
        return found


def in_shards(entries: list[Entry], most: int) -> list[list[Entry]]:
    """``entries`` in order, in files of at most ``most`` bytes; a greater tensor has a file of its own."""
    shards: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if entry.size > room:
            shards.append([])
            room = most
        shards[-1].append(entry)
        room -= entry.size
    return shards


def names_of(shards: int) -> list[str]:
    """The files' names, as transformers has them."""
    if shards == 1:
        return [WEIGHTS]
    return [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]


def write(path: Path, entries: Iterable[Entry], tensor: Callable[[Entry], torch.Tensor]) -> int:
    """Write a file whole, and on the disk when this returns. Returns its bytes.

    Args:
        tensor: makes the tensor of an entry, on the CPU, in its dtype and shape; it is asked for one after the other.

    Raises:
        OSError: it cannot be written.
    """
    import torch

    order = sorted(entries, key=lambda e: -BYTES[e.kind])  # the widest first: all begin at multiples of their width
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for entry in order:
        offsets = [place, place + entry.size]
        header[entry.name] = {"dtype": entry.kind, "shape": list(entry.shape), "data_offsets": offsets}
        place += entry.size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with beside(path, sync=True) as part, open(part, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for entry in order:
            data = tensor(entry).contiguous().reshape(-1).view(torch.uint8).numpy()
            if data.nbytes != entry.size:
                raise ValueError(f"{entry.name} has {data.nbytes} bytes instead of {entry.size}")
            file.write(data.data)
        file.flush()
    return 8 + len(head) + place


def write_index(folder: Path, shards: dict[str, list[Entry]]) -> None:
    """The index of several files: which tensor lies in which."""
    all_of = [entry for entries in shards.values() for entry in entries]
    index = {
        "metadata": {"total_parameters": sum(e.numbers for e in all_of), "total_size": sum(e.size for e in all_of)},
        "weight_map": {e.name: file for file, entries in shards.items() for e in entries},
    }
    write_whole(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts names with numbers as people do: layer 2 before layer 10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]
