"""Packed batches of cached features, with the labels of one task.

Rows stay packed and coded until the moment they are needed: a batch is gathered from the coded
rows, decoded on the training device, and padded only at the door of the late route. The order of
batches depends on (seed, epoch), the cache and the order of the labels, never on where features
reside.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing

import numpy as np
import numpy.typing as npt
import torch
from sherl_pipe.cache import FeatureCache, InputError, LabelTable, Stream
from sherl_pipe.cache.codecs import Codec
from sherl_pipe.cache.fingerprint import hash_json
from sherl_pipe.stages import quantize
from sherl_pipe.stages.commons import Commons
from sherl_pipe.stages.reading import Batch as Batch
from sherl_pipe.stages.reading import Packed as Packed
from sherl_pipe.stages.reading import Reading as Reading
from sherl_pipe.stages.residency import Home, choose
from sherl_pipe.stages.shelf import Form, Room, Shelf, arrivals
from sherl_pipe.stages.shelf import Ints as Ints

# Shards that are mixed with one another. A constant: if it followed the memory budget, the order
# of batches would depend on the machine.
WINDOW = 8
# So many times the rows of a training batch are evaluated at once, where they are short.
MORE = 4

# Rows of a batch from which on coded groups are left turned. A constant: a batch's values must not
# depend, not even in their last bit, on what is trained from them.
MANY_ROWS = 256


def blurred(count: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Factors of lengths by which rows are put in order to be cut into batches: this noise keeps
    the same neighbours from meeting in every epoch."""
    return rng.uniform(0.8, 1.25, count)


class FeatureSource:
    """Features of the rows of a label table.

    Args:
        cache: an open cache.
        table: which examples, with their labels; rows are joined to features by id.
        readings: what each role reads.
        budget: bytes of host memory that features may take.
        device: where batches are decoded.
        residency: where coded rows live; batches are the same wherever that is. `device`: in the
            training device's memory, where batches are gathered and decoded (on the CPU the same
            as `host`). `host`: in host memory. `stream`: shards come and go, and two windows of
            WINDOW shards at most are in host memory, whatever the budget. `auto`: the first of
            device, host and stream that has room; a CUDA device has room in half of what is free.
        readers: threads that read shards; one for two processors, at most 4, by default.
        beside: other sources that take of the same room; where one of them keeps all the shards
            that are read here, they are not kept twice.
        shared: of features in host memory, have one copy for all processes of this host.

    Attributes:
        home: where coded rows live.

    Raises InputError naming the first id that the cache does not hold, and where there is no room
    in the residency that is asked for.
    """

    def __init__(
        self,
        cache: FeatureCache,
        table: LabelTable,
        readings: Mapping[str, Reading],
        *,
        budget: int,
        device: torch.device,
        residency: str = "auto",
        readers: int | None = None,
        beside: Sequence[FeatureSource] = (),
        shared: bool = False,
    ) -> None:
        self.readings, self.device = dict(readings), device
        self._codec: Codec = cache.identity.codec
        self._choices = {role: np.array(each.choices, int) for role, each in readings.items()}
        self._locate(cache, table)
        self._cache = cache
        self.home: Home
        self._keeper = next((each for each in beside if each._keeps(self)), None)
        if self._keeper is None:
            size = sum(form.size for form in self._forms.values())
            self.home = choose(residency, size, budget, device, [each.home for each in beside])
        else:
            self.home = self._keeper.home
            kept = {key: number for number, key in enumerate(self._keeper._units)}
            self._kept_as = np.array([kept[key] for key in self._units], np.int64)
        self._readers = readers or min(4, max(1, (os.cpu_count() or 1) // 2))
        self._kept: Shelf | None = None
        self._shared = shared

    @property
    def sources(self) -> list[FeatureSource]:
        """All that it is made of: this one."""
        return [self]

    @property
    def summary(self) -> str:
        """For people: how big the features are, where they live, and who reads them."""
        by = f"by {self._readers} reader{'s' if self._readers > 1 else ''}"
        shared = ", shared" if self._shared and self.home.kind == "host" else ""
        streamed = f"{WINDOW} shards at a time, " if self.home.kind == "stream" else "read "
        return f"{self.home}{shared}, {streamed}{by}"

    def claim(self) -> None:
        """Have memory for features that stay now, instead of when the first batch needs it."""
        if self.home.kind != "stream":
            self._shelf([])

    def preload(self) -> None:
        """Bring features that stay into memory now, instead of when batches need them."""
        if self.home.kind != "stream":
            needs = [[unit] for unit in self._kept_as.tolist()]
            for _ in arrivals(self._shelf(needs), needs, self._fill, self._readers):
                pass

    def epoch(self, seed: int, epoch: int, batch_size: int) -> list[Ints]:
        """The batches of an epoch: shards are dealt to windows, rows mixed inside a window.

        Inside a window neighbours in length share a batch, which halves the padding of the late
        route; the batches of a window then come in random order. Which rows share a batch is the
        seed's; the order of shards and of short and long batches is that of the epoch alone, so
        that tunings with different seeds read the same shards, and batches of about the same
        length, at the same time.
        """
        shared = np.random.Generator(np.random.PCG64([0, epoch, 2]))
        own = np.random.Generator(np.random.PCG64([seed, epoch, 1]))
        units = shared.permutation(len(self._units))
        main = next(iter(self.readings))
        batches: list[Ints] = []
        for start in range(0, len(units), WINDOW):
            rows = np.flatnonzero(np.isin(self._unit, units[start : start + WINDOW]))
            rows = own.permutation(rows)
            length = self._length[main][rows] * blurred(len(rows), own)
            rows = rows[np.argsort(length, kind="stable")]
            cut = [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
            batches += [cut[number] for number in shared.permutation(len(cut))]
        return batches

    def part(self, rows: Ints, rank: int, size: int) -> Ints:
        """A team member's part of a batch's rows: as many as any other's, or one more or less.

        Rows are dealt by shard, so that each member reads few of a window's shards.
        """
        ordered = rows[np.argsort(self._unit[rows], kind="stable")]
        return np.array_split(ordered, size)[rank]

    def in_order(self, batch_size: int) -> list[Ints]:
        """All rows once, shard after shard: for evaluation.

        Short ones are more to a batch than in training, so that none takes more memory than
        `batch_size` of the longest.
        """
        length = self._length[next(iter(self.readings))]
        order = np.lexsort((length, self._unit))
        most, room = batch_size * MORE, batch_size * int(length.max(initial=0))
        batches, start = [], 0
        while start < len(order):
            ends = start + np.searchsorted(
                np.cumsum(length[order[start : start + most]]), room, "right"
            )
            batches.append(order[start:ends])
            start = int(ends)
        return batches

    def read(
        self, batches: Sequence[Ints], progress: Callable[[int, int], None] | None = None
    ) -> Generator[Batch, None, None]:
        """Batches with their features; threads read the next shards while the caller works.

        Features that stay need not be there at the start: a batch comes as soon as its own shards
        have. Close the iterator to stop the threads, or let go of it.

        Args:
            batches: rows of the table, in any order; of several tunings, mixed, too.
            progress: called with (shards there, shards that the next batch waits for) while that
                takes long.

        Raises what `Stream.read_shard` raises.
        """
        needs = [self._kept_as[np.unique(self._unit[rows])].tolist() for rows in batches]
        shelf = self._shelf(needs)
        with closing(arrivals(shelf, needs, self._fill, self._readers, progress)) as arrived:
            for number in arrived:
                yield self._gather(batches[number], shelf)

    def _shelf(self, needs: Sequence[Sequence[int]]) -> Shelf:
        """What stays is kept from reading to reading; each stream has memory of its own."""
        if self.home.kind == "stream":
            # In evaluation a batch of many rows may come from more shards than a window has.
            window = max(WINDOW, *map(len, needs), 0)
            return Shelf(self._forms, torch.device("cpu"), window)
        if self._keeper is not None:
            return self._keeper._shelf(needs)
        if self._kept is None:
            if self.home.kind == "device":
                self._kept = Shelf(self._forms, self.device)
            else:
                commons = self._commons() if self._shared else None
                self._kept = Shelf(self._forms, torch.device("cpu"), commons=commons)
        return self._kept

    def _keeps(self, other: FeatureSource) -> bool:
        """Whether all the shards that `other` reads stay in memory here."""
        taps, others = (
            {role: (each.stream, each.taps) for role, each in source.readings.items()}
            for source in (self, other)
        )
        held = self._cache is other._cache and set(other._units) <= set(self._units)
        return held and taps == others and self.home.kind != "stream"

    def _commons(self) -> Commons:
        """The rows of these very files, in this order."""
        files = {
            key: record.sha256
            for streams in self._streams.values()
            for stream in streams.values()
            for key, record in stream.files.items()
        }
        taps = {role: [each.stream, each.taps] for role, each in self.readings.items()}
        return Commons(hash_json([files, taps, self._units])[:32], self._forms)

    def _fill(self, unit: int, room: Room) -> None:
        """Read a shard, by its number where it is kept."""
        if self._keeper is not None:
            self._keeper._fill(unit, room)
            return
        split, shard = self._units[unit]
        for role, reading in self.readings.items():
            self._streams[role][split].read_shard(
                shard, reading.taps, room[role], keep=self.home.kind == "stream"
            )

    def _locate(self, cache: FeatureCache, table: LabelTable) -> None:
        """Shard, first row and length of every row of the table."""
        places = cache.places
        missing = next((identity for identity in table.ids if identity not in places), None)
        if missing is not None:
            raise InputError(
                f"task {table.task}, {table.role}: example {missing.hex()} is labelled but not in "
                f"the cache {cache.path}. Extract its text, or correct the label file."
            )
        found = [places[identity] for identity in table.ids]
        splits = sorted({split for split, _ in found})
        self._streams: dict[str, dict[str, Stream]] = {
            role: {split: cache.stream(split, reading.stream) for split in splits}
            for role, reading in self.readings.items()
        }
        keys: dict[tuple[str, int], int] = {}
        self._unit = np.empty(len(found), np.int64)
        self._first = {role: np.empty(len(found), np.int64) for role in self.readings}
        self._length = {role: np.empty(len(found), np.int64) for role in self.readings}
        for role, streams in self._streams.items():
            index = {split: stream.layout.index for split, stream in streams.items()}
            for row, (split, position) in enumerate(found):
                shard, first, length = index[split][position]
                self._unit[row] = keys.setdefault((split, int(shard)), len(keys))
                self._first[role][row], self._length[role][row] = first, length
        # Units are numbered by split and shard, not by who asked first.
        order = {key: number for number, key in enumerate(sorted(keys))}
        renumber = np.array([order[key] for key in keys], np.int64)
        self._unit = renumber[self._unit]
        self._units = sorted(keys)
        self._kept_as = np.arange(len(keys))
        self._forms: dict[str, Form] = {role: self._form(role) for role in self.readings}

    def _form(self, role: str) -> Form:
        """What the coded rows of a role are made of."""
        streams, rows = self._streams[role], {}
        for split, stream in streams.items():
            shard, _, count = stream.layout.index.T
            rows[split] = np.bincount(shard, count, stream.layout.shards).astype(np.int64)
        stream = next(iter(streams.values()))
        places, _ = stream.places(self.readings[role].taps)
        return Form(
            len(places),
            self._codec.code_bytes(stream.spec.width),
            self._codec.scale_bytes(stream.spec.width),
            np.array([rows[split][shard] for split, shard in self._units], np.int64),
        )

    def _gather(self, rows: Ints, shelf: Shelf) -> Batch:
        streams = {}
        for role, reading in self.readings.items():
            start = shelf.starts(role, self._kept_as[self._unit[rows]]) + self._first[role][rows]
            if reading.paths is None:
                length = self._length[role][rows]
                offset = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
            else:
                chosen = [reading.paths[choice] for choice in self._choices[role][rows]]
                length = np.array([len(path) for path in chosen], np.int64)
                offset = np.concatenate([np.asarray(path, np.int64) for path in chosen])
            where = np.repeat(start, length) + offset
            codes, scales, places = shelf.rows(role, where, self.device)
            stream = next(iter(self._streams[role].values()))
            _, picks = stream.places(reading.taps)
            # A method that begins with a linear layer can turn its weights instead, forward and
            # back, which pays where they are fewer.
            turned = len(where) >= MANY_ROWS
            width = stream.spec.width
            states = quantize.decode(
                self._codec, codes, scales, width, picks, rows=places, turned=turned
            )
            lengths = torch.from_numpy(length).to(self.device)
            streams[role] = Packed(states, lengths, self._codec.group if turned else 0)
        return Batch(rows, streams)
