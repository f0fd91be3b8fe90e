"""Which files a stream consists of, and the sealed files that vouch for them.

A plan says what is being written, a receipt what was written of one shard, the manifest what is
committed. A valid seal shows that nothing was damaged, not that it was meant well: every field is
checked before it is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sherl_pipe.cache.arrays import ArraySpec, stream_arrays, table_array
from sherl_pipe.cache.codecs import Codec
from sherl_pipe.cache.errors import (
    CorruptCacheError,
    InputError,
    UnsafeError,
    explain,
    hint,
    shown,
)
from sherl_pipe.cache.fingerprint import ID_BYTES
from sherl_pipe.cache.names import declaration, stream_number
from sherl_pipe.cache.record import FileRecord as FileRecord
from sherl_pipe.cache.schema import ATTRIBUTE, MAX_ROWS, Identity, StreamSpec, stream_version
from sherl_pipe.cache.sealed import bounded, take, unseal
from sherl_pipe.cache.stores import Store

METADATA, MANIFEST, PLAN, RECEIPTS = "zarr.json", "manifest.json", "plan.json", "receipts"

# What only a stream's folder (the group) holds. Metadata is not in it: a split may be called
# `a/hidden/values`, and all its folders have some.
STREAM_DATA = re.compile(
    r"(.+/[^/]+)/(?:(?:values|scales)/c/0/[0-9]+/0|(?:ids|index)/c/0/0|receipts/[0-9]+\.json)\Z"
)
# A shard may decode to this many bytes whatever its size, and beyond that to so many times the
# bytes of its array's files: features never shrink so far, and bombs do.
PLAIN_BYTES, MAX_RATIO = 64 << 20, 256


Records = Mapping[str, FileRecord]


@dataclass(frozen=True)
class StreamFiles:
    """The files of one stream.

    Attributes:
        base: its folder, `<split>/<stream>`.
        arrays: `values`, and `scales` where the codec has them.
        tables: `ids` and `index`.
        shards: number of shards.
    """

    base: str
    arrays: Mapping[str, ArraySpec]
    tables: Mapping[str, ArraySpec]
    shards: int

    @classmethod
    def of(
        cls, base: str, spec: StreamSpec, codec: Codec, counts: Mapping[str, int]
    ) -> StreamFiles:
        """The files of a stream with the `layout` counts of its plan."""
        examples = counts["examples"]
        tables = (
            table_array("ids", (examples, ID_BYTES), "uint8"),
            table_array("index", (examples, 3), "int64"),
        )
        arrays = stream_arrays(spec, codec, counts["capacity"], counts["shards"])
        return cls(base, arrays, {table.name: table for table in tables}, counts["shards"])

    @property
    def groups(self) -> list[str]:
        """Folders that are Zarr groups, the stream's own last."""
        parts = self.base.split("/")
        return ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]

    def metadata(self) -> list[str]:
        """Keys of every `zarr.json`, the root's included, and of the declaration of added taps."""
        folders = [*self.groups, *(f"{self.base}/{name}" for name in (*self.arrays, *self.tables))]
        number = stream_number(self.base)[1]
        declared = [declaration(number)] if number else []
        return [METADATA, *declared, *(f"{folder}/{METADATA}" for folder in folders)]

    def table(self, name: str) -> str | None:
        """Key of the one chunk of a table; an empty table has none."""
        spec = self.tables[name]
        return f"{self.base}/{name}/{spec.chunk_key(0)}" if spec.shape[0] else None

    def shard(self, number: int) -> dict[str, str]:
        """Keys of a shard's files by array."""
        return {
            name: f"{self.base}/{name}/{spec.chunk_key(number)}"
            for name, spec in self.arrays.items()
        }

    def before_shards(self) -> list[str]:
        """Keys of the files that no receipt vouches for."""
        return [*self.metadata(), *filter(None, map(self.table, self.tables))]

    def check(self, records: Records, path: str) -> None:
        """Raise unless a manifest at `path` records these files, of sizes that are believable.

        Raises CorruptCacheError for a missing one; UnsafeError for a foreign one, or for shapes
        that would take far more memory than the files have bytes.
        """
        if self.shards * len(self.arrays) > len(records):  # before anything is done for each
            raise CorruptCacheError(
                explain(
                    f"{path}: field 'files'",
                    expected=f"{len(self.arrays)} files for each of {self.shards} shards",
                    found=f"{len(records)} files",
                )
            )
        shards = [self.shard(number) for number in range(self.shards)]
        require_keys(
            records, [*self.before_shards(), *(k for s in shards for k in s.values())], path
        )
        sizes = {name: sum(records[shard[name]].size for shard in shards) for name in self.arrays}
        for name in self.tables:
            key = self.table(name)
            sizes[name] = records[key].size if key else 0
        for name, spec in (*self.arrays.items(), *self.tables.items()):
            limit = max(PLAIN_BYTES, MAX_RATIO * sizes[name])
            bounded(spec.shard_bytes, 0, limit, f"{path}: layout: bytes of a shard of {name!r}")


def require_keys(records: Records, keys: Iterable[str], path: str) -> None:
    """Raise unless the file at `path` records `keys` and no others."""
    wanted = set(keys)
    for key in sorted(wanted ^ records.keys()):
        if key in wanted:
            raise CorruptCacheError(f"{path}: field 'files' lacks {key!r}.")
        raise UnsafeError(f"{path}: field 'files': {key[:200]!r} is no file of this stream.")


def restore(store: Store, base: str, key: str = "") -> str:
    """How to get a stream back whose file `key` is damaged."""
    # Metadata of the groups above belongs to other streams too; they go with it.
    inside = not key or key.startswith(f"{base}/")
    folder = base if inside else key.rpartition("/")[0]
    return f"To restore, delete {store.path(folder) if folder else store.root} and extract again."


def remedy(store: Store, base: str, key: str = "") -> str:
    """As `restore`, where there may be more damage than was met."""
    return f"Run `sherl-pipe verify --cache {store.root}`. {restore(store, base, key)}"


def read_plan(store: Store, base: str) -> Mapping[str, Any]:
    """The plan of a stream that is being written.

    Raises CorruptCacheError, UnsafeError, and FileNotFoundError where there is none.
    """
    key = f"{base}/{PLAN}"
    data, path = store.read(key), str(store.path(key))
    with hint(restore(store, base)):
        return _plan(unseal(data, path), path)


def read_manifest(store: Store, base: str) -> tuple[Mapping[str, Any], Records]:
    """Plan and files of a committed stream; `StreamFiles.check` has to be held against them.

    Raises CorruptCacheError, UnsafeError, and FileNotFoundError where there is none.
    """
    key = f"{base}/{MANIFEST}"
    data, path = store.read(key), str(store.path(key))
    with hint(restore(store, base)):
        body = unseal(data, path)
        plan = _plan(take(body, "plan", dict, path), f"{path}: plan")
        return plan, _records(body, path)


def receipt_key(base: str, shard: int) -> str:
    """Key of the receipt of a shard of the stream at `base`."""
    return f"{base}/{RECEIPTS}/{shard}.json"


def read_receipt(store: Store, files: StreamFiles, shard: int) -> Records:
    """The files of a committed shard.

    Raises CorruptCacheError, UnsafeError, and FileNotFoundError where there is none.
    """
    key = receipt_key(files.base, shard)
    data, path = store.read(key), str(store.path(key))
    with hint("Delete it and run the same command again: it does that shard anew."):
        body = unseal(data, path)
        number, records = take(body, "shard", int, path), _records(body, path)
        if number != shard:
            raise CorruptCacheError(explain(f"{path}: shard", expected=shard, found=shown(number)))
        require_keys(records, files.shard(shard).values(), path)
        return records


def _records(body: Any, path: str) -> Records:
    return {
        key: FileRecord.from_json(data, f"{path}: files: {key[:200]!r}")
        for key, data in take(body, "files", dict, path).items()
    }


def _plan(body: Any, path: str) -> Mapping[str, Any]:
    """`body`, a plan with fields of the right types and counts that can be."""
    for name in ("split", "stream", "identity", "data"):
        take(body, name, str, path)
    take(body, "notes", dict, path)
    version, expected = take(body, "format", int, path), stream_version(body["stream"])
    if version != expected:
        raise CorruptCacheError(
            explain(f"{path}: field 'format'", expected=expected, found=shown(version))
        )
    layout = take(body, "layout", dict, path)
    counts = {
        name: bounded(take(layout, name, int, f"{path}: layout"), low, MAX_ROWS, f"{path}: {name}")
        for name, low in (("capacity", 1), ("shards", 0), ("examples", 0), ("rows", 0))
    }
    room = bounded(
        counts["capacity"] * counts["shards"], 0, MAX_ROWS, f"{path}: rows of all shards"
    )
    bounded(counts["rows"], 0, room, f"{path}: rows")
    checked: Mapping[str, Any] = body
    return checked


def read_root(store: Store) -> tuple[Identity, FileRecord]:
    """The identity in a cache's root metadata, and what that file is.

    Raises InputError where there is no cache, CorruptCacheError, UnsafeError.
    """
    path = str(store.root / METADATA)
    try:
        data = store.read(METADATA)
    except FileNotFoundError as error:
        raise InputError(
            f"{store.root} is not a cache: it has no {METADATA}. "
            "Point --cache at a folder that `sherl-pipe extract` wrote, or run extract first."
        ) from error
    try:
        found = json.loads(data)["attributes"].get(ATTRIBUTE)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCacheError(f"{path} is damaged: it is no Zarr v3 metadata") from error
    return Identity.from_json(found, path), FileRecord.of(data)
