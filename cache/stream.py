"""One committed stream of one split, and what is read of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
from sherl_pipe.cache.arrays import decode_table
from sherl_pipe.cache.codecs import Codec, Codes, Floats, Scales
from sherl_pipe.cache.committed import Committed
from sherl_pipe.cache.errors import (
    CorruptCacheError,
    InputError,
    StaleCacheError,
    explain,
    hint,
    shown,
)
from sherl_pipe.cache.layout import Layout, check_layout, summary
from sherl_pipe.cache.manifest import (
    MANIFEST,
    METADATA,
    FileRecord,
    StreamFiles,
    read_manifest,
    restore,
)
from sherl_pipe.cache.names import declaration, stream_kind, stream_number
from sherl_pipe.cache.schema import Identity, StreamSpec
from sherl_pipe.cache.stores import Store


@dataclass(frozen=True)
class ShardData:
    """The decoded-from-file, still coded rows of one shard.

    Attributes:
        codes: `uint8 [taps, rows, code bytes]`.
        scales: `uint8 [taps, rows, scale bytes]` or None.
        picks: places of the wanted taps among these; a chained codec needs others before them.

    Taps that were added stand behind those before them. The first of an addition is coded as it is,
    so all of them decode as one chain.
    """

    codes: Codes
    scales: Scales | None
    picks: list[int]


class Stream:
    """One committed stream of one split.

    Attributes:
        spec: the taps that can be read; those of added streams too, once `join` has put them in.
    """

    def __init__(
        self, store: Store, identity: Identity, root: FileRecord, split: str, name: str
    ) -> None:
        """Of a cache whose root metadata is `root` and says `identity`.

        Raises CorruptCacheError, UnsafeError, StaleCacheError, FileNotFoundError.
        """
        self._store = store
        self.split, self.name = split, name
        self.base = f"{split}/{name}"
        path = store.path(f"{self.base}/{MANIFEST}")
        self.plan, self.files = read_manifest(store, self.base)
        self._committed = Committed(store, self.base, self.files)
        # First of all: where the root's metadata is damaged, what differs below only follows.
        if self.files.get(METADATA, root) != root:
            raise self._committed.other(METADATA, "metadata", root)
        with hint(restore(store, self.base)):
            if stream_kind(name) not in identity.streams:
                raise CorruptCacheError(
                    explain(
                        f"{path} is of a stream that this cache does not have",
                        expected=f"one of {sorted(identity.streams)}",
                        found=name,
                    )
                )
            found = f"{self.plan['split']}/{self.plan['stream']}"
            if found != self.base:
                raise CorruptCacheError(
                    explain(f"{path} belongs elsewhere", expected=self.base, found=shown(found))
                )
            try:
                own = identity.spec(name)
            except InputError as error:
                number = stream_number(name)[1]
                raise CorruptCacheError(
                    explain(
                        f"{path} is of added taps",
                        expected=f"{store.path(declaration(number))}, which says which",
                        found="none, or not of this stream",
                    )
                ) from error
            if self.plan["identity"] != identity.fingerprint_of(name):
                raise StaleCacheError(
                    f"{path.parent} was made for a cache with other settings. "
                    "Delete that folder and extract again."
                )
            self.spec: StreamSpec = own
            self.codec: Codec = identity.codec
            counts = self.plan["layout"]
            self._keys = StreamFiles.of(self.base, self.spec, self.codec, counts)
            self._keys.check(self.files, str(path))
        self.examples, self.rows = int(counts["examples"]), int(counts["rows"])
        # What is stored where, in the order in which it is decoded.
        self._parts: list[tuple[Stream, tuple[int, ...]]] = [(self, own.taps)]

    def join(self, added: Stream) -> None:
        """Read the taps of `added`, a stream of the same examples, as if they were in this one.

        Raises CorruptCacheError for one of other examples.
        """
        for field in ("data", "layout"):
            if added.plan[field] != self.plan[field]:
                raise self._not_beside(added, field)
        self._parts.append((added, added.spec.taps))
        self.spec = replace(self.spec, taps=tuple(sorted((*self.spec.taps, *added.spec.taps))))

    @property
    def parts(self) -> list[tuple[int, ...]]:
        """The taps of the first extraction, then those of every addition."""
        return [taps for _, taps in self._parts]

    @property
    def notes(self) -> Mapping[str, Any]:
        """What the extraction wrote down: template, truncations, the prefix tree."""
        notes: Mapping[str, Any] = self.plan["notes"]
        return notes

    @cached_property
    def ids(self) -> npt.NDArray[np.uint8]:
        """Example ids, `uint8 [examples, 16]`, in the data's order."""
        return self._table("ids")

    @cached_property
    def layout(self) -> Layout:
        """Shard, first row and length of every example."""
        counts = self.plan["layout"]
        layout = Layout(counts["capacity"], counts["shards"], self._table("index"))
        for added, _ in self._parts[1:]:
            if not np.array_equal(added.layout.index, layout.index):
                raise self._not_beside(added, "index")
        with hint(restore(self._store, self.base)):
            check_layout(layout, str(self._store.path(f"{self.base}/index")))
            for name, expected in summary(layout).items():
                if counts[name] != expected:
                    path = self._store.path(f"{self.base}/{MANIFEST}")
                    raise CorruptCacheError(
                        explain(f"{path}: layout: {name}", expected=expected, found=counts[name])
                    )
        return layout

    @property
    def stored_bytes(self) -> int:
        """Bytes of this stream's own files, and of those of added taps."""
        return sum(
            record.size
            for part, _ in self._parts
            for key, record in part.files.items()
            if key.startswith(f"{part.base}/")
        )

    def places(self, taps: Sequence[int] | None = None) -> tuple[list[tuple[int, int]], list[int]]:
        """Stored taps to read in order to decode `taps`, and where these are among them.

        A stored tap is the number of its part (see `parts`), and its place in that.

        Raises InputError for a tap that the cache does not hold.
        """
        wanted = [self._place(tap) for tap in (self.spec.taps if taps is None else taps)]
        if not self.codec.chained:
            return wanted, list(range(len(wanted)))
        ends = dict.fromkeys(sorted(part for part, _ in wanted), 0)
        for part, place in wanted:
            ends[part] = max(ends[part], place + 1)
        stored = [(part, place) for part, end in ends.items() for place in range(end)]
        return stored, [stored.index(each) for each in wanted]

    def read_shard(
        self,
        shard: int,
        taps: Sequence[int] | None = None,
        out: tuple[Codes, Scales | None] | None = None,
        *,
        keep: bool = False,
    ) -> ShardData:
        """The rows of one shard that hold data, still coded.

        Args:
            shard: its number.
            taps: tap numbers to read, in the wanted order; all of them by default.
            out: memory for codes and scales, of their shapes; fresh memory by default.
            keep: whether the shard will be read again, so that of one in an object store a copy
                nearby may be kept.

        Raises:
            CorruptCacheError: a file is missing, or is not the file that was committed.
            UnsafeError: a file would take far more memory than it should.
            InputError: a tap that the cache does not hold.
        """
        stored, picks = self.places(taps)
        rows = self.layout.used_rows(shard)
        found = dict(zip(("values", "scales"), out or (None, None), strict=True))
        for number, (part, _) in enumerate(self._parts):
            slots = [slot for slot, (each, _) in enumerate(stored) if each == number]
            if not slots and stored:
                continue
            places = [stored[slot][1] for slot in slots]
            for name, key in part._keys.shard(shard).items():
                decode = partial(
                    part._keys.arrays[name].decode,
                    shard,
                    taps=places,
                    rows=rows,
                    out=found[name],
                    slots=slots,
                    room=len(stored),
                )
                found[name] = part._committed.decoded(key, f"shard {shard}", decode, keep=keep)
        codes = found["values"]
        if codes is None:
            raise RuntimeError(f"{self.base}: shard {shard} has no values")
        return ShardData(codes, found["scales"], picks)

    def read_example(self, example: int, taps: Sequence[int] | None = None) -> Floats:
        """float32 `[taps, rows, width]` of one example; reads its whole shard."""
        shard, row, length = (int(value) for value in self.layout.index[example])
        data = self.read_shard(shard, taps)
        rows = slice(row, row + length)
        scales = None if data.scales is None else data.scales[:, rows]
        return self.codec.decode(data.codes[:, rows], scales, self.spec.width)[data.picks]

    def problems(self) -> list[str]:
        """Every file of this stream that is not the one that was committed."""
        return self._committed.problems()

    def check_metadata(self) -> None:
        """Raise CorruptCacheError unless every `zarr.json` is the one that was committed.

        The root's is not read again: it was compared when the stream was opened.
        """
        keys = [key for key in self._keys.metadata() if key != METADATA]
        self._store.each(partial(self._committed.checked, what="metadata"), keys)

    def _table(self, name: str) -> npt.NDArray[Any]:
        spec, key = self._keys.tables[name], self._keys.table(name)
        if key is None:
            return decode_table(spec, None)
        return self._committed.decoded(key, name, partial(decode_table, spec))

    def _place(self, tap: int) -> tuple[int, int]:
        for number, (_, taps) in enumerate(self._parts):
            if tap in taps:
                return number, taps.index(tap)
        raise InputError(
            explain(
                f"tap {tap} of {self.base}",
                expected=f"one of {list(self.spec.taps)}",
                found="none such in this cache",
                todo=f"`sherl-pipe extract --taps {tap}` on this cache adds it.",
            )
        )

    def _not_beside(self, added: Stream, field: str) -> CorruptCacheError:
        return CorruptCacheError(
            explain(
                f"{self._store.path(added.base)} is of other examples ({field})",
                expected=f"those of {self._store.path(self.base)}",
                todo=restore(self._store, added.base),
            )
        )
