"""A cache of many small shards to tune on, made in a second."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cli_tools import write_rows
from model_tools import SEQ2SEQ, labels_of, save_model, sentences
from sherl_pipe.cache import FeatureCache, NonFiniteError
from sherl_pipe.pipeline import staff, steps
from sherl_pipe.pipeline.config import make_config
from sherl_pipe.pipeline.console import Bars
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.extract import Extractor
from sherl_pipe.stages.features import WINDOW
from sherl_pipe.stages.methods import Consolidation, find_method
from sherl_pipe.stages.pack import Pack
from sherl_pipe.stages.progress import Progress, silent
from sherl_pipe.stages.settings import TuneResult, TuneSettings
from sherl_pipe.stages.task import Task
from sherl_pipe.stages.tune import Tuner

QUIET = Bars(None)
MUCH = 1 << 40
TRAIN, HELD_OUT = 130, 40
# What two kinds of sentences are made of: easy enough for a random backbone.
KINDS = (["cat", "dog", "bird", "the", "big"], ["likes", "hates", "sees", "and", "red"])


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

    def tuner(
        self,
        folder: Path,
        *,
        task: str = "colour",
        budget: int = MUCH,
        residency: str = "auto",
        readers: int | None = None,
        shared: bool = False,
        **how: Any,
    ) -> Tuner:
        settings = TuneSettings(
            **{"reduction": 1, "epochs": 2, "batch_size": 32, "lr": 1e-2, **how}
        )
        tuner = Tuner(
            self.task(task),
            settings,
            folder,
            budget=budget,
            residency=residency,
            readers=readers,
            shared=shared,
        )
        for module in tuner.route.modules():
            if isinstance(module, Consolidation):
                module.dropout.p = 0.1  # so that a resumed run needs the random state too
        epoch, calls = tuner.train.epoch, iter(range(100))

        def bounded(*args: Any) -> Any:
            assert next(calls, None) is not None, "a training without an end"
            return epoch(*args)

        setattr(tuner.train, "epoch", bounded)  # noqa: B010 - for mypy it is a method
        return tuner


def make_world(folder: Path, family: str, method: str = "sherl") -> World:
    """Four tasks on a random backbone, loaded for a method; `alone` has no validation split."""
    texts = sentences(TRAIN + HELD_OUT)
    for task in ("colour", "size", "alone"):
        rows = [{"sentence": text, "label": labels_of(task, text)} for text in texts]
        if task == "alone":
            write_rows(folder / "data" / task / "train.jsonl", rows)
            continue
        write_rows(folder / "data" / task / "train.jsonl", rows[:TRAIN])
        write_rows(folder / "data" / task / "validation.jsonl", rows[TRAIN:])
    rng = random.Random(0)
    for role, count in (("train", 96), ("validation", HELD_OUT)):
        kinds = [rng.randrange(2) for _ in range(count)]
        rows = [{"sentence": " ".join(rng.choices(KINDS[k], k=6)), "label": k} for k in kinds]
        write_rows(folder / "data" / "kind" / f"{role}.jsonl", rows)
    config = make_config(
        {
            "model": save_model(folder / "model", family),
            "cache": folder / "cache",
            "data": {"source": str(folder / "data")},
            "extract": {"codec": "float32", "template": "neutral"},
            "tune": {"method": method},
        },
        "test",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        patch.setattr(staff, "Extractor", lambda *a, **k: Extractor(*a, **k | {"shard_bytes": 1}))
        steps.run_extract(config, QUIET)
        world = World(*steps.open_for_tuning(config, QUIET))
    stream = "encoder" if family in SEQ2SEQ else "hidden"
    assert world.cache.stream("alone/train", stream).layout.shards > WINDOW
    return world


def opened_for(world: World, method: str) -> World:
    """The same cache, with what a method needs of the backbone."""
    values = {"cache": world.cache.path, "tune": {"method": method}}
    return World(*steps.open_for_tuning(make_config(values, "test"), QUIET))


def usual(world: World, method: str, **change: Any) -> dict[str, Any]:
    """A method's own settings for a cache, changed."""
    found = find_method(method).usual_for(world.cache.identity.streams)
    return {"method": method, **found, **change}


def run(tuner: Tuner, progress: Progress = silent) -> TuneResult:
    """One tuning alone; its error, if it has one, is raised."""
    done = tuner.finished()
    (outcome,) = [done] if done else Pack([tuner]).run(progress)
    if isinstance(outcome, NonFiniteError):
        raise outcome
    return outcome


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


def goes_on(
    whole: Tuner, again: Callable[[str], Tuner], stops: Callable[[int], Sequence[int]]
) -> None:
    """Assert that what `again` makes, in the folder of that name beside `whole`'s, ends like it
    after a stop at each of the steps that `stops` chooses from so many."""
    seen: list[int] = []
    result = run(whole, recorder(seen))
    assert seen == list(range(1, len(seen) + 1))
    for stop in stops(len(seen)):
        with pytest.raises(Stopped):
            run(again(str(stop)), recorder([], stop))
        folder = again(str(stop)).folder
        assert not (folder / "adapter.safetensors").exists()
        resumed: list[int] = []
        # The step in flight is all that was lost.
        assert same(run(again(str(stop)), recorder(resumed)), result)
        assert resumed == list(range(stop, len(seen) + 1))
        assert weights(folder) == weights(whole.folder)
        assert not (folder / "checkpoint.bin").exists()


def halfway(total: int) -> tuple[int, int]:
    """The first step, and one in the middle."""
    return 1, total // 2 + 1
