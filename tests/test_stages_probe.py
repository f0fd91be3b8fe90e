"""Heads that start from a linear model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sherl_pipe.cache import InputError
from sherl_pipe.stages import probe
from sherl_pipe.stages.pack import Pack
from sherl_pipe.stages.probe import fit
from sherl_pipe.stages.settings import TuneResult
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from tune_tools import MUCH, World, make_world, run, same, weights


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


def rows(count: int = 300) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(count, 5) * torch.tensor([1.0, 10, 0.1, 3, 0]) + 2


@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_regression(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sherl_pipe.stages.probe.PENALTIES", (1e-2,))
    features = rows()
    pull = features[:, 0] + features[:, 1] / 10 + torch.randn(300)
    classed = torch.bucketize(pull, torch.linspace(1, 4, classes + 1)[1:-1])
    weight, bias = fit(features, classed, classes)
    mine = (features @ weight.T + bias).softmax(-1).numpy()
    scaled = StandardScaler().fit_transform(features.numpy())
    # Its penalty counts for the sum of all rows' losses, ours for their mean.
    theirs = LogisticRegression(C=1 / (1e-2 * 300), max_iter=1000).fit(scaled, classed.numpy())
    # With two classes it has one weight vector, which is penalised half as much.
    assert np.abs(mine - theirs.predict_proba(scaled)).max() < (0.05 if classes == 2 else 1e-3)


def test_ridge_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sherl_pipe.stages.probe.PENALTIES", (1e-2,))
    features = rows()
    numbers = features[:, 0] - features[:, 3] + torch.randn(300)
    weight, bias = fit(features, numbers, 1)
    scaled = StandardScaler().fit_transform(features.numpy())
    theirs = Ridge(1e-2 * 300).fit(scaled, numbers.numpy())
    found = (features @ weight.T + bias)[:, 0].numpy()
    assert np.abs(found - theirs.predict(scaled)).max() < 1e-3


def test_the_penalty_is_chosen_on_rows_left_out() -> None:
    """Noise of many columns and few rows is fitted with a strong penalty only."""
    torch.manual_seed(0)
    noise, signal = torch.randn(80, 60), torch.randn(400, 4)
    weight, _ = fit(noise, torch.randn(80), 1)
    assert weight.norm() < 0.1
    weight, _ = fit(signal, signal[:, 0], 1)
    assert (weight - torch.tensor([[1.0, 0, 0, 0]])).abs().max() < 0.01
    fit(signal[:3], signal[:3, 0], 1)  # too few to leave some out


def test_a_tuning_starts_from_its_probe(world: World, tmp_path: Path) -> None:
    """With a rate of next to nothing, the probe's score is what is left."""
    still = {"task": "kind", "epochs": 1, "lr": 1e-9}
    probe = run(world.tuner(tmp_path / "probe", head="probe", **still))
    labels = np.array(world.task("kind").held_out.labels)
    majority = 100 * max(labels.mean(), 1 - labels.mean())
    assert probe.score > majority + 15
    assert run(world.tuner(tmp_path / "random", **still)).score < probe.score - 5
    graded = run(world.tuner(tmp_path / "graded", head="probe", **{**still, "task": "size"}))
    assert graded.score > 50
    with pytest.raises(InputError, match="head: expected one of"):
        world.tuner(tmp_path, head="nope")


def test_in_one_pass_as_alone(world: World, tmp_path: Path) -> None:
    mixed = [{"head": "probe"}, {"head": "random"}, {"head": "probe", "seed": 1, "task": "size"}]
    tuners = [world.tuner(tmp_path / str(n), **each) for n, each in enumerate(mixed)]
    for number, (each, outcome) in enumerate(zip(mixed, Pack(tuners).run(), strict=True)):
        folder = tmp_path / "alone" / str(number)
        alone = run(world.tuner(folder, budget=MUCH, **each))
        assert isinstance(outcome, TuneResult)
        assert weights(folder) == weights(tmp_path / str(number)) and same(outcome, alone)


def test_seconds_of_a_fit_are_told_from_a_few_rows(world: World, tmp_path: Path) -> None:
    """Looks are timed on as many rows as there will be, whatever the sample's size."""
    tuner = world.tuner(tmp_path)
    rows = np.arange(len(tuner.task.train.ids))[:8]
    width = tuner.task.backbone.width
    seen: list[int] = []
    loss = probe._loss

    def spy(found: torch.Tensor, targets: torch.Tensor, outputs: int) -> torch.Tensor:
        seen.append(len(found))
        return loss(found, targets, outputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "_loss", spy)
        ticks = iter(range(100))
        told = probe.start_seconds(
            tuner, [(rows, torch.randn(8, width))], 500, lambda: float(next(ticks))
        )
    assert set(seen) == {500}
    # The fourth lap, 3, is that of the second solve.
    assert told == pytest.approx(3.0 / (len(seen) / 2) * probe.LOOKS)
