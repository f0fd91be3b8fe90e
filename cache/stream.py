"""One committed stream: every byte is checked before it is decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
from sherl_pipe.cache.arrays import decode_table
from sherl_pipe.cache.codecs import Codec, Codes, Floats, Scales
from sherl_pipe.cache.errors import (
    CorruptCacheError,
    InputError,
    StaleCacheError,
    UnsafeError,
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
    remedy,
    restore,
)
from sherl_pipe.cache.schema import Identity, StreamSpec, stream_kind
from sherl_pipe.cache.stores import Store


@dataclass(frozen=True)
class ShardData:
    """The decoded-from-file, still coded rows of one shard.

    Attributes:
        codes: `uint8 [taps, rows, code bytes]`.
        scales: `uint8 [taps, rows, scale bytes]` or None.
        picks: places of the wanted taps among these; a chained codec needs others before them.
    """

    codes: Codes
    scales: Scales | None
    picks: list[int]


class Stream:
    """One committed stream of one split."""

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
        # First of all: where the root's metadata is damaged, what differs below only follows.
        if self.files.get(METADATA, root) != root:
            raise self._other(METADATA, "metadata", root)
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
            if self.plan["identity"] != identity.fingerprint():
                raise StaleCacheError(
                    f"{path.parent} was made for a cache with other settings. "
                    "Delete that folder and extract again."
                )
            self.spec: StreamSpec = identity.streams[stream_kind(name)]
            self.codec: Codec = identity.codec
            counts = self.plan["layout"]
            self._keys = StreamFiles.of(self.base, self.spec, self.codec, counts)
            self._keys.check(self.files, str(path))
        self.examples, self.rows = int(counts["examples"]), int(counts["rows"])

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
        """Bytes of this stream's own files."""
        return sum(r.size for k, r in self.files.items() if k.startswith(f"{self.base}/"))

    def places(self, taps: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
        """Stored taps to read in order to decode `taps`, and where these are among them.

        Raises InputError for a tap that the cache does not hold.
        """
        stored = self.spec.taps
        wanted = [self._place(tap) for tap in (stored if taps is None else taps)]
        if not self.codec.chained:
            return wanted, list(range(len(wanted)))
        return list(range(max(wanted) + 1)), wanted

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
        places, picks = self.places(taps)
        rows = self.layout.used_rows(shard)
        memory = dict(zip(("values", "scales"), out or (None, None), strict=True))
        found = {}
        for name, key in self._keys.shard(shard).items():
            decode = partial(
                self._keys.arrays[name].decode, shard, taps=places, rows=rows, out=memory[name]
            )
            found[name] = self._decoded(key, f"shard {shard}", decode, keep=keep)
        return ShardData(found["values"], found.get("scales"), picks)

    def read_example(self, example: int, taps: Sequence[int] | None = None) -> Floats:
        """float32 `[taps, rows, width]` of one example; reads its whole shard."""
        shard, row, length = (int(value) for value in self.layout.index[example])
        data = self.read_shard(shard, taps)
        rows = slice(row, row + length)
        scales = None if data.scales is None else data.scales[:, rows]
        return self.codec.decode(data.codes[:, rows], scales, self.spec.width)[data.picks]

    def problems(self) -> list[str]:
        """Every file of this stream that is not the one that was committed."""
        return [
            problem
            for problem in self._store.each(self._problem, sorted(self.files))
            if problem is not None
        ]

    def _problem(self, key: str) -> str | None:
        record, path = self.files[key], self._store.path(key)
        try:
            now = FileRecord.of(self._store.read(key, record))
        except FileNotFoundError:
            return f"{path} is missing"
        if now.size != record.size:
            return explain(f"{path}: bytes", expected=record.size, found=now.size)
        if now.sha256 != record.sha256:
            return explain(f"{path}: sha256", expected=shown(record.sha256), found=now.sha256)
        return None

    def check_metadata(self) -> None:
        """Raise CorruptCacheError unless every `zarr.json` is the one that was committed.

        The root's is not read again: it was compared when the stream was opened.
        """
        keys = [key for key in self._keys.metadata() if key != METADATA]
        self._store.each(partial(self._checked, what="metadata"), keys)

    def _checked(self, key: str, what: str, *, keep: bool = False) -> bytes:
        record = self.files.get(key)
        try:
            data = self._store.read(key, record, keep=keep)
        except FileNotFoundError as error:
            raise CorruptCacheError(
                f"{self._store.path(key)} ({what}) is missing. "
                f"{remedy(self._store, self.base, key)}"
            ) from error
        if record is None or not record.matches(data):
            raise self._other(key, what, FileRecord.of(data))
        return data

    def _other(self, key: str, what: str, found: FileRecord) -> CorruptCacheError:
        return CorruptCacheError(
            explain(
                f"{self._store.path(key)} ({what}) is not the file that was committed",
                expected=self.files.get(key, "one that the manifest names"),
                found=found,
                todo=remedy(self._store, self.base, key),
            )
        )

    def _decoded(
        self,
        key: str,
        what: str,
        decode: Callable[[bytes], npt.NDArray[Any]],
        *,
        keep: bool = False,
    ) -> npt.NDArray[Any]:
        data, path = self._checked(key, what, keep=keep), self._store.path(key)
        with hint(remedy(self._store, self.base, key)):
            try:
                return decode(data)
            except UnsafeError as error:
                raise UnsafeError(f"{path} ({what}): {error}") from error
            except (ValueError, RuntimeError) as error:
                raise CorruptCacheError(f"{path} ({what}): {error}.") from error

    def _table(self, name: str) -> npt.NDArray[Any]:
        spec, key = self._keys.tables[name], self._keys.table(name)
        if key is None:
            return decode_table(spec, None)
        return self._decoded(key, name, partial(decode_table, spec))

    def _place(self, tap: int) -> int:
        if tap not in self.spec.taps:
            raise InputError(
                explain(
                    f"tap {tap} of {self.base}",
                    expected=f"one of {list(self.spec.taps)}",
                    found="none such in this cache",
                    todo="Extract to another --cache with --taps that includes it.",
                )
            )
        return self.spec.taps.index(tap)
