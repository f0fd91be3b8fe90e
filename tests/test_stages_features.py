"""Batches of cached features: one order of them, wherever the features are."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sherl_pipe.cache import CorruptCacheError, FeatureCache, InputError, Stream
from sherl_pipe.stages import features, group, shelf
from sherl_pipe.stages.features import WINDOW, Batch, FeatureSource, Ints, Packed
from sherl_pipe.stages.tune import train_step
from tune_tools import MUCH, Stopped, World, make_world, recorder, run, same, weights


@pytest.fixture(scope="module", params=["bert", "t5"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith("features")]


def sources(world: World, budget: int = MUCH, **how: Any) -> FeatureSource:
    return world.tuner(Path("unused"), task="alone", budget=budget, **how).train


WAYS = [(kind, readers) for kind in ("host", "device", "stream") for readers in (1, 2, 4)]


def same_batches(first: Iterable[Batch], second: Iterable[Batch]) -> int:
    """How many there were."""
    count = 0
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.rows, other.rows)
        assert one.streams.keys() == other.streams.keys()
        for role, packed in one.streams.items():
            assert torch.equal(packed.states, other.streams[role].states)
            assert torch.equal(packed.lengths, other.streams[role].lengths)
        count += 1
    return count


@cache
def example(stream: Stream, position: int, taps: tuple[int, ...]) -> torch.Tensor:
    """`[K, n, d]`, read on its own."""
    return torch.from_numpy(stream.read_example(position, taps))


def one_by_one(world: World, source: FeatureSource, batches: list[Ints]) -> Iterator[Batch]:
    """The batches, with features of every example read on its own."""
    task = world.task("alone")
    table, choices = task.train, task.words_of(task.train.labels)
    for rows in batches:
        streams = {}
        for role, reading in source.readings.items():
            found = []
            for row in rows:
                split, position = world.cache.places[table.ids[row]]
                stream = world.cache.stream(split, reading.stream)
                states = example(stream, position, reading.taps)
                if reading.paths is not None:
                    states = states[:, list(reading.paths[choices[row]])]
                found.append(states)
            lengths = torch.tensor([each.shape[1] for each in found])
            streams[role] = Packed(torch.cat(found, dim=1), lengths)
        yield Batch(rows, streams)


@pytest.mark.parametrize("window", [WINDOW, 2])
@pytest.mark.parametrize(("kind", "readers"), WAYS)
def test_batches_do_not_depend_on_where_features_are(
    world: World, monkeypatch: pytest.MonkeyPatch, window: int, kind: str, readers: int
) -> None:
    monkeypatch.setattr(features, "WINDOW", window)
    source = sources(world, residency=kind, readers=readers)
    assert source.home.kind == ("stream" if kind == "stream" else "host")
    for seed, epoch in ((3, 0), (3, 1), (4, 0)):
        batches = source.epoch(seed, epoch, 16)
        assert len(batches) > 4
        assert same_batches(source.read(batches), one_by_one(world, source, batches)) == len(
            batches
        )
    # A tuning that goes on inside an epoch, one that evaluates, and two whose batches are mixed.
    other = source.epoch(5, 1, 7)
    mixed = [batch for pair in zip(batches, other, strict=False) for batch in pair]
    for some in (batches[3:], source.in_order(64), source.in_order(10**6), mixed, []):
        assert same_batches(source.read(some), one_by_one(world, source, some)) == len(some)


def test_no_batch_of_an_evaluation_is_larger_than_one_of_training_can_be(world: World) -> None:
    source = sources(world)
    lengths = next(iter(source._length.values()))
    for size in (1, 4, 16):
        batches = source.in_order(size)
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
        rows, tokens = zip(*((len(each), lengths[each].sum()) for each in batches), strict=True)
        assert max(tokens) <= size * lengths.max() and size < max(rows) <= 4 * size


@pytest.mark.parametrize("kind", ["host", "stream"])
def test_rows_of_the_same_shards_are_kept_once(world: World, kind: str) -> None:
    tuner = world.tuner(Path("unused"), task="alone", residency=kind)
    for source in (tuner.train, tuner.held_out):
        batches = source.in_order(16)
        assert sum(1 for _ in source.read(batches)) == len(batches)
    beside = tuner.source(tuner.readings(train=False), train=False, beside=[tuner.train])
    apart = tuner.source(tuner.readings(train=False), train=False)
    assert (beside._shelf([]) is tuner.train._shelf([])) == (kind == "host")
    assert apart._shelf([]) is not tuner.train._shelf([])
    batches = beside.in_order(16)
    assert same_batches(beside.read(batches), apart.read(batches)) == len(batches)


@pytest.mark.parametrize("kind", ["host", "stream"])
def test_two_readings_at_a_time(world: World, kind: str) -> None:
    source = sources(world, residency=kind)
    first, second = source.epoch(0, 0, 16), source.epoch(1, 0, 16)
    for number, (one, other) in enumerate(
        zip(source.read(first), source.read(second), strict=False)
    ):
        expected = one_by_one(world, source, [first[number], second[number]])
        assert same_batches([one, other], expected) == 2


def test_tunings_do_not_depend_on_where_features_are(world: World, tmp_path: Path) -> None:
    results = [
        run(world.tuner(tmp_path / kind, task="alone", residency=kind))
        for kind in ("host", "stream")
    ]
    assert weights(tmp_path / "host") == weights(tmp_path / "stream") and same(*results)


def test_what_stays_is_read_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[str, str, int]] = []
    read_shard = Stream.read_shard

    def note(stream: Stream, shard: int, *rest: Any, **how: Any) -> Any:
        reads.append((stream.split, stream.name, shard))
        return read_shard(stream, shard, *rest, **how)

    monkeypatch.setattr(Stream, "read_shard", note)
    source = sources(world, residency="host")
    assert reads == []
    for epoch in (0, 1):
        for _ in source.read(source.epoch(0, epoch, 16)):
            pass
    source.preload()
    once = len(reads)
    assert len(set(reads)) == once > WINDOW
    ready = sources(world, residency="host")
    ready.preload()
    assert len(reads) == 2 * once and sorted(reads[once:]) == sorted(reads[:once])
    streamed = sources(world, residency="stream")
    streamed.preload()
    assert len(reads) == 2 * once
    for epoch in (0, 1):
        for _ in streamed.read(streamed.epoch(0, epoch, 16)):
            pass
    assert len(reads) >= 4 * once


@pytest.mark.parametrize("kind", ["host", "stream"])
def test_a_reading_that_is_left_early(world: World, tmp_path: Path, kind: str) -> None:
    """By closing it, and by an error in a step; the fixture sees that no thread is left."""
    source = sources(world, residency=kind, readers=4)
    batches = source.epoch(0, 0, 16)
    reading = source.read(batches)
    next(reading)
    reading.close()
    assert same_batches(source.read(batches), one_by_one(world, source, batches))
    with pytest.raises(Stopped):
        run(world.tuner(tmp_path, task="alone", residency=kind), recorder([], 2))


@pytest.mark.parametrize(("kind", "readers"), WAYS)
def test_a_damaged_shard_ends_the_training(
    world: World, tmp_path: Path, kind: str, readers: int
) -> None:
    shutil.copytree(world.cache.path, tmp_path / "cache")
    stream = world.backbone.family.main
    file = sorted((tmp_path / "cache" / "alone/train" / stream / "values/c/0").iterdir())[3]
    data = bytearray((file / "0").read_bytes())
    data[len(data) // 2] ^= 1
    (file / "0").write_bytes(data)
    damaged = replace(world, cache=FeatureCache.open(tmp_path / "cache"))
    tuner = damaged.tuner(tmp_path / "run", task="alone", residency=kind, readers=readers)
    with pytest.raises(CorruptCacheError, match=f"{file / '0'} .shard {file.name}.") as caught:
        run(tuner)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "run" / "adapter.safetensors").exists()


@pytest.mark.parametrize("kind", ["host", "stream"])
def test_a_tuning_tells_of_shards_that_it_waits_for(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(shelf, "PATIENCE", 0.0)
    told: list[tuple[str, int, int]] = []

    def progress(what: str, done: int, total: int, unit: str) -> None:
        if unit == "shards":
            told.append((what, done, total))

    run(world.tuner(tmp_path, task="kind", residency=kind), progress)
    assert {what for what, _, _ in told} == {
        "kind sherl seed 0: loading",
        "evaluation: loading",
    }
    assert told[-1][1] == told[-1][2]
    for (what, done, total), following in pairwise(told):
        assert 0 < done <= total
        if done < total:  # a bar that was begun is ended
            assert following[0] == what and following[1] > done and following[2] == total


def test_a_home_for_training_and_for_held_out_rows(world: World) -> None:
    def kinds(budget: int, residency: str = "auto") -> tuple[str, str]:
        tuner = world.tuner(Path("unused"), task="kind", budget=budget, residency=residency)
        return tuner.train.home.kind, tuner.held_out.home.kind

    tuner = world.tuner(Path("unused"), task="kind")
    train, held_out = tuner.train.home.size, tuner.held_out.home.size
    assert kinds(MUCH) == kinds(train + held_out) == ("host", "host")
    assert kinds(train + held_out, "host") == ("host", "host")
    assert kinds(train + held_out - 1) == kinds(train) == ("host", "stream")
    assert kinds(held_out) == ("stream", "host")
    assert kinds(0) == kinds(MUCH, "stream") == ("stream", "stream")
    for budget in (0, train - 1, train + held_out - 1):
        with pytest.raises(InputError, match="residency host: .* Raise --memory-budget"):
            kinds(budget, "host")


def test_what_is_said_of_the_home(world: World) -> None:
    size = r"^\d[\d.]* [KM]iB of coded features "
    kept, streamed = sources(world, 1 << 30, readers=1), sources(world, 0, readers=4)
    said = r"in host memory \(budget 1.0 GiB\), read by 1 reader$"
    assert re.search(size + said, kept.summary), kept.summary
    said = r"streamed \(budget 0 B\), 8 shards at a time, by 4 readers$"
    assert re.search(size + said, streamed.summary), streamed.summary


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["auto", "device", "host", "stream"])
def test_batches_on_cuda(world: World, kind: str) -> None:
    usual, task = sources(world), world.task("alone")
    source = FeatureSource(
        world.cache,
        task.train,
        usual.readings,
        budget=MUCH,
        device=torch.device("cuda"),
        residency=kind,
        readers=3,
    )
    assert source.home.kind == ("device" if kind == "auto" else kind)
    for epoch in (0, 1):
        batches = source.epoch(0, epoch, 16)
        for one, other in zip(source.read(batches), usual.read(batches), strict=True):
            for role, packed in one.streams.items():
                assert packed.states.is_cuda and packed.lengths.is_cuda
                assert torch.equal(packed.states.cpu(), other.streams[role].states)
                assert torch.equal(packed.lengths.cpu(), other.streams[role].lengths)


def test_order_is_that_of_seed_and_epoch(world: World) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return [rows.tolist() for rows in sources(world, 0).epoch(seed, epoch, 16)]

    assert order(3, 1) == order(3, 1)
    different = [order(3, 0), order(3, 1), order(4, 0), order(4, 1)]
    for batches in different:
        rows = sorted(row for batch in batches for row in batch)
        assert rows == list(range(len(rows)))
    assert all(a != b for n, a in enumerate(different) for b in different[:n])
    sets = [{frozenset(batch) for batch in batches} for batches in different]
    assert not sets[0] & sets[1]  # not the same batches in another order


def test_training_sees_every_row_once_an_epoch(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of shards may leave different numbers of half-full batches in different epochs."""
    seen: list[int] = []

    def note(tuners: Any, batches: Any, *rest: Any) -> Any:
        seen.extend(row for batch in batches for row in batch.rows.tolist())
        return train_step(tuners, batches, *rest)

    monkeypatch.setattr(group, "train_step", note)
    source = sources(world, 0)

    def uneven(size: int) -> bool:
        return len({len(FeatureSource.epoch(source, 0, epoch, size)) for epoch in range(4)}) > 1

    size = next(filter(uneven, range(5, 40)), 16)
    tuner = world.tuner(tmp_path, task="alone", epochs=4, batch_size=size)
    run(tuner)
    rows = len(tuner.task.train.ids)
    for epoch in range(4):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    assert len(seen) == 4 * rows
