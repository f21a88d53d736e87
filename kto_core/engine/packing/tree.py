"""Prefix trees of packed rows: each token that rows share is computed once. NumPy only.

A row is a prompt and a completion. Rows of one pass are merged where they begin alike; the tree's nodes are laid out
depth first in one packed sequence. A token attends to its own path only: its result does not depend on its neighbours.
The last token of a completion predicts nothing that is scored, so it is never an input.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .spans import Spans

SHARE = 8  # tokens: splitting a node for a shorter common start costs more than it saves


class _Node:
    __slots__ = ("children", "parent", "start", "tokens")

    def __init__(self, tokens: np.ndarray, parent: _Node | None):
        self.tokens, self.parent = tokens, parent
        self.children: dict[bytes, _Node] = {}
        self.start = 0  # offset in the packed sequence, set by the layout

    def attach(self, tokens: np.ndarray) -> _Node:
        node = _Node(tokens, self)
        self.children[tokens[:SHARE].tobytes()] = node
        return node

    def find(self, tokens: np.ndarray) -> tuple[_Node | None, int]:
        """A child that begins like ``tokens``, and for how many tokens."""
        child = self.children.get(tokens[:SHARE].tobytes())
        if child is not None:
            n = min(len(child.tokens), len(tokens))
            different = np.flatnonzero(child.tokens[:n] != tokens[:n])
            return child, int(different[0]) if len(different) else n
        for n in range(min(SHARE, len(tokens)) - 1, 0, -1):  # whole nodes shorter than SHARE
            child = self.children.get(tokens[:n].tobytes())
            if child is not None:
                return child, n
        return None, 0

    def split(self, n: int) -> _Node:
        """Cut after ``n`` tokens. ``self`` stays the tail, so that its end stays where it was; the head is returned."""
        head = _Node(self.tokens[:n], self.parent)
        self.parent.children[head.tokens[:SHARE].tobytes()] = head
        self.tokens, self.parent = self.tokens[n:], head
        head.children = {self.tokens[:SHARE].tobytes(): self}
        return head


def _insert(node: _Node, tokens: np.ndarray) -> _Node:
    """The node whose end is the end of ``tokens`` below ``node``."""
    while len(tokens):
        child, n = node.find(tokens)
        if child is None:
            return node.attach(tokens)
        node = child if n == len(child.tokens) else child.split(n)
        tokens = tokens[n:]
    return node


@dataclass
class Segments:
    """Query segments and the keys each may see; what the attention functions read.

    ``queries``: ``[s, 2]`` start and end in the packed sequence, in order and without gaps. ``keys[s]``: the ranges
    (start, end) of its path among the keys, in order of position, its own tokens last. ``q_node``/``k_node``,
    ``q_pos``/``k_pos``: node and position of every query and key token; ``seen[a, b]``: node a attends to node b.
    Keys are the stored prompt keys (if any) followed by the pass's own. ``spans``: what follows what, for layers that
    go along a sequence.
    """

    queries: np.ndarray
    keys: list[list[tuple[int, int]]]
    q_node: np.ndarray
    k_node: np.ndarray
    q_pos: np.ndarray
    k_pos: np.ndarray
    seen: np.ndarray
    spans: Spans


@dataclass
class Scores:
    """Where log-probabilities are read: packed index of the hidden state, target token, and number of the sequence."""

    index: np.ndarray
    target: np.ndarray
    sequence: np.ndarray
    count: int


@dataclass
class Tree:
    """One pass. ``ids``, ``positions``: int64 ``[T]``. ``ends[i]``: the node where the prompt of sequence i ends."""

    ids: np.ndarray
    positions: np.ndarray
    segments: Segments
    scores: Scores
    ends: list = field(default_factory=list)
    nodes: list = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


def build(prompts: list[np.ndarray], completions: list[np.ndarray]) -> Tree:
    """The tree of the sequences ``prompts[i] + completions[i]`` (both at least one token; prompts may repeat)."""
    root = _Node(np.zeros(0, np.int32), None)
    ends = [_insert(root, p) for p in prompts]
    leaves = [_insert(end, c[:-1]) for end, c in zip(ends, completions, strict=True)]

    nodes: list[_Node] = []
    depth: dict[int, int] = {id(root): 0}
    offset = 0
    stack = list(reversed(root.children.values()))
    while stack:
        node = stack.pop()
        node.start = offset
        offset += len(node.tokens)
        depth[id(node)] = depth[id(node.parent)] + len(node.parent.tokens)
        nodes.append(node)
        stack.extend(reversed(node.children.values()))
    number = {id(node): i for i, node in enumerate(nodes)}

    ids = np.concatenate([n.tokens for n in nodes]).astype(np.int64)
    lengths = [len(n.tokens) for n in nodes]
    positions = np.concatenate([np.arange(len(n.tokens)) + depth[id(n)] for n in nodes])
    node_of = np.repeat(np.arange(len(nodes)), lengths)
    parents = [number.get(id(n.parent), -1) for n in nodes]
    seen = _ancestors(parents)

    # an only child continues its parent's segment: nothing else branches off between them
    first: list[int] = []
    for i, n in enumerate(nodes):
        if n.parent is root or len(n.parent.children) > 1:
            first.append(i)
    queries, keys = [], []
    for a, b in zip(first, [*first[1:], len(nodes)], strict=True):
        start, end = nodes[a].start, nodes[b - 1].start + lengths[b - 1]
        path = [(nodes[j].start, nodes[j].start + lengths[j]) for j in np.flatnonzero(seen[a][:a])]
        queries.append((start, end))
        keys.append(_joined([*path, (start, end)]))
    starts = np.array([n.start for n in nodes])
    spans = Spans(np.stack([starts, starts + lengths], 1), np.array(parents), np.full(len(nodes), -1))
    segments = Segments(np.array(queries), keys, node_of, node_of, positions, positions, seen, spans)

    index = [
        np.concatenate([[end.start + len(end.tokens) - 1], *_between(end, leaf)])
        for end, leaf in zip(ends, leaves, strict=True)
    ]
    return Tree(ids, positions, segments, _scores(index, completions), [number[id(e)] for e in ends], nodes)


@dataclass
class Branches:
    """A pass of completions below the prompts of a Tree that was run before.

    ``keep``: packed indices, in that tree, of the prompt tokens whose K/V this pass attends to. ``ends``: numbers, in
    that tree, of the spans at whose ends it begins. ``scores.index`` counts the hidden states of the prompts' last
    tokens first (``carry``: their packed indices in the tree), then this pass's.
    """

    ids: np.ndarray
    positions: np.ndarray
    segments: Segments | None  # None: every completion has one token, so there is nothing to run
    scores: Scores
    keep: np.ndarray
    ends: np.ndarray
    carry: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def branch(tree: Tree, completions: list[np.ndarray]) -> Branches:
    """The completions' pass: ``completions[i]`` follows the prompt of the tree's sequence i."""
    paths = [np.flatnonzero(tree.segments.seen[e]) for e in tree.ends]
    kept = sorted(set(np.concatenate(paths).tolist()))
    starts, place, offset = {}, [], 0
    for k in kept:
        node = tree.nodes[k]
        starts[k] = offset
        place.append(np.arange(node.start, node.start + len(node.tokens)))
        offset += len(node.tokens)
    keep = np.concatenate(place)
    last = [tree.nodes[e].start + len(tree.nodes[e].tokens) - 1 for e in tree.ends]
    carry, base = np.array(last), offset
    ends, end_of = np.unique(tree.ends, return_inverse=True)
    queries, keys, index, ids, positions, node_of = [], [], [], [], [], []
    q = 0
    for i, completion in enumerate(completions):
        body = completion[:-1]
        index.append(np.concatenate([[i], len(completions) + q + np.arange(len(body))]).astype(np.int64))
        if not len(body):
            continue
        path = [(starts[k], starts[k] + len(tree.nodes[k].tokens)) for k in paths[i]]
        queries.append((q, q + len(body)))
        keys.append(_joined([*path, (base + q, base + q + len(body))]))
        ids.append(body)
        positions.append(tree.positions[last[i]] + 1 + np.arange(len(body)))
        node_of.append(np.full(len(body), len(queries) - 1))
        q += len(body)
    scores = _scores(index, completions)
    if not queries:
        empty = np.zeros(0, np.int64)
        return Branches(empty, empty, None, scores, keep, ends, carry)
    ids, positions = np.concatenate(ids).astype(np.int64), np.concatenate(positions)
    column = {k: j for j, k in enumerate(kept)}
    seen = np.zeros((len(queries), len(kept) + len(queries)), bool)
    rows = [i for i, c in enumerate(completions) if len(c) > 1]
    for s, i in enumerate(rows):
        seen[s, [column[k] for k in paths[i]]] = True
        seen[s, len(kept) + s] = True
    q_node = np.concatenate(node_of)
    k_node = np.concatenate([np.repeat(np.arange(len(kept)), [len(tree.nodes[k].tokens) for k in kept]),
                             len(kept) + q_node])  # fmt: skip
    k_pos = np.concatenate([tree.positions[keep], positions])
    spans = Spans(np.array(queries), np.full(len(queries), -1), end_of[rows])
    segments = Segments(np.array(queries), keys, q_node, k_node, positions, k_pos, seen, spans)
    return Branches(ids, positions, segments, scores, keep, ends, carry)


EVEN = (1.02, 1.1, 1.25)  # how much more than its share a pass may have: rows cannot be cut


def packs(prompts, completions, extra, order, budget: int | None) -> list[list[int]]:
    """Split sequences into as few passes of at most ``budget`` packed tokens as the given order allows, of about the
    same size: a smaller pass recomputes fewer layers.

    Rows that follow each other share their common start; ``extra[i]`` tokens are added for row i (its y').
    A row longer than the budget gets a pass of its own; callers refuse it before.
    """
    if budget is None:
        return [list(order)]
    rows = [np.concatenate([prompts[i], completions[i][:-1]]) for i in order]
    own = [len(row) + int(extra[i]) for row, i in zip(rows, order, strict=True)]
    shared = [0, *(_common(a, b) for a, b in zip(rows, rows[1:], strict=False))]
    result, sizes = _filled(order, own, shared, budget)
    if len(result) > 1:
        for slack in EVEN:
            smaller, _ = _filled(order, own, shared, min(budget, int(slack * sum(sizes) / len(sizes))))
            if len(smaller) == len(result):
                return smaller
    return result


def _filled(order, own, shared, budget: int) -> tuple[list[list[int]], list[int]]:
    """Passes that are filled one after the other, and their tokens."""
    result, sizes = [[]], [0]
    for i, tokens, common in zip(order, own, shared, strict=True):
        new = tokens - (common if result[-1] else 0)
        if result[-1] and sizes[-1] + new > budget:
            result.append([])
            sizes.append(0)
            new = tokens
        result[-1].append(i)
        sizes[-1] += new
    return result, sizes


def sorted_by_prefix(prompts, completions, rows) -> list[int]:
    """Row numbers so that rows with a common start are neighbours."""
    return sorted(rows, key=lambda i: (prompts[i].astype(">i4").tobytes(), completions[i].astype(">i4").tobytes()))


def _common(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _ancestors(parents: list[int]) -> np.ndarray:
    """bool ``[n, n]``: row a has its ancestors and itself. Parents come before their children."""
    seen = np.eye(len(parents), dtype=bool)
    for i, parent in enumerate(parents):
        if parent >= 0:
            seen[i] |= seen[parent]
    return seen


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring ranges joined; the order is kept."""
    out = [ranges[0]]
    for a, b in ranges[1:]:
        if a == out[-1][1]:
            out[-1] = (out[-1][0], b)
        else:
            out.append((a, b))
    return out


def _between(end: _Node, leaf: _Node) -> list[np.ndarray]:
    """Packed indices of the tokens after ``end`` down to the end of ``leaf``."""
    parts = []
    while leaf is not end:
        parts.append(np.arange(leaf.start, leaf.start + len(leaf.tokens)))
        leaf = leaf.parent
    return parts[::-1]


def _scores(index: list[np.ndarray], completions: list[np.ndarray]) -> Scores:
    return Scores(
        np.concatenate(index).astype(np.int64),
        np.concatenate(completions).astype(np.int64),
        np.repeat(np.arange(len(completions)), [len(c) for c in completions]),
        len(completions),
    )
