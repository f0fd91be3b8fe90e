"""Writing a cache: one lock, shards committed one by one, a manifest last.

Order of a stream: metadata, ids and index, then `plan.json`; for every shard its files, then its
receipt; then the manifest, which is what makes the stream exist for readers. Every step is a
whole file or nothing, so a killed writer loses at most the shard in flight.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sherl_pipe.cache import labels as label_files
from sherl_pipe.cache.arrays import ArraySpec, group_metadata, stream_arrays, table_array
from sherl_pipe.cache.codecs import Codes, Scales
from sherl_pipe.cache.errors import CorruptCacheError, InputError, StaleCacheError, explain
from sherl_pipe.cache.fingerprint import ID_BYTES, data_fingerprint, hash_bytes
from sherl_pipe.cache.labels import LabelTable
from sherl_pipe.cache.layout import Layout, check_layout, summary
from sherl_pipe.cache.lock import write_lock
from sherl_pipe.cache.schema import (
    ATTRIBUTE,
    FORMAT_VERSION,
    Identity,
    StreamSpec,
    check_name,
    seal,
    unseal,
)
from sherl_pipe.cache.store import LocalStore

ROOT_METADATA = "zarr.json"


def stream_kind(stream: str) -> str:
    """The entry of `Identity.streams` that describes a stream: `decoder` of `decoder-1a2b3c4d`."""
    return stream.split("-", 1)[0]


def file_record(data: bytes) -> dict[str, Any]:
    """What a receipt says of a file: its size and two hashes.

    Not crc32c: a Zarr shard ends every chunk and its index with the crc32c of what precedes it,
    and the crc32c of such a sequence depends on the lengths alone. Two shards of equal length
    have the same one, so it cannot tell a swapped shard.
    """
    return {
        "bytes": len(data),
        "crc32": zlib.crc32(data),
        "sha256": hash_bytes(data),
    }


def matches(record: Mapping[str, Any], data: bytes) -> bool:
    """Whether a file has the size and crc32 of its receipt; fast enough for every read."""
    return bool(len(data) == record["bytes"] and zlib.crc32(data) == record["crc32"])


class CacheWriter:
    """The one writer of a cache. Make it with `CacheWriter.open`."""

    def __init__(self, store: LocalStore, identity: Identity) -> None:
        self.store = store
        self.identity = identity

    @classmethod
    @contextmanager
    def open(cls, path: str | Path, identity: Identity) -> Iterator[CacheWriter]:
        """Lock the cache at `path`, creating it if need be.

        Raises:
            LockedError: another process writes it.
            StaleCacheError: it was made with another identity.
            StorageError: the storage refuses.
        """
        root = Path(path)
        with write_lock(root):
            store = LocalStore(root)
            store.remove_partials()
            if store.exists(ROOT_METADATA):
                read_identity(store).require(identity, str(root))
            else:
                attributes = {ATTRIBUTE: identity.to_json()}
                store.create(ROOT_METADATA, group_metadata(attributes))
            yield cls(store, identity)

    def stream(
        self,
        split: str,
        stream: str,
        ids: list[bytes],
        layout: Layout,
        notes: Mapping[str, Any],
    ) -> StreamWriter:
        """Begin a stream, or go on with one that was begun.

        Args:
            split: such as `sst2/train`.
            stream: `encoder`, `hidden`, or `decoder-<tree>`.
            ids: example ids in the data's order, one per row of `layout.index`.
            layout: where every example lies.
            notes: JSON kept in the manifest; part of what must agree on resume.

        Raises StaleCacheError if the stream was begun with other data.
        """
        base = f"{check_name(split)}/{check_name(stream, 'stream')}"
        check_layout(layout, base)
        return StreamWriter(self, split, stream, ids, layout, notes)

    def write_labels(self, table: LabelTable) -> int:
        """Attach or replace the labels of one task and role; the number of rows that changed."""
        return label_files.write(self.store, table)


def read_identity(store: LocalStore) -> Identity:
    """The identity in a cache's root metadata. Raises InputError where there is no cache."""
    path = str(store.root / ROOT_METADATA)
    try:
        data = store.read(ROOT_METADATA)
    except FileNotFoundError as error:
        raise InputError(
            f"{store.root} is not a cache: it has no {ROOT_METADATA}. "
            "Point --cache at a folder that `sherl-pipe extract` wrote, or run extract first."
        ) from error
    try:
        found = json.loads(data)["attributes"].get(ATTRIBUTE)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCacheError(f"{path} is damaged: it is no Zarr v3 metadata") from error
    return Identity.from_json(found, path)


class StreamWriter:
    """Commits the shards of one stream of one split. Made by `CacheWriter.stream`."""

    def __init__(
        self,
        writer: CacheWriter,
        split: str,
        stream: str,
        ids: list[bytes],
        layout: Layout,
        notes: Mapping[str, Any],
    ) -> None:
        self.store, self.identity = writer.store, writer.identity
        self.split, self.stream, self.layout = split, stream, layout
        self.base = f"{split}/{stream}"
        self.spec: StreamSpec = self.identity.streams[stream_kind(stream)]
        self.arrays = stream_arrays(self.spec, self.identity.codec, layout)
        self.plan = {
            "format": FORMAT_VERSION,
            "split": split,
            "stream": stream,
            "identity": self.identity.fingerprint(),
            "data": data_fingerprint(ids),
            "layout": summary(layout),
            "notes": dict(notes),
        }
        self.complete = self.store.exists(f"{self.base}/manifest.json")
        if self.complete:
            self._check_same(self._unseal("manifest.json")["plan"])
            self._remove_working_files()
            return
        begun = self.store.exists(f"{self.base}/plan.json")
        if begun:
            self._check_same(self._unseal("plan.json"))
        self._write_metadata(ids)
        if not begun:
            self.store.create(f"{self.base}/plan.json", seal(self.plan))

    def pending(self) -> list[int]:
        """Shards that are not committed, ascending."""
        if self.complete:
            return []
        return [shard for shard in range(self.layout.shards) if self._receipt(shard) is None]

    def commit(self, shard: int, codes: Codes, scales: Scales | None) -> int:
        """Write one shard and its receipt.

        Args:
            codes: `uint8 [taps, rows, code bytes]` of the shard's used rows.
            scales: `float16 [taps, rows, groups]`, or None where the codec has none.

        Returns the bytes written. Raises StorageError.
        """
        blocks: dict[str, npt.NDArray[Any]] = {"values": codes}
        if scales is not None:
            blocks["scales"] = scales
        files = {}
        for name, spec in self.arrays.items():
            key = f"{self.base}/{name}/{spec.chunk_key(shard)}"
            data = spec.encode(shard, _with_tail(spec, blocks[name]))
            # A file without a receipt is the trace of a crash; it is written anew.
            self.store.delete(key)
            self.store.create(key, data)
            files[key] = file_record(data)
        self.store.create(self._receipt_key(shard), seal({"shard": shard, "files": files}))
        return sum(record["bytes"] for record in files.values())

    def finish(self) -> None:
        """Commit the manifest; from now on readers see the stream."""
        if self.complete:
            return
        files = {key: file_record(self.store.read(key)) for key in self._metadata_keys()}
        for shard in range(self.layout.shards):
            receipt = self._receipt(shard)
            if receipt is None:
                raise StaleCacheError(f"{self.base}: shard {shard} was not committed")
            files.update(receipt["files"])
        self.store.create(f"{self.base}/manifest.json", seal({"plan": self.plan, "files": files}))
        self.complete = True
        self._remove_working_files()

    def _write_metadata(self, ids: list[bytes]) -> None:
        """Metadata, ids and index, where they are missing or not right.

        On resume too: they have no receipt, and the manifest vouches for what it finds.
        """
        table = np.frombuffer(b"".join(ids), np.uint8).reshape(len(ids), ID_BYTES)
        for name, content in (("ids", table), ("index", self.layout.index)):
            spec = table_array(name, content.shape, str(content.dtype))
            self._renew(f"{self.base}/{name}/zarr.json", spec.metadata())
            if len(content):
                self._renew(f"{self.base}/{name}/{spec.chunk_key(0)}", spec.encode(0, content))
        for name, array in self.arrays.items():
            self._renew(f"{self.base}/{name}/zarr.json", array.metadata())
        for folder in self._group_folders():
            attributes = {ATTRIBUTE: {"taps": list(self.spec.taps)}} if folder == self.base else {}
            if folder == self.base or not self.store.exists(f"{folder}/zarr.json"):
                self._renew(f"{folder}/zarr.json", group_metadata(attributes))

    def _renew(self, key: str, data: bytes) -> None:
        if not self.store.exists(key) or self.store.read(key) != data:
            self.store.delete(key)
            self.store.create(key, data)

    def _group_folders(self) -> list[str]:
        parts = self.base.split("/")
        return ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]

    def _metadata_keys(self) -> list[str]:
        keys = [ROOT_METADATA, *(f"{folder}/zarr.json" for folder in self._group_folders())]
        keys += [f"{self.base}/{name}/zarr.json" for name in (*self.arrays, "ids", "index")]
        if len(self.layout.index):
            keys += [f"{self.base}/ids/c/0/0", f"{self.base}/index/c/0/0"]
        return keys

    def _unseal(self, name: str) -> Any:
        key = f"{self.base}/{name}"
        return unseal(self.store.read(key), str(self.store.path(key)))

    def _check_same(self, found: Mapping[str, Any]) -> None:
        for field, expected in self.plan.items():
            if found.get(field) != expected:
                what = {"data": "data (texts or their order)", "layout": "shard layout"}
                raise StaleCacheError(
                    explain(
                        f"{self.store.path(self.base)} holds other {what.get(field, field)}",
                        expected=expected,
                        found=found.get(field),
                        todo="Extract to another --cache, or delete this folder first.",
                    )
                )

    def _receipt_key(self, shard: int) -> str:
        return f"{self.base}/receipts/{shard}.json"

    def _receipt(self, shard: int) -> Any | None:
        """The receipt of a committed shard; None, and no trace of it, where it is not whole."""
        key = self._receipt_key(shard)
        if not self.store.exists(key):
            return None
        receipt = self._unseal(f"receipts/{shard}.json")
        whole = all(
            self.store.exists(file) and matches(record, self.store.read(file))
            for file, record in receipt["files"].items()
        )
        if not whole:
            self.store.delete(key)
            return None
        return receipt

    def _remove_working_files(self) -> None:
        """Receipts and plan live on in the manifest."""
        for key in list(self.store.list(f"{self.base}/receipts")):
            self.store.delete(key)
        self.store.delete_folder(f"{self.base}/receipts")
        self.store.delete(f"{self.base}/plan.json")


def _with_tail(spec: ArraySpec, block: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`block` filled up to the shard's capacity."""
    if block.shape == spec.shard:
        return block
    whole = np.full(spec.shard, spec.fill, spec.dtype)
    whole[:, : block.shape[1]] = block
    return whole
