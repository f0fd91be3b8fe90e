"""Shards that threads bring while batches are made of others, and the choice of where they live."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
from sherl_pipe.cache import InputError
from sherl_pipe.stages import residency, shelf
from sherl_pipe.stages.residency import Home, choose, in_bytes
from sherl_pipe.stages.shelf import Form, Ints, Room, Shelf, arrivals
from torch import Tensor

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHARDS = 30
ROWS = np.random.default_rng(0).integers(1, 6, SHARDS)
FORMS = {"a": Form(2, 3, 0, ROWS), "b": Form(1, 2, 4, np.ones(SHARDS, np.int64))}
PATIENT = 30.0  # seconds after which a test is given up


def fill(shard: int, room: Room) -> None:
    """Write what no other shard holds."""
    assert room.keys() == FORMS.keys()
    for role, form in FORMS.items():
        codes, scales = room[role]
        assert codes.shape == (form.taps, form.rows[shard], form.code_bytes)
        assert (scales is not None) == bool(form.scale_bytes)
        for each in (codes, scales):
            if each is not None:
                each[:] = shard + 1


def taken(kept: Shelf, role: str, where: Ints) -> tuple[Tensor, Tensor | None]:
    """Codes and scales of some rows."""
    codes, scales, places = kept.rows(role, where, CPU)
    assert places is not None
    chosen = codes.index_select(1, places)
    return chosen, None if scales is None else scales.index_select(1, places)


def holds(kept: Shelf, shard: int) -> bool:
    """Whether every row of a shard is in its place."""
    for role, form in FORMS.items():
        where = kept.starts(role, np.array([shard])) + np.arange(form.rows[shard])
        codes, scales = taken(kept, role, where)
        assert codes.shape == (form.taps, form.rows[shard], form.code_bytes)
        assert (scales is not None) == bool(form.scale_bytes)
        if not all(bool((t == shard + 1).all()) for t in (codes, scales) if t is not None):
            return False
    return True


def readers() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("features")]


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    yield
    assert readers() == []


@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_need_finds_its_shards(window: int | None, count: int) -> None:
    """Random needs, of which many come back to shards that have left."""
    rng = random.Random(count)
    needs = [rng.sample(range(SHARDS), rng.randint(0, window or 5)) for _ in range(150)]
    kept, reads = Shelf(FORMS, CPU, window), list[int]()

    def read(shard: int, room: Room) -> None:
        reads.append(shard)
        time.sleep(rng.random() / 2000)
        fill(shard, room)

    for expected, number in enumerate(arrivals(kept, needs, read, count)):
        assert number == expected
        assert all(holds(kept, shard) for shard in needs[number])
        assert len(kept.there) <= (2 * window if window else SHARDS)
    assert number == len(needs) - 1
    if window is None:
        assert sorted(reads) == sorted({shard for need in needs for shard in need})
    else:
        assert len(reads) > SHARDS


@pytest.mark.parametrize("window", [None, 3])
def test_freed_memory_is_kept_but_while_shards_that_stay_are_read(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    told: list[str] = []
    for name in ("keep", "return"):
        monkeypatch.setattr(shelf, f"{name}_freed_memory", partial(told.append, name))
    kept, needs = Shelf(FORMS, CPU, window), [[2], [0, 1], [2], [0]]
    seen = [len(told) for _ in arrivals(kept, needs, fill, 2)]
    assert told == ([] if window else ["return", "keep"])
    assert seen == ([0] * 4 if window else [1, 2, 2, 2])
    assert len(list(arrivals(kept, needs, fill, 2))) == 4
    assert len(told) == (0 if window else 2)
    list(arrivals(kept, [[0], [5]], fill, 2))  # one more has to be read
    assert len(told) == (0 if window else 4)


def test_memory_of_a_stream_is_two_windows() -> None:
    kept = Shelf(FORMS, CPU, 3)
    assert len(taken(kept, "a", np.arange(6 * ROWS.max()))[0][0]) == 6 * ROWS.max()
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        taken(kept, "a", np.array([6 * ROWS.max()]))
    whole = Shelf(FORMS, CPU)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        taken(whole, "a", np.array([ROWS.sum()]))


def test_a_shard_of_two_windows_is_read_once() -> None:
    reads = []

    def read(shard: int, room: Room) -> None:
        reads.append(shard)
        fill(shard, room)

    needs = [[0, 1], [1, 2], [2, 3], [0]]
    for number in arrivals(kept := Shelf(FORMS, CPU, 2), needs, read, 1):
        assert all(holds(kept, shard) for shard in needs[number])
    assert reads == [0, 1, 2, 3, 0]


def test_shards_are_read_in_the_order_in_which_they_are_needed() -> None:
    reads = []

    def read(shard: int, room: Room) -> None:
        reads.append(shard)
        fill(shard, room)

    needs = [[7, 2], [2, 9], [1], [7, 0]]
    assert list(arrivals(Shelf(FORMS, CPU), needs, read, 1)) == [0, 1, 2, 3]
    assert reads == [7, 2, 9, 1, 0]


def blocked(*shards: int) -> tuple[threading.Event, Callable[[int, Room], None]]:
    """A read that is stuck on some shards until the event comes."""
    release = threading.Event()

    def read(shard: int, room: Room) -> None:
        if shard in shards:
            assert release.wait(PATIENT)
        fill(shard, room)

    return release, read


@pytest.mark.parametrize("window", [None, 2])
def test_the_first_batch_does_not_wait_for_later_shards(window: int | None) -> None:
    release, read = blocked(3)
    arrived = arrivals(kept := Shelf(FORMS, CPU, window), [[0, 1], [1], [2, 3]], read, 1)
    assert [next(arrived), next(arrived)] == [0, 1]
    assert 3 not in kept.there
    release.set()
    assert next(arrived) == 2 and holds(kept, 3)
    arrived.close()


def test_so_many_threads_read() -> None:
    together = threading.Barrier(3)

    def read(shard: int, room: Room) -> None:
        together.wait(PATIENT)
        fill(shard, room)

    assert list(arrivals(Shelf(FORMS, CPU), [[0, 1, 2], [3, 4, 5]], read, 3)) == [0, 1]


def test_a_long_wait_is_no_silent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "PATIENCE", 0.05)
    release, read = blocked(1)
    told = []

    def progress(done: int, total: int) -> None:
        told.append((done, total))
        release.set()

    list(arrivals(Shelf(FORMS, CPU), [[0, 1], [2]], read, 2, progress))
    assert told == [(1, 2), (2, 2)]


def test_a_short_wait_is_none() -> None:
    told: list[int] = []
    needs = [[0, 1], [2]]
    assert list(arrivals(Shelf(FORMS, CPU), needs, fill, 1, lambda *each: told.extend(each)))
    assert told == []


@pytest.mark.parametrize("window", [None, 2])
def test_what_a_reader_raises_comes_with_the_need_for_its_shard(window: int | None) -> None:
    broken = ValueError("shard 3")

    def read(shard: int, room: Room) -> None:
        if shard == 3:
            raise broken
        fill(shard, room)

    kept, got = Shelf(FORMS, CPU, window), list[int]()
    with pytest.raises(ValueError) as caught:
        got.extend(arrivals(kept, [[0], [1, 2], [2, 3], [4]], read, 2))
    assert caught.value is broken and 3 not in kept.there
    got.clear()
    with pytest.raises(ValueError):
        for number in arrivals(kept, [[0], [1, 2], [2, 3], [4]], read, 2):
            got.append(number)  # noqa: PERF402 - what came before the error is the point
    assert got == [0, 1]


def test_closing_early_stops_the_threads_and_keeps_what_is_there() -> None:
    release, read = blocked(1)
    arrived = arrivals(kept := Shelf(FORMS, CPU), [[shard] for shard in range(SHARDS)], read, 2)
    assert next(arrived) == 0 and readers()
    threading.Timer(0.05, release.set).start()
    arrived.close()
    assert readers() == [] and {0, 1} <= kept.there
    again = []

    def read_again(shard: int, room: Room) -> None:
        again.append(shard)
        fill(shard, room)

    there = set(kept.there)
    everything = [list(range(SHARDS))]
    assert list(arrivals(kept, everything, read_again, 1)) == [0]
    assert not there & set(again) and all(holds(kept, shard) for shard in range(SHARDS))


def test_the_first_home_that_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "device_share", lambda _: 100)
    for size, kind in ((100, "device"), (101, "host"), (1000, "host"), (1001, "stream")):
        assert choose("auto", size, 1000, CUDA).kind == kind
    for size, kind in ((100, "host"), (1000, "host"), (1001, "stream")):
        assert choose("auto", size, 1000, CPU).kind == kind
    for size, wanted in ((100, "device"), (1000, "host"), (1, "stream"), (10**6, "stream")):
        assert choose(wanted, size, 1000, CUDA) == Home(wanted, size, ROOMS[wanted], CUDA)
    assert choose("device", 1000, 1000, CPU) == choose("host", 1000, 1000, CPU)


ROOMS = {"device": 100, "host": 1000, "stream": 1000}


def test_rooms_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "device_share", lambda _: 100)
    beside = [Home("device", 60, 100, CUDA), Home("host", 700, 1000, CUDA)]
    beside.append(Home("stream", 10**6, 1000, CUDA))  # takes no room for itself
    for size, kind in ((40, "device"), (41, "host"), (300, "host"), (301, "stream")):
        assert choose("auto", size, 1000, CUDA, beside).kind == kind
    with pytest.raises(InputError, match="at most 300 B .* found 301 B"):
        choose("host", 301, 1000, CUDA, beside)


def test_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "device_share", lambda _: 3 << 30)
    size = 5 << 30
    with pytest.raises(InputError) as caught:
        choose("device", size, 1 << 40, CUDA)
    assert str(caught.value) == (
        "residency device: expected coded features of at most 3.0 GiB (half of what is free on "
        "cuda), found 5.0 GiB. Use --residency host, stream or auto."
    )
    for wanted, device in (("host", CUDA), ("host", CPU), ("device", CPU)):
        with pytest.raises(InputError) as caught:
            choose(wanted, size, 1 << 30, device)
        assert str(caught.value) == (
            "residency host: expected coded features of at most 1.0 GiB (the memory budget), found "
            "5.0 GiB. Raise --memory-budget, or use --residency stream."
        )
    with pytest.raises(InputError, match="residency: expected one of .*, found disk"):
        choose("disk", 1, 1, CPU)


def test_what_a_home_is_called() -> None:
    assert str(Home("host", 812 << 20, 6335076761, CPU)) == (
        "812 MiB of coded features in host memory (budget 5.9 GiB)"
    )
    assert "features in the memory of cuda (budget" in str(Home("device", 1, 2, CUDA))
    assert "features streamed (budget 0 B)" in str(Home("stream", 1, 0, CPU))
    sizes = {70: "70 B", 1536: "1.5 KiB", 2048 << 20: "2.0 GiB", 3333 << 30: "3,333 GiB"}
    assert {size: in_bytes(size) for size in sizes} == sizes


def test_the_cpu_has_no_share_of_its_own() -> None:
    assert residency.device_share(CPU) == 0
