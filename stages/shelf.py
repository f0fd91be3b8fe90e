"""Memory for coded rows of shards, and the threads that fill it."""

from __future__ import annotations

import math
import mmap
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from sherl_pipe.stages.memory import keep_freed_memory, return_freed_memory
from torch import Tensor

if TYPE_CHECKING:
    from sherl_pipe.stages.commons import Commons

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Room = Mapping[str, tuple[Bytes, Bytes | None]]
Blocks = Mapping[str, tuple[Tensor, Tensor | None]]

# Seconds that a batch may wait for its shards before the caller is told of it.
PATIENCE = 2.0


@dataclass(frozen=True)
class Form:
    """What the coded rows of one role are made of.

    Attributes:
        taps: stored taps that are read.
        code_bytes, scale_bytes: of one row of one tap; no scale bytes where the codec has none.
        rows: `[shards]`, rows of every shard.
    """

    taps: int
    code_bytes: int
    scale_bytes: int
    rows: Ints

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return int(self.rows.sum()) * self.taps * (self.code_bytes + self.scale_bytes)


class Shelf:
    """Memory for the coded rows of shards; shards are known by their numbers.

    Args:
        forms: by role.
        device: where the memory is.
        window: None for a place for every shard, which then stays. Else there are places for two
            windows of so many shards: for the one in use and for the next.
        commons: memory that other processes have too, for a shelf without a window on the host.

    Attributes:
        there: shards whose rows are there.
    """

    def __init__(
        self,
        forms: Mapping[str, Form],
        device: torch.device,
        window: int | None = None,
        commons: Commons | None = None,
    ) -> None:
        self.window, self.there = window, set[int]()
        self._commons = commons if commons is not None and commons.folder else None
        shared = self._commons.blocks() if self._commons else {}
        shards = len(next(iter(forms.values())).rows)
        places = shards if window is None else min(shards, 2 * window)
        self._place = np.arange(shards) if window is None else np.full(shards, -1)
        self._free = [] if window is None else list(range(places))
        self._start: dict[str, Ints] = {}
        self._rows = {role: form.rows for role, form in forms.items()}
        self._blocks: dict[str, tuple[Tensor, Tensor | None]] = {}
        for role, form in forms.items():
            # A place that many shards use in turn is as large as the largest of them.
            rows = form.rows if window is None else np.full(places, form.rows.max())
            self._start[role] = np.cumsum(rows) - rows
            if role in shared:
                self._blocks[role] = shared[role]
                continue
            sizes = form.code_bytes, form.scale_bytes
            # Readers are outside of an evaluation's inference mode, and fill tensors made in it.
            with torch.inference_mode(False):
                codes, scales = (_room(form.taps, int(rows.sum()), size, device) for size in sizes)
            self._blocks[role] = codes, scales if form.scale_bytes else None

    def claim(self, shards: Collection[int]) -> None:
        """Have places for `shards`; where places are short, no other shard keeps its own."""
        if self.window is None:
            return
        for shard in np.flatnonzero(self._place >= 0).tolist():
            if shard not in shards:
                self._free.append(int(self._place[shard]))
                self._place[shard] = -1
                self.there.discard(shard)
        for shard in shards:
            if self._place[shard] < 0:
                self._place[shard] = self._free.pop()

    def bring(self, shard: int, fill: Callable[[int, Room], None]) -> None:
        """Have the rows of a shard in its place; threads may do so for several shards at once.

        Args:
            fill: writes them into memory that it is given by role: codes `[taps, rows, bytes]` and
                scales, None where the codec has none. What it raises is raised, and the shard is
                then not there.
        """
        if self._commons is not None:
            self._commons.bring(shard, fill)
            self.there.add(shard)
            return
        places: dict[str, tuple[Tensor, Tensor | None]] = {}
        room: dict[str, tuple[Bytes, Bytes | None]] = {}
        for role, (codes, scales) in self._blocks.items():
            start = int(self._start[role][self._place[shard]])
            rows = slice(start, start + int(self._rows[role][shard]))
            places[role] = codes[:, rows], None if scales is None else scales[:, rows]
            room[role] = (
                _writable(places[role][0]),
                (None if scales is None else _writable(scales[:, rows])),
            )
        fill(shard, room)
        for role, (codes, scales) in places.items():
            _settle(room[role][0], codes)
            if scales is not None:
                _settle(room[role][1], scales)
        self.there.add(shard)

    def starts(self, role: str, shards: Ints) -> Ints:
        """`[n]`: where the rows of `shards` `[n]` begin."""
        found: Ints = self._start[role][self._place[shards]]
        return found

    def rows(
        self, role: str, where: Ints, device: torch.device
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Codes `[K, m, bytes]` and scales on `device`, and which of their rows are the rows
        `where` `[n]`; None for all of them, in that order."""
        codes, scales = self._blocks[role]
        places = torch.from_numpy(where).to(codes.device)
        if device.type != "cuda" or codes.device.type == "cuda":
            return codes, scales, places
        staged = None if scales is None else _staged(scales, places, device)
        return _staged(codes, places, device), staged, None


def _room(taps: int, rows: int, size: int, device: torch.device) -> Tensor:
    """`[taps, rows, size]` bytes of memory.

    On the host they come from the system and go back to it. In the C library's heap, which keeps
    what is freed, the next features would not fit where the last ones were.
    """
    shape = taps, rows, size
    if device.type != "cpu" or not math.prod(shape):
        return torch.empty(shape, dtype=torch.uint8, device=device)
    own = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, math.prod(shape), **own)
    return torch.frombuffer(memory, dtype=torch.uint8).view(shape)


def _writable(place: Tensor) -> Bytes:
    """Memory for the rows of a shard: their place itself, or on a CUDA device a stage for it."""
    if place.device.type != "cuda":
        return place.numpy()
    return torch.empty(place.shape, dtype=place.dtype, pin_memory=True).numpy()


def _settle(written: Bytes | None, place: Tensor) -> None:
    """Copy what was written to its place, unless it is there."""
    if written is not None and place.device.type == "cuda":
        place.copy_(torch.from_numpy(written), non_blocking=True)
        # The shard is there only when its bytes are, whichever of the device's streams reads them.
        torch.cuda.current_stream(place.device).synchronize()


def _staged(block: Tensor, places: Tensor, device: torch.device) -> Tensor:
    """Rows of host memory on a CUDA device."""
    shape = (block.shape[0], len(places), block.shape[2])
    # PyTorch does not give pinned memory to anybody else before copies from it are over.
    staged = torch.empty(shape, dtype=block.dtype, pin_memory=True)
    torch.index_select(block, 1, places, out=staged)
    return staged.to(device, non_blocking=True)


def arrivals(
    shelf: Shelf,
    needs: Sequence[Collection[int]],
    fill: Callable[[int, Room], None],
    readers: int,
    progress: Callable[[int, int], None] | None = None,
) -> Generator[int, None, None]:
    """Number after number of `needs`, each when the shards that it names are on the shelf.

    Threads read what later needs name while the caller works: all of it where the shelf has room
    for all, else one window ahead. Close the iterator to stop them.

    Args:
        needs: shards, at most the shelf's window of them each.
        fill: reads a shard (see `Shelf.bring`). What it raises is raised here, when a need for
            that shard comes.
        readers: number of threads.
        progress: called with (shards there, shards waited for) while a need waits for long.
    """
    windows = list(_windows(needs, shelf.window))
    coming: dict[int, Future[None]] = {}
    pool = ThreadPoolExecutor(readers, thread_name_prefix="features")
    ending = sys.is_finalizing  # by its own name: at the very end this module's are gone
    try:
        for place, (shards, numbers) in enumerate(windows):
            following = windows[place + 1][0] if place + 1 < len(windows) else {}
            shelf.claim(wanted := shards | following)
            for shard in wanted:
                if shard not in shelf.there and shard not in coming:
                    coming[shard] = pool.submit(shelf.bring, shard, fill)
            filling = shelf.window is None and bool(coming)
            if filling:
                return_freed_memory()
            for number in numbers:
                _await([coming.pop(s) for s in needs[number] if s in coming], progress)
                if filling and not coming:
                    filling = False
                    keep_freed_memory()
                yield number
    finally:
        # Threads are over when the interpreter ends, and what stops them is taken down by then.
        if not ending():
            pool.shutdown(cancel_futures=True)


def _windows(
    needs: Sequence[Collection[int]], window: int | None
) -> Iterator[tuple[dict[int, None], list[int]]]:
    """Shards in the order in which they are needed, and the numbers of the needs they serve."""
    shards: dict[int, None] = {}
    numbers: list[int] = []
    for number, need in enumerate(needs):
        new = sum(shard not in shards for shard in need)
        if window is not None and numbers and len(shards) + new > window:
            yield shards, numbers
            shards, numbers = {}, []
        shards.update(dict.fromkeys(need))
        numbers.append(number)
    if numbers:
        yield shards, numbers


def _await(coming: Sequence[Future[None]], progress: Callable[[int, int], None] | None) -> None:
    """Wait for shards. Raises what reading them raised."""
    silent_until = time.monotonic() + PATIENCE
    left = set(coming)
    while left:
        patience = max(0.0, silent_until - time.monotonic())
        done, left = wait(left, patience or None, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
        if progress is not None and time.monotonic() >= silent_until:
            progress(len(coming) - len(left), len(coming))
