"""Committing one shard: its files, then the receipt that vouches for them.

Needs nothing but where the stream lies, so that any process that the run lets in can do it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from sherl_pipe.cache.arrays import ArraySpec
from sherl_pipe.cache.codecs import Codes, Scales
from sherl_pipe.cache.manifest import FileRecord, Records, StreamFiles, read_receipt, receipt_key
from sherl_pipe.cache.schema import Identity
from sherl_pipe.cache.sealed import seal
from sherl_pipe.cache.stores import Store


def stream_files(
    identity: Identity, split: str, stream: str, counts: Mapping[str, int]
) -> StreamFiles:
    """The files of a stream of a cache with the `layout` counts of its plan."""
    spec = identity.spec(stream)
    return StreamFiles.of(f"{split}/{stream}", spec, identity.codec, counts)


class ShardWriter:
    """Commits shards of one stream."""

    def __init__(self, store: Store, files: StreamFiles) -> None:
        self._store, self._files = store, files

    def commit(self, shard: int, codes: Codes, scales: Scales | None) -> Records:
        """Write one shard and its receipt; what the receipt says.

        Args:
            codes: `uint8 [taps, rows, code bytes]` of the shard's used rows.
            scales: `uint8 [taps, rows, scale bytes]`, or None where the codec has none.

        Raises StorageError.
        """
        blocks: dict[str, npt.NDArray[Any]] = {"values": codes}
        if scales is not None:
            blocks["scales"] = scales
        files = {}
        for name, key in self._files.shard(shard).items():
            spec = self._files.arrays[name]
            data = spec.encode(shard, _with_tail(spec, blocks[name]))
            # A file without a receipt is the trace of a crash; it is written anew.
            self._store.delete(key)
            self._store.create(key, data)
            files[key] = FileRecord.of(data)
        body = {"shard": shard, "files": records_json(files)}
        self._store.create(receipt_key(self._files.base, shard), seal(body))
        return files

    def receipt(self, shard: int) -> Records | None:
        """The receipt of a committed shard; None, and no trace of it, where it is not whole."""
        try:
            receipt = read_receipt(self._store, self._files, shard)
        except FileNotFoundError:
            return None
        if not all(self._store.holds(key, record) for key, record in receipt.items()):
            self._store.delete(receipt_key(self._files.base, shard))
            return None
        return receipt


def records_json(records: Records) -> dict[str, Any]:
    """The `files` of a receipt or manifest."""
    return {key: record.to_json() for key, record in records.items()}


def _with_tail(spec: ArraySpec, block: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`block` filled up to the shard's capacity."""
    if block.shape == spec.shard:
        return block
    whole = np.full(spec.shard, spec.fill, spec.dtype)
    whole[:, : block.shape[1]] = block
    return whole
