"""Writing a stream: shards committed one by one, a manifest last.

Order: `plan.json`; metadata, ids and index; for every shard its files, then its receipt; then the
manifest, which is what makes the stream exist for readers. Every step is a whole file or nothing,
so a killed writer loses at most the shard in flight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sherl_pipe.cache import catalogue
from sherl_pipe.cache.arrays import group_metadata
from sherl_pipe.cache.codecs import Codes, Scales
from sherl_pipe.cache.errors import (
    CorruptCacheError,
    IncompleteSplitError,
    InputError,
    StaleCacheError,
    explain,
    hint,
)
from sherl_pipe.cache.fingerprint import ID_BYTES, data_fingerprint
from sherl_pipe.cache.layout import Layout, summary
from sherl_pipe.cache.manifest import (
    MANIFEST,
    METADATA,
    PLAN,
    RECEIPTS,
    FileRecord,
    Records,
    read_manifest,
    read_plan,
    remedy,
    restore,
)
from sherl_pipe.cache.schema import ATTRIBUTE, Identity, StreamSpec, stream_version
from sherl_pipe.cache.sealed import seal
from sherl_pipe.cache.shard_writer import ShardWriter, records_json, stream_files
from sherl_pipe.cache.stores import Store


class StreamWriter:
    """Commits the shards of one stream of one split. Made by `CacheWriter.stream`."""

    def __init__(
        self,
        store: Store,
        identity: Identity,
        split: str,
        stream: str,
        ids: list[bytes],
        layout: Layout,
        notes: Mapping[str, Any],
    ) -> None:
        self.store, self.identity = store, identity
        self.split, self.stream, self.layout = split, stream, layout
        self.base = f"{split}/{stream}"
        self.spec: StreamSpec = self.identity.spec(stream)
        counts = summary(layout)
        self.files = stream_files(identity, split, stream, counts)
        self._shards = ShardWriter(store, self.files)
        self._known: dict[int, Records] = {}
        self.plan = {
            "format": stream_version(stream),
            "split": split,
            "stream": stream,
            "identity": self.identity.fingerprint_of(stream),
            "data": data_fingerprint(ids),
            "layout": counts,
            "notes": dict(notes),
        }
        catalogue.enter(self.store, self.base)
        self.complete = self.store.exists(f"{self.base}/{MANIFEST}")
        if self.complete:
            self._check_finished()
            self._remove_working_files()
            return
        if self.store.exists(f"{self.base}/{PLAN}"):
            self._check_same(read_plan(self.store, self.base))
        else:
            self._refuse_nesting()
            # What is left of a folder that was half deleted may be of other data.
            self._remove_receipts()
            self.store.create(f"{self.base}/{PLAN}", seal(self.plan))
        self._write_metadata(ids)

    def pending(self) -> list[int]:
        """Shards that are not committed, ascending."""
        if self.complete:
            return []
        return [shard for shard, receipt in enumerate(self._receipts()) if receipt is None]

    def commit(self, shard: int, codes: Codes, scales: Scales | None) -> int:
        """Write one shard and its receipt; arguments and errors as `ShardWriter.commit`.

        Returns the bytes written.
        """
        return self.accept(shard, self._shards.commit(shard, codes, scales))

    def accept(self, shard: int, receipt: Records) -> int:
        """Take note of a shard that a worker of this run has committed; its bytes."""
        self._known[shard] = receipt
        return sum(record.size for record in receipt.values())

    def finish(self) -> None:
        """Commit the manifest; from now on readers see the stream.

        Raises IncompleteSplitError where a shard is not committed, StorageError.
        """
        if self.complete:
            return
        files = {k: FileRecord.of(self.store.read(k)) for k in self.files.before_shards()}
        receipts = self._receipts()
        missing = [shard for shard, receipt in enumerate(receipts) if receipt is None]
        if missing:
            raise IncompleteSplitError(
                f"{self.store.path(self.base)}: {len(missing)} of {self.layout.shards} shards are "
                f"not committed, the first is {missing[0]}. Run the same command again; it does "
                "only these."
            )
        for receipt in receipts:
            files.update(receipt or {})
        manifest = f"{self.base}/{MANIFEST}"
        # What a reader would refuse is not committed.
        with hint("Extract to another --cache with a smaller --shard-mib."):
            self.files.check(files, str(self.store.path(manifest)))
        self.store.create(manifest, seal({"plan": self.plan, "files": records_json(files)}))
        self.complete = True
        self._remove_working_files()

    def _write_metadata(self, ids: list[bytes]) -> None:
        """Metadata, ids and index, where they are missing or not right.

        On resume too: they have no receipt, and the manifest vouches for what it finds.
        """
        table = np.frombuffer(b"".join(ids), np.uint8).reshape(len(ids), ID_BYTES)
        for name, content in (("ids", table), ("index", self.layout.index)):
            if key := self.files.table(name):
                self._renew(key, self.files.tables[name].encode(0, content))
        for name, spec in (*self.files.arrays.items(), *self.files.tables.items()):
            self._renew(f"{self.base}/{name}/{METADATA}", spec.metadata())
        for folder in self.files.groups[:-1]:
            # Manifests of other streams vouch for these, and Zarr may write them otherwise today.
            if not self.store.exists(f"{folder}/{METADATA}"):
                self.store.create(f"{folder}/{METADATA}", group_metadata({}))
        attributes = {ATTRIBUTE: {"taps": list(self.spec.taps)}}
        self._renew(f"{self.base}/{METADATA}", group_metadata(attributes))

    def _renew(self, key: str, data: bytes) -> None:
        if self.store.exists(key):
            if self.store.read(key) == data:
                return
            self.store.delete(key)
        self.store.create(key, data)

    def _check_finished(self) -> None:
        """Raise unless the stream is of this data, and its files are there in their sizes."""
        plan, records = read_manifest(self.store, self.base)
        self._check_same(plan)
        with hint(restore(self.store, self.base)):
            self.files.check(records, str(self.store.path(f"{self.base}/{MANIFEST}")))
        sizes = self.store.each(self.store.size, records)
        for (key, record), found in zip(records.items(), sizes, strict=True):
            if found != record.size:
                raise CorruptCacheError(
                    explain(
                        f"{self.store.path(key)} is not the file that was committed",
                        expected=f"{record.size} bytes",
                        found="no file" if found is None else f"{found} bytes",
                        todo=remedy(self.store, self.base, key),
                    )
                )

    def _refuse_nesting(self) -> None:
        """Raise InputError where a split's name puts this stream into another, or around one."""
        marks = (f"/{MANIFEST}", f"/{PLAN}")
        above = (f"{folder}{mark}" for folder in self.files.groups[:-1] for mark in marks)
        below = (key for key in self.store.list(self.base) if key.endswith(marks))
        for key in (*filter(self.store.exists, above), *below):
            other, name, _ = key.rsplit("/", 2)
            raise InputError(
                f"the folder of stream {self.stream!r} of split {self.split!r} and that of stream "
                f"{name!r} of split {other!r} would lie one in the other. Rename a split."
            )

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

    def _receipts(self) -> Sequence[Records | None]:
        return self.store.each(self._receipt, range(self.layout.shards))

    def _receipt(self, shard: int) -> Records | None:
        """The receipt of a committed shard, whose files were read back since this writer began."""
        if shard not in self._known:
            found = self._shards.receipt(shard)
            if found is None:
                return None
            self._known[shard] = found
        return self._known[shard]

    def _remove_receipts(self) -> None:
        self.store.each(self.store.delete, list(self.store.list(f"{self.base}/{RECEIPTS}")))
        self.store.delete_folder(f"{self.base}/{RECEIPTS}")

    def _remove_working_files(self) -> None:
        """Receipts and plan live on in the manifest."""
        self._remove_receipts()
        self.store.delete(f"{self.base}/{PLAN}")
