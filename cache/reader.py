"""Reading a cache: manifests first, every byte checked before it is decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sherl_pipe.cache import labels as label_files
from sherl_pipe.cache.arrays import decode_table, stream_arrays, table_array
from sherl_pipe.cache.codecs import Codec, Codes, Floats, Scales
from sherl_pipe.cache.errors import (
    CorruptCacheError,
    IncompleteSplitError,
    InputError,
    StaleCacheError,
    explain,
)
from sherl_pipe.cache.fingerprint import ID_BYTES
from sherl_pipe.cache.labels import LabelTable
from sherl_pipe.cache.layout import Layout, check_layout
from sherl_pipe.cache.schema import Identity, StreamSpec, bounded, unseal
from sherl_pipe.cache.store import LocalStore, is_partial
from sherl_pipe.cache.writer import ROOT_METADATA, file_record, matches, read_identity, stream_kind


@dataclass(frozen=True)
class ShardData:
    """The decoded-from-file, still coded rows of one shard.

    Attributes:
        codes: `uint8 [taps, rows, code bytes]`.
        scales: `float16 [taps, rows, groups]` or None.
    """

    codes: Codes
    scales: Scales | None


class Stream:
    """One committed stream of one split."""

    def __init__(self, store: LocalStore, identity: Identity, split: str, name: str) -> None:
        self._store = store
        self.split, self.name = split, name
        self.base = f"{split}/{name}"
        key = f"{self.base}/manifest.json"
        body = unseal(store.read(key), str(store.path(key)))
        try:
            self.files: Mapping[str, Mapping[str, Any]] = body["files"]
            self.plan: Mapping[str, Any] = body["plan"]
            counts = {k: int(v) for k, v in self.plan["layout"].items()}
            self.examples, self.rows = counts["examples"], counts["rows"]
            self._capacity, self._shards = counts["capacity"], counts["shards"]
            misplaced = (self.plan["split"], self.plan["stream"]) != (split, name)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CorruptCacheError(f"{store.path(key)} lacks or misstates {error}") from error
        # First of all: where the root's metadata is damaged, what differs below only follows.
        self._checked(ROOT_METADATA, "metadata")
        if stream_kind(name) not in identity.streams:
            raise CorruptCacheError(
                explain(
                    f"{store.path(key)} is of a stream that this cache does not have",
                    expected=f"one of {sorted(identity.streams)}",
                    found=name,
                )
            )
        self.spec: StreamSpec = identity.streams[stream_kind(name)]
        self.codec: Codec = identity.codec
        bounded(self.examples, 0, 1 << 36, f"{key}: examples")
        if misplaced:
            raise CorruptCacheError(
                explain(
                    f"{store.path(key)} belongs elsewhere",
                    expected=self.base,
                    found=f"{self.plan['split']}/{self.plan['stream']}",
                )
            )
        if self.plan["identity"] != identity.fingerprint():
            raise StaleCacheError(
                f"{store.path(self.base)} was made for a cache with other settings. "
                "Delete that folder and extract again."
            )

    @property
    def notes(self) -> Mapping[str, Any]:
        """What the extraction wrote down: template, truncations, the prefix tree."""
        notes: Mapping[str, Any] = self.plan["notes"]
        return notes

    @cached_property
    def ids(self) -> npt.NDArray[np.uint8]:
        """Example ids, `uint8 [examples, 16]`, in the data's order."""
        return self._table("ids", (self.examples, ID_BYTES), "uint8")

    @cached_property
    def layout(self) -> Layout:
        """Shard, first row and length of every example."""
        index = self._table("index", (self.examples, 3), "int64")
        layout = Layout(self._capacity, self._shards, index)
        check_layout(layout, str(self._store.path(self.base)))
        return layout

    @property
    def stored_bytes(self) -> int:
        """Bytes of this stream's own files."""
        return sum(int(r["bytes"]) for k, r in self.files.items() if k.startswith(self.base))

    def read_shard(self, shard: int, taps: Sequence[int] | None = None) -> ShardData:
        """The rows of one shard that hold data.

        Args:
            shard: its number.
            taps: tap numbers to read, in the wanted order; all of them by default.

        Raises:
            CorruptCacheError: a file is missing, or is not the file that was committed.
            InputError: a tap that the cache does not hold.
        """
        places = None if taps is None else [self._place(tap) for tap in taps]
        rows = self.layout.used_rows(shard)
        arrays = stream_arrays(self.spec, self.codec, self.layout)
        found = {}
        for name, spec in arrays.items():
            key = f"{self.base}/{name}/{spec.chunk_key(shard)}"
            data = self._checked(key, f"shard {shard}")
            try:
                found[name] = spec.decode(shard, data, places, rows)
            except (ValueError, RuntimeError) as error:
                raise CorruptCacheError(
                    f"{self._store.path(key)} (shard {shard}): {error}. {self._remedy}"
                ) from error
        return ShardData(found["values"], found.get("scales"))

    def read_example(self, example: int, taps: Sequence[int] | None = None) -> Floats:
        """float32 `[taps, rows, width]` of one example; reads its whole shard."""
        shard, row, length = (int(value) for value in self.layout.index[example])
        data = self.read_shard(shard, taps)
        rows = slice(row, row + length)
        scales = None if data.scales is None else data.scales[:, rows]
        return self.codec.decode(data.codes[:, rows], scales, self.spec.width)

    def problems(self) -> list[str]:
        """Every file of this stream that is not the one that was committed."""
        found = []
        for key, record in sorted(self.files.items()):
            try:
                data = self._store.read(key)
            except FileNotFoundError:
                found.append(f"{self._store.path(key)} is missing")
                continue
            now = file_record(data)
            for field in ("bytes", "sha256"):
                if now[field] != record[field]:
                    wrong = explain(
                        f"{self._store.path(key)}: {field}",
                        expected=record[field],
                        found=now[field],
                    )
                    found.append(wrong)
                    break
        return found

    def check_metadata(self) -> None:
        """Raise CorruptCacheError unless every `zarr.json` is the one that was committed."""
        for key in self.files:
            if key.endswith("zarr.json"):
                self._checked(key, "metadata")

    @property
    def _remedy(self) -> str:
        return (
            f"Run `sherl-pipe verify --cache {self._store.root}`; to restore, delete "
            f"{self._store.path(self.base)} and extract again."
        )

    def _checked(self, key: str, what: str) -> bytes:
        path = self._store.path(key)
        try:
            data = self._store.read(key)
        except FileNotFoundError as error:
            raise CorruptCacheError(f"{path} ({what}) is missing. {self._remedy}") from error
        record = self.files.get(key)
        if record is None or not matches(record, data):
            expected = (
                "in the manifest"
                if record is None
                else (f"{record['bytes']} bytes with crc32 {record['crc32']}")
            )
            now = file_record(data)
            raise CorruptCacheError(
                explain(
                    f"{path} ({what}) is not the file that was committed",
                    expected=expected,
                    found=f"{now['bytes']} bytes with crc32 {now['crc32']}",
                    todo=self._remedy,
                )
            )
        return data

    def _table(self, name: str, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
        spec = table_array(name, shape, dtype)
        if not shape[0]:
            return decode_table(spec, None)
        return decode_table(spec, self._checked(f"{self.base}/{name}/{spec.chunk_key(0)}", name))

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


class FeatureCache:
    """A cache opened for reading. `FeatureCache.open(path)` makes one.

    Attributes:
        path: its folder.
        identity: what made it.
        incomplete: streams that were begun and not finished: name -> (committed shards, shards).
    """

    def __init__(self, store: LocalStore, identity: Identity) -> None:
        self._store = store
        self.path = store.root
        self.identity = identity
        self.incomplete: dict[str, tuple[int, int]] = {}
        self._streams: dict[str, dict[str, Stream]] = {}
        self._scan()

    @classmethod
    def open(cls, path: str | Path, expect: Identity | None = None) -> FeatureCache:
        """Open the cache at `path`.

        Args:
            path: its folder.
            expect: the identity that the caller needs; any other is refused.

        Raises:
            InputError: no cache there, or one of another format version.
            IncompleteSplitError: nothing in it is finished; the message says how far it got.
            CorruptCacheError: metadata that is not what was committed.
            StaleCacheError: it differs from `expect`; the message names the first field.
        """
        store = LocalStore(Path(path))
        identity = read_identity(store)
        if expect is not None:
            identity.require(expect, str(path))
        cache = cls(store, identity)
        if not cache._streams and cache.incomplete:
            raise IncompleteSplitError(cache._progress(next(iter(cache.incomplete))))
        for split in cache._streams.values():
            for stream in split.values():
                stream.check_metadata()
        return cache

    @property
    def splits(self) -> list[str]:
        """Names of the committed splits."""
        return sorted(self._streams)

    def streams(self, split: str) -> dict[str, Stream]:
        """The committed streams of a split. Raises InputError, IncompleteSplitError."""
        if split in self._streams:
            return self._streams[split]
        for base in self.incomplete:
            if base.rsplit("/", 1)[0] == split:
                raise IncompleteSplitError(self._progress(base))
        raise InputError(
            explain(f"split of {self.path}", expected=f"one of {self.splits}", found=repr(split))
        )

    def stream(self, split: str, name: str) -> Stream:
        """One stream. Raises InputError, IncompleteSplitError."""
        streams = self.streams(split)
        base = f"{split}/{name}"
        if name not in streams and base in self.incomplete:
            raise IncompleteSplitError(self._progress(base))
        if name not in streams:
            raise InputError(
                explain(f"stream of {split}", expected=f"one of {sorted(streams)}", found=name)
            )
        return streams[name]

    @cached_property
    def tasks(self) -> dict[str, dict[str, LabelTable]]:
        """Labels by task and role. Raises CorruptCacheError."""
        return label_files.read_all(self._store)

    @cached_property
    def places(self) -> dict[bytes, tuple[str, int]]:
        """Split and position of every example, by id."""
        found: dict[bytes, tuple[str, int]] = {}
        for split in self.splits:
            main = next(iter(sorted(self._streams[split].items(), key=_main_first)))[1]
            for position, row in enumerate(main.ids):
                found.setdefault(row.tobytes(), (split, position))
        return found

    def verify(self) -> list[str]:
        """Hash every committed file; one message per problem, none where all is well."""
        found = []
        for split in self.splits:
            for _, stream in sorted(self._streams[split].items()):
                found += stream.problems()
        for key in label_files.keys(self._store):
            try:
                label_files.read(self._store, key)
            except CorruptCacheError as error:
                found.append(str(error))
        return sorted(set(found))

    def content(self) -> list[tuple[str, str]]:
        """Key and sha256 of every committed file, sorted: equal for equal caches."""
        return sorted(
            {
                (key, record["sha256"])
                for streams in self._streams.values()
                for stream in streams.values()
                for key, record in stream.files.items()
            }
        )

    def _scan(self) -> None:
        labels = f"{label_files.FOLDER}/"  # may hold a role called plan or manifest
        keys = [k for k in self._store.list() if not is_partial(k) and not k.startswith(labels)]
        for key in keys:
            parts = key.split("/")
            if parts[-1] == "manifest.json" and len(parts) > 2:
                self._add("/".join(parts[:-1]))
        for key in keys:
            parts = key.split("/")
            base = "/".join(parts[:-1])
            if parts[-1] == "plan.json" and f"{base}/manifest.json" not in keys:
                try:
                    plan = unseal(self._store.read(key), str(self._store.path(key)))
                except FileNotFoundError:
                    # A plan goes when its manifest has come: since the listing, that is.
                    if self._store.exists(f"{base}/manifest.json"):
                        self._add(base)
                    continue
                done = sum(other.startswith(f"{base}/receipts/") for other in keys)
                self.incomplete[base] = (done, int(plan["layout"]["shards"]))

    def _add(self, base: str) -> None:
        split, name = base.rsplit("/", 1)
        stream = Stream(self._store, self.identity, split, name)
        self._streams.setdefault(split, {})[name] = stream

    def _progress(self, base: str) -> str:
        done, total = self.incomplete[base]
        return (
            f"{self._store.path(base)} is incomplete: {done} of {total} shards are committed. "
            "Run the same `sherl-pipe extract` command again; it does only the rest."
        )


def _main_first(item: tuple[str, Stream]) -> bool:
    """The stream that holds every example of a split comes before those made for label words."""
    return item[0].startswith("decoder-")
