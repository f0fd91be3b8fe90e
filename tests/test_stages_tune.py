"""Stage two: honest resume, one order of batches wherever features are, learning, metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import write_rows
from model_tools import labels_of, save_model, sentences
from sherl_pipe.cache import CorruptCacheError, FeatureCache, InputError, NonFiniteError
from sherl_pipe.pipeline import steps
from sherl_pipe.pipeline.config import make_config
from sherl_pipe.pipeline.console import Bars
from sherl_pipe.stages import metrics, tune
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.extract import Extractor
from sherl_pipe.stages.features import WINDOW, FeatureSource
from sherl_pipe.stages.tune import Task, Tuner, TuneResult, TuneSettings, schedule

QUIET = Bars(None)
MUCH = 1 << 40
TRAIN, HELD_OUT = 130, 40


class Stopped(Exception):
    """The power went."""


@dataclass(frozen=True)
class World:
    """A cache of many small shards, with its backbone."""

    cache: FeatureCache
    backbone: Backbone
    tokenizer: Any

    def task(self, name: str = "colour") -> Task:
        return Task(self.cache, name, self.backbone, self.tokenizer)

    def tuner(self, folder: Path, *, task: str = "colour", budget: int = MUCH, **how: Any) -> Tuner:
        settings = TuneSettings(
            **{"reduction": 1, "epochs": 2, "batch_size": 32, "lr": 1e-2, **how}
        )
        return Tuner(self.task(task), settings, folder, budget=budget)


@pytest.fixture(scope="module", params=["bert", "t5"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)  # tiny models lose by more
    folder = tmp_path_factory.mktemp(request.param)
    texts = sentences(TRAIN + HELD_OUT)
    for task in ("colour", "size", "alone"):
        rows = [{"sentence": text, "label": labels_of(task, text)} for text in texts]
        if task == "alone":
            write_rows(folder / "data" / task / "train.jsonl", rows)
            continue
        write_rows(folder / "data" / task / "train.jsonl", rows[:TRAIN])
        write_rows(folder / "data" / task / "validation.jsonl", rows[TRAIN:])
    config = make_config(
        {
            "model": save_model(folder / "model", request.param),
            "cache": folder / "cache",
            "data": {"source": str(folder / "data")},
            "extract": {"codec": "float32", "template": "neutral"},
        },
        "test",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        patch.setattr(steps, "Extractor", lambda *a, **k: Extractor(*a, **k | {"shard_bytes": 1}))
        steps.run_extract(config, QUIET)
        world = World(*steps.open_for_tuning(config, QUIET))
    stream = "encoder" if request.param == "t5" else "hidden"
    assert world.cache.stream("alone/train", stream).layout.shards > WINDOW
    return world


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    epoch, calls = FeatureSource.epoch, iter(range(200))

    def bounded(*args: Any) -> Any:
        assert next(calls, None) is not None, "epochs without an end"
        return epoch(*args)

    monkeypatch.setattr(FeatureSource, "epoch", bounded)


def recorder(seen: list[int], stop: int | None = None) -> Callable[[str, int, int, str], None]:
    """Progress that notes steps, and fails at one of them."""

    def progress(_: str, done: int, __: int, unit: str) -> None:
        if unit == "steps":
            seen.append(done)
            if done == stop:
                raise Stopped

    return progress


def weights(folder: Path) -> bytes:
    return (folder / "adapter.safetensors").read_bytes()


def same(first: TuneResult, second: TuneResult) -> bool:
    return (first.metrics, first.score) == (second.metrics, second.score)


@pytest.mark.parametrize("budget", [MUCH, 0], ids=["resident", "streamed"])
def test_a_stopped_tuning_ends_with_the_same_weights(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    monkeypatch.setattr(tune, "CHECKPOINT_SECONDS", 0)
    seen: list[int] = []
    whole = world.tuner(tmp_path / "whole").run(recorder(seen))
    total = len(seen)
    per_epoch = total // 2
    assert seen == list(range(1, total + 1)) and per_epoch >= 5
    # At the first step, inside an epoch, at its end, behind it, and at the very last step.
    for stop in (1, 3, per_epoch, per_epoch + 1, total - 1, total):
        folder = tmp_path / str(stop)
        with pytest.raises(Stopped):
            world.tuner(folder, budget=budget).run(recorder([], stop))
        assert not (folder / "adapter.safetensors").exists()
        resumed: list[int] = []
        result = world.tuner(folder, budget=budget).run(recorder(resumed))
        # The step in flight is all that was lost.
        assert resumed == list(range(stop, total + 1))
        assert weights(folder) == weights(tmp_path / "whole") and same(result, whole)
        assert not (folder / "checkpoint.bin").exists()


def test_a_tuning_stopped_again_and_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.tuner(tmp_path / "whole", task="size").run()
    monkeypatch.setattr(tune, "CHECKPOINT_SECONDS", 0)
    for stop in (2, 4, 5, 8):
        with pytest.raises(Stopped):
            world.tuner(tmp_path / "often", task="size").run(recorder([], stop))
    world.tuner(tmp_path / "often", task="size").run()
    assert weights(tmp_path / "often") == weights(tmp_path / "whole")


def test_a_checkpoint_is_believed_only_if_it_is_whole_and_of_this_tuning(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(Stopped):
        world.tuner(tmp_path / "run").run(recorder([], 4))
    seen: list[int] = []
    world.tuner(tmp_path / "run", weight_decay=0.1).run(recorder(seen))
    assert seen[0] == 1  # other settings: from the start
    with pytest.raises(Stopped):
        world.tuner(tmp_path / "bad").run(recorder([], 4))
    file = tmp_path / "bad" / "checkpoint.bin"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptCacheError, match="checkpoint.bin is damaged. Delete it") as caught:
        world.tuner(tmp_path / "bad").run()
    assert caught.value.exit_code == 4


def test_finished_tunings_are_not_done_again(world: World, tmp_path: Path) -> None:
    first = world.tuner(tmp_path).run()
    before = {file: file.stat().st_ino for file in tmp_path.iterdir()}
    seen: list[int] = []
    again = world.tuner(tmp_path)
    assert again.finished() == first == again.run(recorder(seen))
    assert seen == [] and before == {file: file.stat().st_ino for file in tmp_path.iterdir()}
    # Another setting, or other labels, and it is another tuning.
    assert world.tuner(tmp_path, clip=0.5).finished() is None
    changed = world.tuner(tmp_path)
    table = changed.task.train
    changed.task.train = replace(table, labels=(1 - table.labels[0], *table.labels[1:]))
    assert changed.finished() is None


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
        world.tuner(tmp_path / str(budget), task="alone", budget=budget).run()
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


def test_seeds_differ_and_repeat(world: World, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name) * 1000 + seed)  # the caller's own state does not matter
        world.tuner(tmp_path / name, seed=seed).run()
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_it_learns(world: World, tmp_path: Path) -> None:
    """The loss falls, and a rule in the words is found on held-out sentences."""
    tuner = world.tuner(tmp_path, epochs=12, batch_size=16)
    (everything,) = tuner.train.read([np.arange(TRAIN)])

    def loss() -> float:
        with torch.inference_mode():
            return float(tuner.loss(everything))

    before = loss()
    result = tuner.run()
    labels = np.array(tuner.task.held_out.labels)
    majority = 100 * max(labels.mean(), 1 - labels.mean())
    print(before, loss(), result.score, majority)
    assert loss() < 0.5 * before
    assert result.role == "validation" and result.examples == HELD_OUT
    assert result.score > majority + 10, (result.score, majority)


def test_without_a_validation_split_some_rows_are_held_out(world: World) -> None:
    task, again = world.task("alone"), world.task("alone")
    assert (task.train, task.held_out) == (again.train, again.held_out)
    assert task.held_out.role == "held-out"
    assert not set(task.train.ids) & set(task.held_out.ids)
    whole = world.cache.tasks["alone"]["train"]
    assert set(task.train.ids) | set(task.held_out.ids) == set(whole.ids)
    assert 0.03 < len(task.held_out.ids) / len(whole.ids) < 0.25
    few = replace(whole, ids=task.train.ids[:3], labels=task.train.labels[:3])
    with pytest.raises(InputError, match="has 3 rows, too few to hold some out"):
        tune._roles({"train": few})


def test_gradients_that_are_no_numbers_stop_the_tuning(world: World, tmp_path: Path) -> None:
    tuner = world.tuner(tmp_path)
    with torch.no_grad():
        next(iter(tuner.parameters.values())).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="colour: the gradient at step 0 is not") as caught:
        tuner.run()
    assert caught.value.exit_code == 9
    assert list(tmp_path.iterdir()) == []


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


def test_schedule() -> None:
    shares = [schedule(step, 100, 0.1) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert shares[10:] == pytest.approx([(100 - step) / 90 for step in range(10, 100)])
    assert schedule(0, 10, 0.0) == 1.0 and schedule(9, 10, 0.0) == pytest.approx(0.1)
    assert schedule(499, 100_000, 0.5) == 1.0 > schedule(501, 100_000, 0.5)  # 500 steps at most


def test_metrics_by_hand() -> None:
    labels, found = np.array([1, 1, 1, 0, 0, 1]), np.array([1, 1, 0, 0, 1, 1])
    # 3 true and 1 false positives, 1 true and 1 false negatives.
    names = ("accuracy", "f1", "matthews")
    expected = {"accuracy": 400 / 6, "f1": 75.0, "matthews": 100 * (3 * 1 - 1 * 1) / 8}
    assert metrics.evaluate(names, labels, found) == pytest.approx(expected)
    numbers, guesses = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 10.0])
    # Deviations (-1.5, -.5, .5, 1.5) and (-3, -1, -2, 6); ranks differ by one, twice.
    expected = {"pearson": 100 * 13 / (5 * 50) ** 0.5, "spearman": 100 * (1 - 6 * 2 / 60)}
    assert metrics.evaluate(tuple(expected), numbers, guesses) == pytest.approx(expected)
    assert metrics.headline(expected) == pytest.approx(sum(expected.values()) / 2)
    constant = np.zeros(4)
    assert metrics.evaluate(("pearson", "spearman"), numbers, constant)["pearson"] == 0.0
    assert metrics.evaluate(("f1", "matthews"), labels, 0 * labels) == {"f1": 0.0, "matthews": 0.0}
    with pytest.raises(InputError, match="metric: expected one of"):
        metrics.evaluate(("bleu",), labels, found)
