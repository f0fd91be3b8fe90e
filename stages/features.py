"""Packed batches of cached features, with the labels of one task.

Rows stay packed and coded until the moment they are needed: a batch is gathered from the coded
rows, decoded on the training device, and padded only at the door of the late route. The order of
batches depends on (seed, epoch), the cache and the order of the labels, never on where features
reside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from sherl_pipe.cache import FeatureCache, InputError, LabelTable, Stream
from sherl_pipe.cache.codecs import Codec
from sherl_pipe.stages import quantize
from torch import Tensor

Ints = npt.NDArray[np.int64]

# Shards that are mixed with one another. A constant: if it followed the memory budget, the order
# of batches would depend on the machine.
WINDOW = 8


@dataclass(frozen=True)
class Packed:
    """Rows of one stream for the examples of a batch, without padding.

    Attributes:
        states: `[K, n, d]` float32, n the sum of `lengths`.
        lengths: `[B]` rows per example.
    """

    states: Tensor
    lengths: Tensor

    @property
    def longest(self) -> int:
        """Rows of the longest example."""
        return int(self.lengths.max())

    def mask(self, size: int | None = None) -> Tensor:
        """`[B, S]`, True where a batch padded to `size` rows (by default the longest) has one."""
        places = torch.arange(size or self.longest, device=self.lengths.device)
        return places < self.lengths[:, None]

    def pad(self, rows: Tensor, size: int | None = None) -> Tensor:
        """`[n, d] -> [B, S, d]`, zeros behind the end of each example."""
        mask = self.mask(size)
        out = rows.new_zeros(mask.numel(), rows.shape[-1])
        places = mask.view(-1).nonzero().squeeze(-1)
        return out.index_copy(0, places, rows).view(*mask.shape, rows.shape[-1])


@dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        rows: positions in the label table.
        streams: by role (`hidden`, or `encoder` and `decoder`).
    """

    rows: Ints
    streams: Mapping[str, Packed]


@dataclass(frozen=True)
class Reading:
    """Which rows of which stream a role reads."""

    stream: str
    taps: tuple[int, ...]
    # Rows of an example to take, by its label; all of them where None.
    paths: Sequence[Sequence[int]] | None = None


@dataclass(frozen=True)
class _Block:
    """The coded rows of some shards, one behind another."""

    codes: Tensor
    scales: Tensor | None
    base: Mapping[int, int]


class FeatureSource:
    """Features of the rows of a label table.

    Args:
        cache: an open cache.
        table: which examples, with their labels; rows are joined to features by id.
        readings: what each role reads.
        budget: bytes of host memory that features may take; beyond it they are streamed.
        device: where batches are decoded.
        choices: per row, the index into `paths` (the class of a text-to-text label).

    Raises InputError naming the first id that the cache does not hold.
    """

    def __init__(
        self,
        cache: FeatureCache,
        table: LabelTable,
        readings: Mapping[str, Reading],
        *,
        budget: int,
        device: torch.device,
        choices: Ints | None = None,
    ) -> None:
        self.readings, self.device = dict(readings), device
        self._codec: Codec = cache.identity.codec
        self._choices = choices
        self._locate(cache, table)
        self.coded_bytes = sum(self._unit_bytes(unit) for unit in range(len(self._units)))
        self.resident = self.coded_bytes <= budget
        self._blocks: dict[str, _Block] | None = None

    @property
    def residency(self) -> str:
        """For people: where the features are and how big they are."""
        size = f"{self.coded_bytes / 2**20:.0f} MiB of coded features"
        if self.resident:
            return f"{size} in host memory"
        return f"{size} streamed, {WINDOW} shards at a time"

    def preload(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Bring resident features into memory now; `progress(done, all)` counts shards."""
        if self.resident and self._blocks is None:
            self._blocks = self._load(range(len(self._units)), progress)

    def epoch(self, seed: int, epoch: int, batch_size: int) -> list[Ints]:
        """The batches of an epoch: shards are dealt to windows, rows mixed inside a window.

        Inside a window neighbours in length share a batch, which halves the padding of the late
        route; the batches of a window then come in random order.
        """
        rng = np.random.Generator(np.random.PCG64([seed, epoch]))
        units = rng.permutation(len(self._units))
        main = next(iter(self.readings))
        batches: list[Ints] = []
        for start in range(0, len(units), WINDOW):
            rows = np.flatnonzero(np.isin(self._unit, units[start : start + WINDOW]))
            rows = rng.permutation(rows)
            # Noise keeps the same neighbours from meeting in every epoch.
            length = self._length[main][rows] * rng.uniform(0.8, 1.25, len(rows))
            rows = rows[np.argsort(length, kind="stable")]
            cut = [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
            batches += [cut[number] for number in rng.permutation(len(cut))]
        return batches

    def in_order(self, batch_size: int) -> list[Ints]:
        """All rows once, shard after shard: for evaluation."""
        main = next(iter(self.readings))
        order = np.lexsort((self._length[main], self._unit))
        return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]

    def read(self, batches: Sequence[Ints]) -> Iterator[Batch]:
        """Batches with their features, the next shards being read while the caller works."""
        self.preload()
        if self._blocks is None:
            yield from self._stream(batches)
            return
        for rows in batches:
            yield self._gather(rows, self._blocks)

    def _stream(self, batches: Sequence[Ints]) -> Iterator[Batch]:
        windows = [np.unique(self._unit[rows]).tolist() for rows in batches]
        groups: list[tuple[set[int], list[int]]] = []  # shards, and the batches they serve
        for number, units in enumerate(windows):
            if groups and len(groups[-1][0] | set(units)) <= WINDOW:
                groups[-1][0].update(units)
                groups[-1][1].append(number)
            else:
                groups.append((set(units), [number]))
        with ThreadPoolExecutor(1, thread_name_prefix="features") as pool:
            ahead: Future[dict[str, _Block]] | None = None
            for place, (units_of, numbers) in enumerate(groups):
                blocks = ahead.result() if ahead is not None else self._load(sorted(units_of), None)
                ahead = (
                    pool.submit(self._load, sorted(groups[place + 1][0]), None)
                    if place + 1 < len(groups)
                    else None
                )
                for number in numbers:
                    yield self._gather(batches[number], blocks)

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

    def _unit_bytes(self, unit: int) -> int:
        split, shard = self._units[unit]
        total = 0
        for role, reading in self.readings.items():
            stream = self._streams[role][split]
            width = stream.spec.width
            places, _ = stream.places(reading.taps)
            total += len(places) * stream.layout.used_rows(shard) * self._codec.row_bytes(width)
        return total

    def _load(
        self, units: Sequence[int], progress: Callable[[int, int], None] | None
    ) -> dict[str, _Block]:
        blocks = {role: self._room(role, units) for role in self.readings}
        for done, unit in enumerate(units):
            split, shard = self._units[unit]
            for role, reading in self.readings.items():
                data = self._streams[role][split].read_shard(shard, reading.taps)
                block = blocks[role]
                rows = slice(block.base[unit], block.base[unit] + data.codes.shape[1])
                block.codes[:, rows] = torch.from_numpy(data.codes)
                if block.scales is not None and data.scales is not None:
                    block.scales[:, rows] = torch.from_numpy(data.scales)
            if progress is not None:
                progress(done + 1, len(units))
        return blocks

    def _room(self, role: str, units: Sequence[int]) -> _Block:
        """Memory for the coded rows of some shards, and where each begins in it."""
        base: dict[int, int] = {}
        rows = 0
        for unit in units:
            split, shard = self._units[unit]
            base[unit] = rows
            rows += self._streams[role][split].layout.used_rows(shard)
        stream = self._streams[role][self._units[units[0]][0]]
        count, width = len(stream.places(self.readings[role].taps)[0]), stream.spec.width
        sizes = self._codec.code_bytes(width), self._codec.scale_bytes(width)
        codes, scales = (torch.empty(count, rows, size, dtype=torch.uint8) for size in sizes)
        return _Block(codes, scales if sizes[1] else None, base)

    def _gather(self, rows: Ints, blocks: Mapping[str, _Block]) -> Batch:
        streams = {}
        for role, reading in self.readings.items():
            block = blocks[role]
            base = np.array([block.base[unit] for unit in self._unit[rows].tolist()], np.int64)
            start = base + self._first[role][rows]
            if reading.paths is None or self._choices is None:
                length = self._length[role][rows]
                offset = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
            else:
                chosen = [reading.paths[choice] for choice in self._choices[rows]]
                length = np.array([len(path) for path in chosen], np.int64)
                offset = np.concatenate([np.asarray(path, np.int64) for path in chosen])
            where = torch.from_numpy(np.repeat(start, length) + offset)
            codes = block.codes.index_select(1, where).to(self.device)
            scales = block.scales
            if scales is not None:
                scales = scales.index_select(1, where).to(self.device)
            stream = next(iter(self._streams[role].values()))
            _, picks = stream.places(reading.taps)
            states = quantize.decode(self._codec, codes, scales, stream.spec.width, picks)
            streams[role] = Packed(states, torch.from_numpy(length).to(self.device))
        return Batch(rows, streams)
