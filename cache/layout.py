"""Where every row of a split lies: pure arithmetic, no files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sherl_pipe.cache.codecs import Codec
from sherl_pipe.cache.errors import CorruptCacheError, InputError
from sherl_pipe.cache.schema import MAX_ROWS, StreamSpec
from sherl_pipe.cache.sealed import bounded

Index = npt.NDArray[np.int64]

# The bytes that a full shard takes before compression. Large enough that a file's fixed costs
# vanish, small enough that a shard is a modest unit of loss and of memory.
SHARD_BYTES = 32 << 20


@dataclass(frozen=True)
class Layout:
    """The shards of one stream of one split.

    Attributes:
        capacity: rows that every shard has room for.
        shards: number of shards.
        index: `int64 [examples, 3]`: shard, first row in the shard, rows. In the data's order.
    """

    capacity: int
    shards: int
    index: Index

    def members(self, shard: int) -> npt.NDArray[np.int64]:
        """Examples of a shard, in the order of their rows."""
        inside = np.flatnonzero(self.index[:, 0] == shard)
        return inside[np.argsort(self.index[inside, 1], kind="stable")]

    def used_rows(self, shard: int) -> int:
        """Rows of a shard that hold data; the tail behind them is fill."""
        return int(self.index[self.index[:, 0] == shard, 2].sum())


def shard_capacity(spec: StreamSpec, codec: Codec, shard_bytes: int = SHARD_BYTES) -> int:
    """Rows of a shard of about `shard_bytes` bytes."""
    return max(64, shard_bytes // (codec.row_bytes(spec.width) * len(spec.taps)) // 64 * 64)


def assign(lengths: npt.NDArray[np.int64], capacity: int, seed: int) -> Layout:
    """Deal examples of `lengths` rows to shards.

    A seeded permutation makes every shard a uniform sample of the split; inside a shard examples
    stand sorted by length, so that batches of neighbours need little padding.

    Raises InputError for an example longer than a shard.
    """
    if len(lengths) and lengths.max() > capacity:
        raise InputError(
            f"an example of {lengths.max()} tokens does not fit a shard of {capacity}. "
            "Lower --max-length."
        )
    capacity = int(min(capacity, lengths.sum())) if len(lengths) else 1
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(lengths))
    shard_of = np.zeros(len(lengths), np.int64)
    shard, used = 0, 0
    for example in order:
        if used + lengths[example] > capacity:
            shard, used = shard + 1, 0
        shard_of[example] = shard
        used += int(lengths[example])
    shards = shard + 1 if len(lengths) else 0
    return Layout(capacity, shards, _place(shard_of, lengths, shards))


def same_shards(layout: Layout, rows: int | npt.NDArray[np.int64]) -> Layout:
    """The same examples in the same shards and order, with `rows` rows each, or `rows[i]`."""
    lengths = np.broadcast_to(np.asarray(rows, np.int64), len(layout.index))
    counts = np.bincount(layout.index[:, 0], lengths, minlength=layout.shards)
    index = np.empty_like(layout.index)
    for shard in range(layout.shards):
        members = layout.members(shard)
        index[members, 0] = shard
        index[members, 1] = np.cumsum(lengths[members]) - lengths[members]
        index[members, 2] = lengths[members]
    return Layout(max(1, int(counts.max(initial=0))), layout.shards, index)


def _place(shard_of: Index, lengths: Index, shards: int) -> Index:
    index = np.stack([shard_of, np.zeros_like(lengths), lengths], axis=1)
    for shard in range(shards):
        members = np.flatnonzero(shard_of == shard)
        members = members[np.argsort(lengths[members], kind="stable")]
        ends = np.cumsum(lengths[members])
        index[members, 1] = ends - lengths[members]
    return index


def check_layout(layout: Layout, path: str) -> None:
    """Raise unless the index describes packed, disjoint rows inside the shards."""
    bounded(layout.capacity * max(1, layout.shards), 1, MAX_ROWS, f"{path}: rows")
    index = layout.index
    inside = (index >= 0).all() and (index[:, 1:] <= layout.capacity).all()
    if not inside or (index[:, 0] >= layout.shards).any():
        raise CorruptCacheError(f"{path}: the index points outside the shards.")
    shard, first, rows = index[np.lexsort((index[:, 2], index[:, 1], index[:, 0]))].T
    ends = first + rows
    begin = np.zeros_like(first)
    begin[1:] = np.where(shard[1:] == shard[:-1], ends[:-1], 0)
    if (first != begin).any() or (ends > layout.capacity).any():
        raise CorruptCacheError(f"{path}: the index has gaps, overlaps, or rows outside a shard.")


def summary(layout: Layout) -> dict[str, Any]:
    """The numbers of a layout that manifests carry."""
    return {
        "capacity": layout.capacity,
        "shards": layout.shards,
        "examples": len(layout.index),
        "rows": int(layout.index[:, 2].sum()),
    }
