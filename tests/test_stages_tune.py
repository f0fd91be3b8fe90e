"""Stage two: honest resume, learning, and what stops it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sherl_pipe.cache import CorruptCacheError, InputError, NonFiniteError
from sherl_pipe.stages import group, tune
from sherl_pipe.stages.methods import Consolidation
from sherl_pipe.stages.task_rows import train_and_held_out
from tune_tools import (
    HELD_OUT,
    MUCH,
    Stopped,
    World,
    goes_on,
    make_world,
    recorder,
    run,
    weights,
)


@pytest.fixture(scope="module", params=["bert", "t5"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.mark.parametrize("budget", [MUCH, 0], ids=["resident", "streamed"])
def test_a_stopped_tuning_ends_with_the_same_weights(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    monkeypatch.setattr(group, "CHECKPOINT_SECONDS", 0)

    def stops(total: int) -> tuple[int, ...]:
        epoch = total // 2
        assert epoch >= 5
        # At the first step, inside an epoch, at its end, behind it, and at the very last step.
        return (1, 3, epoch, epoch + 1, total - 1, total) if budget else (2, epoch + 1)

    goes_on(
        world.tuner(tmp_path / "whole"), lambda n: world.tuner(tmp_path / n, budget=budget), stops
    )


def test_a_tuning_stopped_again_and_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(world.tuner(tmp_path / "whole", task="size"))
    monkeypatch.setattr(group, "CHECKPOINT_SECONDS", 0)
    for stop in (2, 4, 5, 8):
        with pytest.raises(Stopped):
            run(world.tuner(tmp_path / "often", task="size"), recorder([], stop))
    run(world.tuner(tmp_path / "often", task="size"))
    assert weights(tmp_path / "often") == weights(tmp_path / "whole")


def test_a_checkpoint_is_believed_only_if_it_is_whole_and_of_this_tuning(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(Stopped):
        run(world.tuner(tmp_path / "run"), recorder([], 4))
    seen: list[int] = []
    run(world.tuner(tmp_path / "run", weight_decay=0.1), recorder(seen))
    assert seen[0] == 1  # other settings: from the start
    with pytest.raises(Stopped):
        run(world.tuner(tmp_path / "bad"), recorder([], 4))
    file = tmp_path / "bad" / "checkpoint.bin"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptCacheError, match="checkpoint.bin is damaged. Delete it") as caught:
        run(world.tuner(tmp_path / "bad"))
    assert caught.value.exit_code == 4


def test_finished_tunings_are_not_done_again(world: World, tmp_path: Path) -> None:
    first = run(world.tuner(tmp_path))
    before = {file: file.stat().st_ino for file in tmp_path.iterdir()}
    seen: list[int] = []
    again = world.tuner(tmp_path)
    assert again.finished() == first == run(again, recorder(seen))
    assert seen == [] and before == {file: file.stat().st_ino for file in tmp_path.iterdir()}
    # Another setting, or other labels, and it is another tuning.
    assert world.tuner(tmp_path, clip=0.5).finished() is None
    changed = world.tuner(tmp_path)
    table = changed.task.train
    changed.task.train = replace(table, labels=(1 - table.labels[0], *table.labels[1:]))
    assert changed.finished() is None


def test_seeds_differ_and_repeat(world: World, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name) * 1000 + seed)  # the caller's own state does not matter
        run(world.tuner(tmp_path / name, seed=seed))
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_it_learns(world: World, tmp_path: Path) -> None:
    """The loss falls, and what tells two kinds of sentences apart holds for new ones."""
    tuner = world.tuner(tmp_path, task="kind", epochs=6, batch_size=16)
    (everything,) = tuner.train.read([np.arange(len(tuner.task.train.ids))])

    def loss() -> float:
        with torch.inference_mode():
            return float(tuner.loss(everything))

    before = loss()
    result = run(tuner)
    labels = np.array(tuner.task.held_out.labels)
    majority = 100 * max(labels.mean(), 1 - labels.mean())
    assert loss() < 0.5 * before
    assert (result.role, result.examples) == ("validation", HELD_OUT)
    assert result.score > majority + 15, (result.score, majority)


def test_without_a_validation_split_some_rows_are_held_out(world: World) -> None:
    task, again = world.task("alone"), world.task("alone")
    assert (task.train, task.held_out) == (again.train, again.held_out)
    assert task.held_out.role == "held-out"
    assert not set(task.train.ids) & set(task.held_out.ids)
    whole = world.cache.tasks["alone"]["train"]
    assert set(task.train.ids) | set(task.held_out.ids) == set(whole.ids)
    assert 0.03 < len(task.held_out.ids) / len(whole.ids) < 0.25
    few = replace(whole, ids=task.train.ids[:3], labels=task.train.labels[:3])
    assert [len(part.ids) for part in train_and_held_out({"train": few})] == [2, 1]
    one = replace(whole, ids=whole.ids[:1], labels=whole.labels[:1])
    with pytest.raises(InputError, match="has 1 rows, too few to hold some out"):
        train_and_held_out({"train": one})


def test_gradients_that_are_no_numbers_stop_the_tuning(world: World, tmp_path: Path) -> None:
    tuner = world.tuner(tmp_path)
    with torch.no_grad():
        next(iter(tuner.parameters.values())).fill_(float("nan"))
    with pytest.raises(
        NonFiniteError, match="colour, sherl-r1.*: the gradient at step 0 is not"
    ) as caught:
        run(tuner)
    assert caught.value.exit_code == 9
    assert list(tmp_path.iterdir()) == []


def test_answers_that_are_no_numbers_are_no_result(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No gradient follows the last step; what it made of the weights is judged all the same."""
    monkeypatch.setattr(tune, "schedule", lambda step, total, _: float(step == total - 1))
    with pytest.raises(NonFiniteError):
        run(world.tuner(tmp_path, task="size", epochs=1, lr=1e38))
    assert not (tmp_path / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"method": "nope"}, "method: expected one of"),
        ({"precision": "fp8"}, "precision: expected one of"),
        ({"reduction": 99}, "reduction: expected 1 to 36, found 99"),
        ({"reduction": 0}, "reduction: expected 1 to 36, found 0"),
        ({"late": 5}, "late: expected 1 to"),
        ({"task": "nope"}, "task: expected one of"),
    ],
)
def test_settings_that_do_not_fit(
    world: World, tmp_path: Path, how: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        world.tuner(tmp_path, **how)


def test_a_tap_that_reduces_to_nothing_gives_numbers() -> None:
    """With few hidden units a ReLU leaves some token of some tap with zeros only."""
    module = Consolidation(8, 4, 3, "t5", "residual")
    with torch.no_grad():
        module.fc1.bias[0] = -1e3
    states = torch.randn(3, 5, 8)
    out = module(states, states[-1])
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize(("init", "share"), [("residual", 0.1), ("paper", 1.0)])
def test_an_open_gate_learns_slowly(world: World, tmp_path: Path, init: str, share: float) -> None:
    """Adam's first step is the rate, whatever the gradient."""
    tuner = world.tuner(tmp_path, init=init)
    gates = {name: p for name, p in tuner.parameters.items() if name.endswith("gate")}
    before = {name: gate.item() for name, gate in gates.items()}
    batch = next(iter(tuner.train.read(tuner.train.epoch(0, 0, 32))))
    tuner.step(batch, tuner.optimizer(), 5, 10)
    rate = tuner.settings.lr * tune.schedule(5, 10, tuner.settings.warmup)
    # A norm behind a residual start hides the gate's scale, so not every gate has a gradient.
    moved = max(abs(gate.item() - before[name]) for name, gate in gates.items())
    assert moved == pytest.approx(share * rate, rel=0.05)
