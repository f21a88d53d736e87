"""Which rows make a step, and whose completion each row borrows for the KL. NumPy only; no model, no torch.

One optimizer batch is one KL group: z0 is the mean of log pi(y'|x) - log pi_ref(y'|x) over the group's rows, y'
being the completion of another row of the same group (KTO, arXiv 2402.01306, section 4.1). `plan_epoch` makes the
groups of an epoch from a seed; the same seed and epoch give the same plan, so a resumed run meets the same pairs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from kto_core.errors import DataError


@dataclass(frozen=True)
class Ragged:
    """Rows of token ids in one flat array. ``self[i]`` is a view, int32 ``[length]``."""

    flat: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, rows) -> Ragged:
        arrays = [np.asarray(r, dtype=np.int32) for r in rows]
        flat = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
        return cls(flat, np.concatenate([[0], np.cumsum([len(a) for a in arrays], dtype=np.int64)]).astype(np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.flat[self.offsets[i] : self.offsets[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def keys(self) -> np.ndarray:
        """One uint64 a row, equal for equal rows."""
        data, ends = self.flat.tobytes(), (self.offsets * self.flat.itemsize).tolist()
        digest = [hashlib.blake2b(data[a:b], digest_size=8).digest() for a, b in zip(ends[:-1], ends[1:], strict=True)]
        return np.frombuffer(b"".join(digest), dtype=np.uint64)


@dataclass(frozen=True)
class TokenRows:
    """A data set as token ids: ``prompt`` and ``completion`` (Ragged) and ``labels`` (bool ``[n]``).

    ``prompt_keys``: uint64 ``[n]``, equal for rows that had the same prompt before any was cut; None: by their ids.
    """

    prompt: Ragged
    completion: Ragged
    labels: np.ndarray
    prompt_keys: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def from_dataset(cls, dataset) -> TokenRows:
        """From a datasets.Dataset with the columns ``prompt_ids``, ``completion_ids`` (lists of int) and ``label``, and
        perhaps ``prompt_key`` (see ``prompt_keys``).

        Raises:
            DataError: a column is missing, or a row has no prompt token or no completion token.
        """
        missing = [c for c in ("prompt_ids", "completion_ids", "label") if c not in dataset.column_names]
        if missing:
            raise DataError(
                f"The training data lacks the columns {', '.join(missing)}. Each row needs prompt_ids, "
                "completion_ids and label."
            )
        parts: dict[str, list] = {"prompt_ids": [], "completion_ids": []}
        lengths: dict[str, list] = {"prompt_ids": [], "completion_ids": []}
        labels = []
        columns = dataset.select_columns(["prompt_ids", "completion_ids", "label"]).with_format("arrow")
        for table in columns.iter(batch_size=20_000):
            for name in parts:
                column = table.column(name).combine_chunks()
                parts[name].append(column.flatten().to_numpy(zero_copy_only=False).astype(np.int32))
                lengths[name].append(column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64))
            labels.append(np.asarray(table.column("label").to_pylist(), dtype=bool))

        def ragged(name):
            if not parts[name]:
                return Ragged.of([])
            ends = np.cumsum(np.concatenate(lengths[name]), dtype=np.int64)
            return Ragged(np.concatenate(parts[name]), np.concatenate([[0], ends]))

        keys = np.asarray(dataset["prompt_key"], np.uint64) if "prompt_key" in dataset.column_names else None
        rows = cls(ragged("prompt_ids"), ragged("completion_ids"), np.concatenate(labels or [np.zeros(0, bool)]), keys)
        for what, column in (("prompt", rows.prompt), ("completion", rows.completion)):
            if len(empty := np.flatnonzero(column.lengths == 0)):
                raise DataError(
                    f"{len(empty)} rows have an empty {what}, starting with row {empty[0] + 1}. Remove them."
                )
        return rows


@dataclass(frozen=True)
class EpochPlan:
    """Groups of one epoch.

    ``rows``: row numbers in order; group ``g`` is ``rows[bounds[g]:bounds[g + 1]]``. ``partner``: for each place in
    ``rows``, the row whose completion is its y'; inside a group a permutation of the group's rows. The counts say how
    many y' could not be kept off the row's own completion, its own prompt, or an identical text.
    """

    rows: np.ndarray
    bounds: np.ndarray
    partner: np.ndarray
    own: int = 0
    same_prompt: int = 0
    identical: int = 0

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def group(self, g: int) -> tuple[np.ndarray, np.ndarray]:
        span = slice(self.bounds[g], self.bounds[g + 1])
        return self.rows[span], self.partner[span]


def group_count(n: int, group_size: int, kl: bool = True) -> int:
    """Steps of an epoch. With ``kl`` no group has fewer than two rows.

    Raises:
        DataError: one row cannot be paired.
    """
    if kl and n < 2:
        raise DataError(
            "KTO needs at least two rows, because the KL term is estimated with another row's answer. Add rows."
        )
    count = -(-n // group_size)
    return max(1, min(count, n // 2)) if kl else max(1, count)


def plan_epoch(
    labels: np.ndarray,
    prompt_keys: np.ndarray | None,
    completion_keys: np.ndarray | None,
    group_size: int,
    seed: int,
    epoch: int,
    kl: bool = True,
) -> EpochPlan:
    """Shuffle, spread the labels, cut into groups, pair the completions.

    Groups differ in size by one row at most, so that no row counts more than another and there is no tail group of one.

    Args:
        labels: bool ``[n]``. prompt_keys, completion_keys: ``[n]``, equal for equal token ids; unused without kl.
        group_size: rows of an optimizer batch. kl: False for a loss without y' (partner is then the row itself).

    Raises:
        DataError: there is only one row.
    """
    n = len(labels)
    groups = group_count(n, group_size, kl)
    rng = np.random.default_rng([seed, epoch])
    place = np.empty(n)
    for value in (True, False):  # the k-th of K rows of a label comes at k/K of the epoch
        of_label = rng.permutation(np.flatnonzero(labels == value))
        place[of_label] = (np.arange(len(of_label)) + rng.random()) / max(1, len(of_label))
    rows = np.argsort(place, kind="stable")
    sizes = np.full(groups, n // groups)
    sizes[rng.permutation(groups)[: n % groups]] += 1
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    group_of = np.repeat(np.arange(groups), sizes)
    rows = rows[np.lexsort((rng.random(n), group_of))]  # a random order inside each group
    if not kl:
        return EpochPlan(rows, bounds, rows.copy())

    following = np.arange(1, n + 1)
    following[bounds[1:] - 1] = bounds[:-1]
    partner = rows[following]
    clash = (prompt_keys[partner] == prompt_keys[rows]) | (completion_keys[partner] == completion_keys[rows])
    for g in np.unique(group_of[clash]):
        span = slice(bounds[g], bounds[g + 1])
        partner[span] = _pair(rows[span], partner[span], prompt_keys, completion_keys)
    return EpochPlan(
        rows,
        bounds,
        partner,
        own=int(np.count_nonzero(partner == rows)),
        same_prompt=int(np.count_nonzero((partner != rows) & (prompt_keys[partner] == prompt_keys[rows]))),
        identical=int(
            np.count_nonzero(
                (prompt_keys[partner] != prompt_keys[rows]) & (completion_keys[partner] == completion_keys[rows])
            )
        ),
    )


def plan_sequential(n: int, micro_batch: int, accumulation: int) -> EpochPlan:
    """TRL's own order: rows as they come; y' is the completion of the row before, inside each micro-batch of TRL's.

    A last micro-batch of one row takes the completion of the row before it; TRL would give it its own, whose KL is its
    reward. (The fallback trainer's rows are paired the same way.)
    """
    rows = np.arange(n)
    starts = rows // micro_batch * micro_batch
    ends = np.minimum(starts + micro_batch, n)
    partner = np.where(rows == starts, ends - 1, rows - 1)
    if n > 1 and n % micro_batch == 1:
        partner[-1] = n - 2
    step = micro_batch * accumulation
    bounds = np.append(np.arange(0, n, step), n)
    return EpochPlan(rows, bounds, partner, own=int(np.count_nonzero(partner == rows)))


def _pair(rows: np.ndarray, partner: np.ndarray, prompt_keys: np.ndarray, completion_keys: np.ndarray) -> np.ndarray:
    """A permutation of ``rows`` with as few bad pairs as a matching can have, starting from ``partner``."""
    p, c = prompt_keys[rows].tolist(), completion_keys[rows].tolist()
    where = {r: i for i, r in enumerate(rows.tolist())}
    take = [where[r] for r in partner.tolist()]  # place i takes the completion of place take[i]
    m = len(take)

    def good(i, j):
        return p[i] != p[j] and c[i] != c[j]

    for i in range(m):
        if not good(i, take[i]):
            for j in (*range(i + 1, m), *range(i)):
                if good(i, take[j]) and good(j, take[i]):
                    take[i], take[j] = take[j], take[i]
                    break
    if all(good(i, j) for i, j in enumerate(take)):
        return rows[take]
    # swaps got stuck: augmenting paths find a perfect matching if there is one; then the rules are relaxed in turn
    held: list[int | None] = [j if good(i, j) else None for i, j in enumerate(take)]
    for rule in (good, lambda i, j: p[i] != p[j], lambda i, j: i != j, lambda i, j: True):
        edges = [[j for j in range(m) if rule(i, j)] for i in range(m)]
        for i in range(m):
            if held[i] is None:
                _augment(i, edges, held)
    return rows[held]


def _augment(start: int, edges: list[list[int]], held: list[int | None]) -> bool:
    """Kuhn's step: give ``start`` a completion, moving others along an alternating path. ``held[i]``: what i takes."""
    taker = {j: i for i, j in enumerate(held) if j is not None}
    came_from: dict[int, int] = {}
    queue = [start]
    for i in queue:
        for j in edges[i]:
            if j in came_from:
                continue
            came_from[j] = i
            if j in taker:
                queue.append(taker[j])
                continue
            while j is not None:  # walk back: each place takes the completion it was reached by
                i = came_from[j]
                held[i], j = j, held[i]
            return True
    return False
