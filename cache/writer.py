"""Writing a cache: one lock, streams one by one, labels at any time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from sherl_pipe.cache import catalogue
from sherl_pipe.cache import labels as label_files
from sherl_pipe.cache.added import declare, stored_identity
from sherl_pipe.cache.arrays import group_metadata
from sherl_pipe.cache.fence import shut
from sherl_pipe.cache.labels import LabelTable
from sherl_pipe.cache.layout import Layout, check_layout
from sherl_pipe.cache.manifest import METADATA
from sherl_pipe.cache.names import check_name, check_part
from sherl_pipe.cache.place import Place
from sherl_pipe.cache.schema import ATTRIBUTE, Identity
from sherl_pipe.cache.stores import Store, writing
from sherl_pipe.cache.stream_writer import StreamWriter


class CacheWriter:
    """The one writer of a cache. Make it with `CacheWriter.open`."""

    def __init__(self, store: Store, identity: Identity) -> None:
        self.store = store
        self.identity = identity

    @classmethod
    @contextmanager
    def open(cls, path: str | Place, identity: Identity) -> Iterator[CacheWriter]:
        """Lock the cache at `path`, a folder or a URL, creating it if need be.

        Taps of `identity` that the cache lacks are added to it: from now on every stream has to be
        extended by streams of them (`Identity.parts`). Those that are there stay.

        Raises:
            LockedError: another process writes it.
            StaleCacheError: it was made with another identity, taps aside.
            CorruptCacheError: what says which taps were added is damaged.
            StorageError: the storage refuses.
        """
        with writing(path) as store:
            shut(store.root)
            store.remove_partials()
            catalogue.begin(store)
            found = stored_identity(store)
            if found is not None:
                found.require(identity, str(store.root))
                if missing := found.missing(identity):
                    found = declare(store, found, missing)
            else:
                found = replace(identity, added=())
                store.create(METADATA, group_metadata({ATTRIBUTE: found.to_json()}))
            yield cls(store, found)

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
            stream: `encoder`, `hidden`, or `decoder-<tree>`; of added taps `hidden.<n>`, ....
            ids: example ids in the data's order, one per row of `layout.index`.
            layout: where every example lies.
            notes: JSON kept in the manifest; part of what must agree on resume.

        Raises:
            StaleCacheError: the stream was begun with other data.
            CorruptCacheError: it is finished, and a file of it is missing or has another size; or
                a file that says how far it is was damaged.
            InputError: its folder would lie in another stream's, or hold one; or no such stream.
            UnsafeError: an odd name.
        """
        base = f"{check_name(split)}/{check_part(stream, 'stream')}"
        _ = self.identity.spec(stream)
        check_layout(layout, base)
        return StreamWriter(self.store, self.identity, split, stream, ids, layout, notes)

    def write_labels(self, table: LabelTable) -> int:
        """Attach or replace the labels of one task and role; the number of rows that changed."""
        return label_files.write(self.store, table)
