"""Batches of cached features: one order of them, wherever the features are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sherl_pipe.stages import pack
from sherl_pipe.stages.features import FeatureSource
from sherl_pipe.stages.tune import train_step
from tune_tools import MUCH, World, make_world, run, same, weights


@pytest.fixture(scope="module", params=["bert", "t5"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


def sources(world: World, budget: int) -> FeatureSource:
    return world.tuner(Path("unused"), task="alone", budget=budget).train


def test_batches_do_not_depend_on_where_features_are(world: World, tmp_path: Path) -> None:
    resident, streamed = sources(world, MUCH), sources(world, 0)
    assert resident.resident and not streamed.resident
    for epoch in (0, 1):
        pairs = zip(
            resident.read(resident.epoch(3, epoch, 16)),
            streamed.read(streamed.epoch(3, epoch, 16)),
            strict=True,
        )
        for first, second in pairs:
            assert np.array_equal(first.rows, second.rows)
            for role, packed in first.streams.items():
                assert torch.equal(packed.states, second.streams[role].states)
                assert torch.equal(packed.lengths, second.streams[role].lengths)
    results = [
        run(world.tuner(tmp_path / str(budget), task="alone", budget=budget))
        for budget in (MUCH, 0)
    ]
    assert weights(tmp_path / str(MUCH)) == weights(tmp_path / "0") and same(*results)


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

    monkeypatch.setattr(pack, "train_step", note)
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
