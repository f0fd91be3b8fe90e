"""Several tunings in one pass end where each would have ended alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from sherl_pipe.cache import InputError, NonFiniteError, Stream
from sherl_pipe.stages import group
from sherl_pipe.stages.features import WINDOW
from sherl_pipe.stages.pack import Pack, packs
from sherl_pipe.stages.settings import TuneResult, TuneSettings
from sherl_pipe.stages.tune import Tuner, losses
from tune_tools import MUCH, Stopped, World, make_world, recorder, run, same, weights

# Tasks with the same rows, and for T5 with other words; seeds, rates and starts mixed.
MIXED: list[dict[str, Any]] = [
    {"task": "colour", "seed": 0, "lr": 1e-2},
    {"task": "colour", "seed": 0, "lr": 3e-3, "init": "paper"},
    {"task": "colour", "seed": 1, "lr": 1e-2},
    {"task": "size", "seed": 1, "lr": 1e-2, "reduction": 2},
    {"task": "size", "seed": 0, "lr": 1e-3},
]


@pytest.fixture(scope="module", params=["bert", "t5"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


def together(
    world: World, folder: Path, how: list[dict[str, Any]] = MIXED, *, budget: int = MUCH
) -> Pack:
    tuners = [world.tuner(folder / str(n), budget=budget, **each) for n, each in enumerate(how)]
    return Pack(tuners)


@pytest.mark.parametrize("budget", [MUCH, 0], ids=["resident", "streamed"])
def test_one_pass_ends_where_separate_runs_end(world: World, tmp_path: Path, budget: int) -> None:
    outcomes = together(world, tmp_path / "pass", budget=budget).run()
    for number, (each, outcome) in enumerate(zip(MIXED, outcomes, strict=True)):
        alone = run(world.tuner(tmp_path / "alone" / str(number), **each))
        assert isinstance(outcome, TuneResult)
        folders = tmp_path / "pass" / str(number), tmp_path / "alone" / str(number)
        assert weights(folders[0]) == weights(folders[1]) and same(outcome, alone)
        assert (outcome.task, outcome.seed, outcome.lr) == (alone.task, alone.seed, alone.lr)
        assert outcome.seconds > outcome.seconds_per_epoch > 0


def test_late_blocks_run_once_for_all(world: World, tmp_path: Path) -> None:
    """What several tunings compute together, on batches of their own, is what each computes
    alone, in values and in gradients."""
    whole = together(world, tmp_path)
    sizes = [5, 16, 9, 16, 7]
    alone, batches = [], []
    for place, (tuner, size) in enumerate(zip(whole.tuners, sizes, strict=True)):
        rows = whole.train.epoch(place, 0, size)[0]
        (batch,) = whole.train.read([rows])
        batches.append(whole.batch(place, batch))
        tuner.route.eval()
        with torch.no_grad():
            for parameter in tuner.parameters.values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        loss = tuner.loss(batches[-1])
        loss.backward()
        alone.append((loss.detach(), [p.grad for p in tuner.parameters.values()]))
        for parameter in tuner.parameters.values():
            parameter.grad = None
    assert len({len(batch.rows) for batch in batches}) > 1
    found = losses(whole.tuners, batches)
    torch.stack(found).sum().backward()
    for tuner, loss, (expected, gradients) in zip(whole.tuners, found, alone, strict=True):
        assert torch.allclose(loss, expected, atol=1e-5)
        for parameter, gradient in zip(tuner.parameters.values(), gradients, strict=True):
            assert (parameter.grad is None) == (gradient is None)
            if parameter.grad is not None and gradient is not None:
                scale = gradient.abs().max().clamp(min=1e-3)
                assert (parameter.grad - gradient).abs().max() / scale < 1e-3


def test_every_shard_is_read_once_an_epoch(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = [{"seed": seed, "epochs": 1} for seed in range(3)]
    whole = together(world, tmp_path, how, budget=0)
    read: Counter[tuple[str, int]] = Counter()
    original = Stream.read_shard

    def count(stream: Stream, shard: int, *rest: Any, **how: Any) -> Any:
        read[stream.base, shard] += 1
        return original(stream, shard, *rest, **how)

    def stop(*_: Any) -> None:
        raise Stopped

    monkeypatch.setattr(Stream, "read_shard", count)
    monkeypatch.setattr(Pack, "evaluate", stop)
    with pytest.raises(Stopped):
        whole.run()
    assert len(read) > WINDOW
    assert set(read.values()) == {1}


def test_a_stopped_pass_goes_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together(world, tmp_path / "whole").run()
    monkeypatch.setattr(group, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(Stopped):
        together(world, tmp_path / "often").run(recorder([], 3))
    # One of them was begun anew meanwhile: it catches up by itself.
    (tmp_path / "often" / "2" / "checkpoint.bin").unlink()
    seen: list[int] = []
    together(world, tmp_path / "often").run(recorder(seen))
    total = max(seen)
    assert seen == [*range(1, total + 1), *range(3, total + 1)]
    for number in range(len(MIXED)):
        whole, often = tmp_path / "whole" / str(number), tmp_path / "often" / str(number)
        assert weights(whole) == weights(often)


def test_one_that_fails_leaves_the_others_alone(world: World, tmp_path: Path) -> None:
    both = together(world, tmp_path / "pass", MIXED[:3])
    with torch.no_grad():
        next(iter(both.tuners[1].parameters.values())).fill_(float("nan"))
    first, failed, third = both.run()
    assert isinstance(failed, NonFiniteError) and "lr0.003" in str(failed)
    assert not (tmp_path / "pass" / "1").exists()
    for place, outcome in ((0, first), (2, third)):
        assert isinstance(outcome, TuneResult)
        run(world.tuner(tmp_path / "alone" / str(place), **MIXED[place]))
        folders = tmp_path / "pass" / str(place), tmp_path / "alone" / str(place)
        assert weights(folders[0]) == weights(folders[1])


def test_what_cannot_share_a_pass(world: World, tmp_path: Path) -> None:
    one, two = TuneSettings(), TuneSettings(seed=1)
    longer, other = TuneSettings(epochs=3), world.task("alone")
    task = world.task()
    asked = [(task, one), (task, longer), (task, two), (other, one), (world.task("size"), one)]
    found = [[(t.name, s.seed, s.epochs) for t, s in members] for members in packs(asked, 8)]
    assert found == [
        [("colour", 0, 10), ("colour", 1, 10), ("size", 0, 10)],
        [("colour", 0, 3)],
        [("alone", 0, 10)],
    ]
    assert [len(members) for members in packs([(task, one), (task, two)] * 2, 3)] == [3, 1]
    tuners: list[Tuner] = [world.tuner(tmp_path, epochs=epochs) for epochs in (1, 2)]
    with pytest.raises(InputError, match="do not read the same taps"):
        Pack(tuners)
