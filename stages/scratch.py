"""A cache in memory, for what is written only to be measured."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sherl_pipe.cache import CacheWriter, FeatureCache, Identity
from sherl_pipe.cache.arrays import group_metadata
from sherl_pipe.cache.manifest import METADATA, read_root
from sherl_pipe.cache.record import FileRecord
from sherl_pipe.cache.schema import ATTRIBUTE
from sherl_pipe.cache.store import LocalStore
from sherl_pipe.cache.stores import Store
from sherl_pipe.stages.amounts import StreamBytes

_FEATURES, _TABLES = re.compile(r"(values|scales)/c/"), re.compile(r"(ids|index)/c/")


class MemoryStore(LocalStore):
    """A store of which nothing reaches the disk."""

    def __init__(self) -> None:
        super().__init__(Path("memory"))
        self._files: dict[str, bytes] = {}

    def read(self, key: str, record: FileRecord | None = None, *, keep: bool = False) -> bytes:
        """The bytes of `key`. Raises FileNotFoundError."""
        if key not in self._files:
            raise FileNotFoundError(key)
        return self._files[key]

    def exists(self, key: str) -> bool:
        return key in self._files

    def size(self, key: str) -> int | None:
        return len(self._files[key]) if key in self._files else None

    def create(self, key: str, data: bytes) -> None:
        """Write `key` once. Raises FileExistsError."""
        if key in self._files:
            raise FileExistsError(key)
        self.replace(key, data)

    def replace(self, key: str, data: bytes) -> None:
        self._files[self.path(key).relative_to(self.root).as_posix()] = bytes(data)

    def delete(self, key: str) -> None:
        self._files.pop(key, None)

    def delete_folder(self, key: str) -> None:
        """Folders are what keys have in common; an empty one is not there."""

    def list(self, prefix: str = "") -> Iterator[str]:
        yield from sorted(k for k in self._files if not prefix or k.startswith(f"{prefix}/"))


def memory_writer(identity: Identity) -> CacheWriter:
    """The writer of an empty cache in memory."""
    store = MemoryStore()
    store.create(METADATA, group_metadata({ATTRIBUTE: identity.to_json()}))
    return CacheWriter(store, identity)


def opened(writer: CacheWriter) -> FeatureCache:
    """The cache that a writer has written so far, in memory or not."""
    return FeatureCache(writer.store, *read_root(writer.store))


def stream_bytes(store: Store, split: str, stream: str) -> StreamBytes:
    """Bytes of a finished stream's files.

    A main stream counts the folder of its split too.
    """
    base = f"{split}/{stream}/"
    features = tables = fixed = 0
    for key in store.list(f"{split}/{stream}"):
        size, name = store.size(key) or 0, key.removeprefix(base)
        if _FEATURES.match(name):
            features += size
        elif _TABLES.match(name):
            tables += size
        else:
            fixed += size
    if not stream.startswith("decoder"):
        fixed += store.size(f"{split}/{METADATA}") or 0
    return StreamBytes(features, tables, fixed)
