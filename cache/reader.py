"""Reading a cache: from its manifests, never from what else is on disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

from sherl_pipe.cache import catalogue
from sherl_pipe.cache import labels as label_files
from sherl_pipe.cache.added import read_added
from sherl_pipe.cache.copies import Copies
from sherl_pipe.cache.errors import (
    CorruptCacheError,
    IncompleteSplitError,
    InputError,
    StaleCacheError,
    explain,
)
from sherl_pipe.cache.labels import LabelTable
from sherl_pipe.cache.manifest import (
    MANIFEST,
    PLAN,
    RECEIPTS,
    STREAM_DATA,
    FileRecord,
    read_plan,
    read_root,
    restore,
)
from sherl_pipe.cache.names import stream_kind, stream_number
from sherl_pipe.cache.place import Place
from sherl_pipe.cache.schema import Identity, StreamSpec
from sherl_pipe.cache.store import is_partial
from sherl_pipe.cache.stores import Store, open_store
from sherl_pipe.cache.stream import Stream


class FeatureCache:
    """A cache opened for reading. `FeatureCache.open(path)` makes one.

    Attributes:
        path: its folder or URL.
        identity: what made it, and what was added to it.
        incomplete: streams that were begun and not finished, or that an addition of taps still
            wants: name -> (committed shards, shards).
    """

    def __init__(self, store: Store, identity: Identity, root: FileRecord) -> None:
        self._store, self._root = store, root
        self.path = store.root
        self.identity = identity
        self.incomplete: dict[str, tuple[int, int]] = {}
        self._streams: dict[str, dict[str, Stream]] = {}
        self._stored: dict[str, Stream] = {}  # by folder, those of added taps too
        self._scan()
        self._join()

    @classmethod
    def open(
        cls, path: str | Place, expect: Identity | None = None, copies: Copies | None = None
    ) -> FeatureCache:
        """Open the cache at `path`.

        Args:
            path: its folder, or its URL in an object store, such as `s3://bucket/prefix`.
            expect: the identity that the caller needs; any other is refused, and one that lacks
                some of its taps.
            copies: where shards of an object store that are streamed again and again are kept.

        Raises:
            InputError: no cache there, or one of another format version.
            IncompleteSplitError: nothing in it is finished; the message says how far it got.
            CorruptCacheError: metadata that is not what was committed, or is gone.
            UnsafeError: metadata that would lead outside the cache or take all memory.
            StaleCacheError: it differs from `expect`; the message names the first field.
        """
        store = open_store(path, copies)
        identity, root = read_root(store)
        if expect is not None:
            identity.require(expect, str(store.root))
        cache = cls(store, identity, root)
        if not cache._streams and cache.incomplete:
            raise IncompleteSplitError(cache._progress(next(iter(cache.incomplete))))
        for stream in cache._stored.values():
            stream.check_metadata()
        if expect is not None:
            cache._require_taps(expect)
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

    def specs(self, splits: Iterable[str] | None = None) -> dict[str, StreamSpec]:
        """By stream, the taps that all of `splits` (by default all there are) hold.

        An addition counts where it is finished; where there is no stream yet, as declared.
        """
        chosen = self._streams if splits is None else {*splits} & self._streams.keys()
        found = {}
        for kind in self.identity.streams:
            spec = self.identity.held(kind)
            taps = {*spec.taps}.intersection(
                *(
                    stream.spec.taps
                    for split in chosen
                    for name, stream in self._streams[split].items()
                    if stream_kind(name) == kind
                )
            )
            found[kind] = replace(spec, taps=tuple(sorted(taps)))
        return found

    @cached_property
    def tasks(self) -> dict[str, dict[str, LabelTable]]:
        """Labels by task and role. Raises CorruptCacheError."""
        return label_files.read_all(self._store)

    @cached_property
    def places(self) -> dict[bytes, tuple[str, int]]:
        """Split of every example, and its position in the split's stream of such inputs, by id."""
        found: dict[bytes, tuple[str, int]] = {}
        for split in self.splits:
            for stream in self.input_streams(split):
                for position, row in enumerate(stream.ids):
                    found.setdefault(row.tobytes(), (split, position))
        return found

    def input_streams(self, split: str) -> list[Stream]:
        """The streams that hold a split's inputs, and not what was made for label words: one, or
        of a dual encoder those of its texts and images. Raises InputError, IncompleteSplitError."""
        streams = [stream for _, stream in sorted(self.streams(split).items(), key=_main_first)]
        own = [stream for stream in streams if not _main_first((stream.name, stream))]
        return own or streams[:1]

    def verify(self) -> list[str]:
        """Hash every committed file; one message per problem, none where all is well."""
        found = []
        for _, stream in sorted(self._stored.items()):
            found += stream.problems()
        for key in catalogue.label_keys(self._store):
            try:
                label_files.read(self._store, key)
            except CorruptCacheError as error:
                found.append(str(error))
        return sorted(set(found))

    def content(self) -> list[tuple[str, str]]:
        """Key and sha256 of every committed file, sorted: equal for equal caches."""
        return sorted(
            {
                (key, record.sha256)
                for stream in self._stored.values()
                for key, record in stream.files.items()
            }
        )

    def _scan(self) -> None:
        keys = catalogue.stream_keys(self._store)
        # Behind the listing: additions come before their streams.
        self.identity = read_added(self._store, self.identity)
        for key in sorted(keys):
            base, _, name = key.rpartition("/")
            if name == MANIFEST and "/" in base:
                self._add(base)
        begun = {
            base for key in keys if "/" in (base := key.removesuffix(f"/{PLAN}")) and base != key
        }
        data = {match[1] for key in keys if (match := STREAM_DATA.match(key))}
        held = {
            base for base in data if stream_kind(base.rpartition("/")[2]) in self.identity.streams
        }
        for base in sorted(begun | held):
            if f"{base}/{MANIFEST}" not in keys:
                self._unfinished(base)

    def _unfinished(self, base: str) -> None:
        """A stream that was seen without a manifest.

        Raises CorruptCacheError if it was finished, or half deleted.
        """
        try:
            plan = read_plan(self._store, base)
        except FileNotFoundError as error:
            # A plan comes before all other files of its stream, and goes when the manifest is
            # there. Looking for them in this order, one is met whatever the writer did meanwhile.
            if not self._store.exists(f"{base}/{MANIFEST}"):
                raise CorruptCacheError(
                    explain(
                        f"{self._store.path(base)} holds data of a stream",
                        expected=f"its {MANIFEST} or {PLAN}",
                        found="neither",
                        todo=f"Someone deleted them. {restore(self._store, base)}",
                    )
                ) from error
            self._add(base)
        else:
            receipts = self._store.list(f"{base}/{RECEIPTS}")
            done = sum(not is_partial(key) for key in receipts)
            self.incomplete[base] = (done, plan["layout"]["shards"])

    def _add(self, base: str) -> None:
        split, name = base.rsplit("/", 1)
        stream = Stream(self._store, self.identity, self._root, split, name)
        self._stored[base] = stream
        if not stream_number(name)[1]:
            self._streams.setdefault(split, {})[name] = stream

    def _join(self) -> None:
        """Let every stream have its added taps, and note what is still to be done of them."""
        for base in sorted({*self._stored, *self.incomplete}):
            split, name = base.rsplit("/", 1)
            whole = stream_number(name)[0]
            known = self._stored.get(base)
            shards = self.incomplete[base][1] if known is None else known.plan["layout"]["shards"]
            for part in self.identity.parts(whole):
                if f"{split}/{part}" not in self._stored:
                    self.incomplete.setdefault(f"{split}/{part}", (0, shards))
        for split, streams in self._streams.items():
            for name, stream in streams.items():
                for part in self.identity.parts(name)[1:]:
                    if added := self._stored.get(f"{split}/{part}"):
                        stream.join(added)

    def _require_taps(self, expect: Identity) -> None:
        for kind, spec in self.specs().items():
            wanted = expect.held(kind).taps
            if not {*wanted} <= {*spec.taps}:
                raise StaleCacheError(
                    explain(
                        f"{self.path} lacks {kind} taps",
                        expected=list(wanted),
                        found=list(spec.taps),
                        todo="`sherl-pipe extract` with these --taps adds those that it lacks.",
                    )
                )

    def _progress(self, base: str) -> str:
        done, total = self.incomplete[base]
        return (
            f"{self._store.path(base)} is incomplete: {done} of {total} shards are committed. "
            "Run the same `sherl-pipe extract` command again; it does only the rest."
        )


def _main_first(item: tuple[str, Stream]) -> bool:
    """The stream that holds every example of a split comes before those made for some labels."""
    return "-" in item[0]
