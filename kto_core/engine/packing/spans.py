"""What follows what in a packed pass, for layers that go along a sequence: convolutions and recurrences. NumPy only.

A span is a piece of a path without branches. It begins where its parent ends, at an end that an earlier pass kept, or
with nothing before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

CHUNKS = (16, 32, 64)  # tokens that a recurrence takes at once
STATE = 32  # tokens whose work is as much as that of a chunk's state


@dataclass
class Spans:
    """``bounds``: ``[s, 2]`` start and end in the packed sequence, in order and without gaps, none empty.

    ``parents``: ``[s]`` number of the span, before it, whose end it continues; -1: none. ``kept``: ``[s]`` number of
    the kept end that it continues; -1: none.
    """

    bounds: np.ndarray
    parents: np.ndarray
    kept: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds)

    @property
    def tokens(self) -> int:
        return int(self.bounds[-1, 1])

    def depths(self) -> np.ndarray:
        """Number of spans above each one, ``[s]``."""
        depths = np.zeros(len(self), np.int64)
        for s, parent in enumerate(self.parents):
            if parent >= 0:
                depths[s] = depths[parent] + 1
        return depths


class Lines(NamedTuple):
    """A pass written so that before every token are its own last ancestors; what a causal convolution reads.

    ``rows``: of each place, the row of what is read: the kept ends' tails, then the pass's tokens, then a row of
    zeros. ``place``: of each token, its place. ``copies``: the other places that hold a token of this pass, and
    ``copied``, which. ``tails``: of each span, the rows of the last tokens of its path.
    """

    rows: np.ndarray
    place: np.ndarray
    copies: np.ndarray
    copied: np.ndarray
    tails: np.ndarray


def lines(spans: Spans, width: int, kept: int = 0) -> Lines:
    """For a convolution over ``width`` tokens; ``kept`` ends left their ``width - 1`` last inputs each."""
    before = width - 1
    base, zero = kept * before, kept * before + spans.tokens
    index, place, tails = [], [], np.empty((len(spans), before), np.int64)
    at = 0
    for s, (start, end) in enumerate(spans.bounds.tolist()):
        parent, held = spans.parents[s], spans.kept[s]
        if parent >= 0:
            path = tails[parent]
        else:
            path = np.arange(held * before, (held + 1) * before) if held >= 0 else np.full(before, zero)
        if parent < 0 or spans.bounds[parent, 1] != start:
            index.append(path)
            at += before
        own = base + np.arange(start, end)
        index.append(own)
        place.append(at + np.arange(end - start))
        at += end - start
        tails[s] = np.concatenate([path, own[-before:]])[-before:] if before else own[:0]
    rows, places = np.concatenate(index), np.concatenate(place)
    other = (rows >= base) & (rows < zero)
    other[places] = False
    copies = np.flatnonzero(other)
    return Lines(rows, places, copies, rows[copies] - base, tails)


class Chunks(NamedTuple):
    """A pass cut into chunks of equal length, by depth: those of one depth need only the states of the one before.

    ``tokens``: ``[n, length]`` packed index of each token, 0 where a chunk is not full. ``full``: bool, the same.
    ``place``: of each token, its place in the flat ``tokens``. ``levels``: (first chunk, end) of each depth.
    ``parents``: of each chunk, its parent's number within the depth before; at depth 0 the kept end, -1 for none.
    ``last``: of each span, its last chunk.
    """

    tokens: np.ndarray
    full: np.ndarray
    place: np.ndarray
    levels: list[tuple[int, int]]
    parents: np.ndarray
    last: np.ndarray


def chunks(spans: Spans, length: int | None = None) -> Chunks:
    """Cut into chunks of ``length`` tokens; by default of `CHUNKS` what makes the least work."""
    sizes = spans.bounds[:, 1] - spans.bounds[:, 0]
    length = length or min(CHUNKS, key=lambda n: int((-(-sizes // n)).sum()) * (n + STATE))
    counts = -(-sizes // length)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])  # of each span, its first chunk, as long as they are in order
    last = first + counts - 1
    owner = np.repeat(np.arange(len(spans)), counts)
    step = np.arange(len(owner)) - first[owner]
    above = np.where(step > 0, np.arange(len(owner)) - 1, np.where(spans.parents >= 0, last[spans.parents], -1)[owner])
    begin = np.zeros(len(spans), np.int64)  # depth of each span's first chunk
    for s, parent in enumerate(spans.parents):
        if parent >= 0:
            begin[s] = begin[parent] + counts[parent]
    depth = begin[owner] + step
    order = np.argsort(depth, kind="stable")
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    edges = np.concatenate([[0], np.cumsum(np.bincount(depth))])
    levels = list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
    parents = np.where(above >= 0, number[above] - edges[np.maximum(depth - 1, 0)], spans.kept[owner])[order]
    start = spans.bounds[owner, 0] + step * length
    tokens = start[:, None] + np.arange(length)
    full = tokens < spans.bounds[owner, 1][:, None]
    place = np.empty(spans.tokens, np.int64)
    tokens, full = tokens[order], full[order]
    place[tokens[full]] = np.flatnonzero(full)
    return Chunks(np.where(full, tokens, 0), full, place, levels, parents, number[last])
