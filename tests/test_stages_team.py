"""Processes that share every batch end with the weights of one process alone."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sherl_pipe.cache import InputError
from sherl_pipe.pipeline import steps
from sherl_pipe.pipeline.config import make_config
from sherl_pipe.stages import features, group
from sherl_pipe.stages.pack import Pack
from sherl_pipe.stages.reading import Packed
from sherl_pipe.stages.settings import TuneResult
from sherl_pipe.stages.team import Team
from torch import distributed
from tune_tools import QUIET, Stopped, World, make_world, recorder, run

# The last batch of a window is ragged, and of some batches a third process has no row at all.
HOW: dict[str, dict[str, Any]] = {
    "classes": {"task": "kind", "batch_size": 7},
    "numbers": {"task": "size", "batch_size": 2},
    "vocabulary": {"task": "kind", "batch_size": 7, "loss": "vocabulary"},
}
EPOCHS = 2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["bert", "t5"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    found = make_world(tmp_path_factory.mktemp(request.param), request.param)
    # With the whole head, for the loss over the vocabulary.
    values = {"cache": found.cache.path, "tune": {"loss": "vocabulary"}}
    return World(*steps.open_for_tuning(make_config(values, "test"), QUIET))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


def in_team(size: int, meeting: Path, work: Callable[[Team], None]) -> list[int | None]:
    """Run `work` in `size` processes that are a team; their exit codes."""

    def member(rank: int) -> None:
        torch.set_num_threads(1)
        distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size
        )
        work(Team.of_group(torch.device("cpu")))
        distributed.destroy_process_group()

    # Forked, so that nothing is imported and no cache is opened again.
    processes = [
        multiprocessing.get_context("fork").Process(target=member, args=(rank,))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(500)
    return [process.exitcode for process in processes]


def tuner_of(world: World, folder: Path, **how: Any) -> Any:
    tuner = world.tuner(folder, **{"epochs": EPOCHS, "lr": 3e-3, **how})
    for module in tuner.route.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # members draw for their own parts
    return tuner


def close(first: Path, second: Path, fresh: Any) -> None:
    """Assert that two adapters differ by rounding alone, against what training moved."""
    one, two = (load_file(each / "adapter.safetensors") for each in (first, second))
    assert one.keys() == two.keys()
    moved = max(float((one[n] - p.detach()).abs().max()) for n, p in fresh.items() if n in one)
    apart = max(float((one[name] - two[name]).abs().max()) for name in one)
    assert moved > 1e-3 and apart < 1e-6 * moved, (moved, apart)


@pytest.mark.parametrize("kind", HOW)
def test_parts_add_up_to_the_gradient_of_the_whole(world: World, tmp_path: Path, kind: str) -> None:
    how = HOW[kind]
    tuner = tuner_of(world, tmp_path, **how)
    (rows, *_) = tuner.train.epoch(0, 0, how["batch_size"])
    parts = [tuner.train.part(rows, rank, 3) for rank in range(3)]

    def gradient(rows: Any, share: float) -> torch.Tensor:
        (batch,) = tuner.train.read([rows])
        found = torch.autograd.grad(
            tuner.loss(batch) * share, list(tuner.parameters.values()), allow_unused=True
        )
        return torch.cat([each.flatten() for each in found if each is not None])

    whole = gradient(rows, 1.0)
    shares = [tuner.amount(part) / tuner.amount(rows) for part in parts]
    assert sum(shares) == pytest.approx(1)
    held = [(part, share) for part, share in zip(parts, shares, strict=True) if len(part)]
    summed = torch.stack([gradient(*each) for each in held]).sum(0)
    assert (summed - whole).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize(
    ("kind", "size"), [("classes", 2), ("classes", 3), ("numbers", 3), ("vocabulary", 2)]
)
def test_a_team_ends_where_one_process_ends(
    world: World, tmp_path: Path, kind: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64: AdamW makes a whole step of a gradient that is nothing but rounding, unless
    that is small against its epsilon."""
    if kind == "vocabulary" and not world.backbone.family.seq2seq:
        pytest.skip("encoders have no label words")

    own = replace(world, backbone=copy.deepcopy(world.backbone))

    def packed(states: torch.Tensor, *more: Any) -> Packed:
        return Packed(states.double(), *more)

    monkeypatch.setattr(features, "Packed", packed)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

    def tuner(name: str) -> Any:
        found = tuner_of(own, tmp_path / name, **HOW[kind])
        found.route.double()
        return found

    fresh = dict(tuner("fresh").parameters)
    alone = run(tuner("alone"))

    def work(team: Team) -> None:
        outcomes = Pack([tuner("team")], team=team).run()
        assert len(outcomes) == (team.rank == 0)

    assert in_team(size, tmp_path / "meeting", work) == [0] * size
    close(tmp_path / "alone", tmp_path / "team", fresh)
    found = tuner("team").finished()
    assert isinstance(found, TuneResult) and found.score == pytest.approx(alone.score, abs=1e-3)


def test_a_stopped_team_goes_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint is that of any other tuning; two tunings in one pass."""
    monkeypatch.setattr(group, "CHECKPOINT_SECONDS", 0)
    how = [{"task": "kind", "seed": seed, "batch_size": 7} for seed in (0, 1)]

    def folders(name: str) -> list[Path]:
        return [tmp_path / name / str(number) for number in range(len(how))]

    def train(name: str, stop: int | None) -> Callable[[Team], None]:
        def work(team: Team) -> None:
            tuners = [
                tuner_of(world, folder, **each)
                for folder, each in zip(folders(name), how, strict=True)
            ]
            try:
                Pack(tuners, team=team).run(recorder([], stop))
            except Stopped:
                assert stop

        return work

    in_team(2, tmp_path / "one", train("whole", None))
    in_team(2, tmp_path / "two", train("often", 9))
    assert all((folder / "checkpoint.bin").is_file() for folder in folders("often"))
    assert in_team(2, tmp_path / "three", train("often", None)) == [0, 0]
    for whole, often in zip(folders("whole"), folders("often"), strict=True):
        one, two = (each / "adapter.safetensors" for each in (whole, often))
        assert one.read_bytes() == two.read_bytes()


def test_members_that_see_other_checkpoints_are_told(world: World, tmp_path: Path) -> None:
    def work(team: Team) -> None:
        with pytest.raises(InputError, match="share as --out"):
            team.same([team.rank])
        team.same([3, 4])

    assert in_team(2, tmp_path / "meeting", work) == [0, 0]


def test_parts_are_whole_and_near(world: World, tmp_path: Path) -> None:
    source = tuner_of(world, tmp_path).train
    for rows in source.epoch(0, 0, 32):
        parts = [source.part(rows, rank, 3) for rank in range(3)]
        assert sorted(np.concatenate(parts)) == sorted(rows)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        units = [set(source._unit[part].tolist()) for part in parts]
        assert sum(map(len, units)) <= len(set.union(*units)) + 2
