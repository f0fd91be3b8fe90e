"""Who does which shard, and what is done about workers that die; on an engine made for the test."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import sherl_pipe.pipeline
from cache_tools import identity, write_split
from cli_tools import done, refused, sherl
from model_tools import save_model
from sherl_pipe.cache import (
    CacheWriter,
    FeatureCache,
    InputError,
    LockedError,
    NonFiniteError,
    UnsafeError,
    WorkerError,
)
from sherl_pipe.cache import fence as fences
from sherl_pipe.cache.fence import FENCE_NAME, admit, committing, shut
from sherl_pipe.pipeline import crew as crews
from sherl_pipe.pipeline.actor import Setup
from sherl_pipe.pipeline.crew import WorkerDiedError, Workers, lost_error
from sherl_pipe.stages.shards import Done, ShardJob

SETUP: Any = Setup("m", None, "float32", "cpu", 1, Path("cache"), identity(), "token", 0, 64)


class FakeEngine:
    """Calls are over in the order in which they were begun; some shards kill, some ways."""

    def __init__(self, kills: Callable[[int, int], bool], stuck: tuple[str, ...] = ()) -> None:
        self.kills, self.stuck = kills, stuck
        self.numbers, self.calls = itertools.count(), dict[int, tuple[int, str, Any]]()
        self.hired, self.dead = itertools.count(), set[int]()
        self.ran, self.together = list[int](), list[set[int]]()

    def hire(self, kind: type, cpus: int, gpus: int, calls: int) -> int:
        return next(self.hired)

    def call(self, worker: int, method: str, *arguments: Any) -> int:
        number = next(self.numbers)
        self.calls[number] = (worker, method, arguments[0] if arguments else None)
        return number

    def first_done(self, calls: Sequence[int], seconds: float) -> list[int]:
        over = [call for call in calls if self.calls[call][1] not in self.stuck]
        return over[:1]

    def result(self, call: int) -> Any:
        worker, method, job = self.calls[call]
        mine = {c for c, (w, m, _) in self.calls.items() if w == worker and m == "run"}
        if method == "run":
            self.together.append({self.calls[each][2].shard for each in mine})
        if worker in self.dead or (method != "place" and self._dies(method, job)):
            self.dead.add(worker)
            raise WorkerDiedError("it died")
        del self.calls[call]
        if method != "run":
            return None
        self.ran.append(job.shard)
        return Done(job.shard, {}, "here:1", 0.1)

    def _dies(self, method: str, job: Any) -> bool:
        shard = -1 if method == "load" else job.shard
        return self.kills(shard, self.ran.count(shard))

    def dismiss(self, worker: int) -> None:
        self.dead.add(worker)
        self.calls = {c: each for c, each in self.calls.items() if each[0] != worker}


def job_of(shard: int) -> ShardJob:
    rows = np.array([3], np.int64)
    return ShardJob("a/train", "hidden", shard, {}, (bytes([shard]) * 16,), rows)


def work(engine: FakeEngine, shards: int, *, size: int = 2, gpus: int = 0) -> Any:
    crew = Workers(engine, SETUP, size=size, cpus=1, gpus=gpus)
    told: list[int] = []
    lost = crew.work(range(shards), job_of, lambda answer: told.append(answer.shard))
    return sorted(told), [each.job.shard for each in lost]


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_shard_is_done_once(size: int, gpus: int) -> None:
    engine = FakeEngine(lambda shard, ran: False)
    assert work(engine, 9, size=size, gpus=gpus) == (list(range(9)), [])
    assert sorted(engine.ran) == list(range(9)) and next(engine.hired) == size


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_shard_that_kills_is_given_up_and_all_others_are_done(gpus: int) -> None:
    engine = FakeEngine(lambda shard, ran: shard == 4)
    told, lost = work(engine, 9, gpus=gpus)
    assert told == [0, 1, 2, 3, 5, 6, 7, 8] and lost == [4]
    # The first worker may have had another shard; those after it had this one alone.
    tries = [group for group in engine.together if 4 in group]
    assert next(engine.hired) == 2 + 3 and tries[-1] == tries[-2] == {4}


def test_a_shard_whose_worker_died_twice_is_done() -> None:
    deaths = iter([True, True])
    engine = FakeEngine(lambda shard, ran: shard == 1 and next(deaths, False))
    assert work(engine, 3) == ([0, 1, 2], [])


def test_two_shards_that_kill_blame_no_third() -> None:
    engine = FakeEngine(lambda shard, ran: shard in (2, 3))
    told, lost = work(engine, 8, size=2, gpus=1)
    assert told == [0, 1, 4, 5, 6, 7] and sorted(lost) == [2, 3]


def test_workers_that_never_get_ready_end_the_run() -> None:
    engine = FakeEngine(lambda shard, ran: shard == -1)
    with pytest.raises(WorkerError, match="died before its first shard.* it died") as caught:
        work(engine, 3)
    assert caught.value.exit_code == 10
    assert next(engine.hired) == 2 * crews.STRIKES


def test_a_full_cluster_is_not_waited_for_for_ever() -> None:
    engine = FakeEngine(lambda shard, ran: False, stuck=("place",))
    with (
        patch.object(crews, "PLACE_SECONDS", 0.05),
        pytest.raises(WorkerError, match="no worker found room"),
    ):
        work(engine, 3)


def test_what_a_worker_raises_is_raised() -> None:
    class Raises(FakeEngine):
        def result(self, call: int) -> Any:
            if self.calls[call][1] == "run":
                raise NonFiniteError("at tap 3")
            return super().result(call)

    with pytest.raises(NonFiniteError, match="at tap 3"):
        work(Raises(lambda shard, ran: False), 3)


def test_the_error_names_shards_and_examples() -> None:
    engine = FakeEngine(lambda shard, ran: shard == 1)
    crew = Workers(engine, SETUP, size=2, cpus=1, gpus=0)
    text = str(lost_error(crew.work(range(3), job_of, lambda _: None), Path("cache")))
    assert "a/train hidden, shard 1" in text and "01" * 16 in text and "02" * 16 not in text


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_split(tmp_path, [4, 4])
    return tmp_path


def test_workers_of_an_earlier_run_are_shut_out(root: Path) -> None:
    old = admit(root)
    with committing(root, old):
        pass
    new = admit(root)
    for token in (old, ""):
        with pytest.raises(LockedError, match="another run"), committing(root, token):
            pass
    with CacheWriter.open(root, identity()):  # a run without workers shuts them out too
        pass
    with pytest.raises(LockedError), committing(root, new):
        pass


def test_taking_over_waits_for_a_commit_under_way(root: Path) -> None:
    token, order = admit(root), []
    inside = threading.Event()

    def commit() -> None:
        with committing(root, token):
            inside.set()
            time.sleep(0.2)
            order.append("committed")

    thread = threading.Thread(target=commit)
    thread.start()
    inside.wait()
    shut(root)
    order.append("shut")
    thread.join()
    assert order == ["committed", "shut"]
    with (
        patch.object(fences, "WAIT_SECONDS", 0.1),
        pytest.raises(LockedError, match="worker of an earlier run"),
        committing(root, admit(root)),
    ):
        shut(root)


def test_a_cache_that_a_worker_does_not_see(tmp_path: Path, root: Path) -> None:
    with (
        pytest.raises(InputError, match="share under the same path"),
        committing(tmp_path / "x", ""),
    ):
        pass
    (root / FENCE_NAME).symlink_to(root / "zarr.json")
    for attempt in (lambda: admit(root), lambda: shut(root)):
        with pytest.raises(UnsafeError):
            attempt()
    assert FeatureCache.open(root).verify() == []


@pytest.fixture
def no_ray() -> Iterator[None]:
    """As where Ray is not installed."""
    mine = "sherl_pipe.pipeline.workers"
    hidden = {name: None for name in sys.modules if name == "ray" or name.startswith("ray.")}
    with patch.dict(sys.modules, {**hidden, "ray": None}):  # type: ignore[dict-item]
        saved = sys.modules.pop(mine, None)
        # `from sherl_pipe.pipeline import workers` would find it there too.
        vars(sherl_pipe.pipeline).pop("workers", None)
        yield
        sys.modules.pop(mine, None)
        vars(sherl_pipe.pipeline).pop("workers", None)
        if saved is not None:
            sys.modules[mine] = saved
            vars(sherl_pipe.pipeline)["workers"] = saved


def test_both_stages_run_without_ray(world: Path, no_ray: None) -> None:
    model = save_model(world / "model", "bert")
    common = ["--model", model, "--data", "data", "--cache", "c", "--device", "cpu"]
    for workers in ([], ["--workers", 1], ["--workers", "auto"]):
        done("extract", *common, *workers)
    done("tune", "--cache", "c", "--epochs", 1, "--out", "runs")
    for more in (["--workers", 2], ["--ray-address", "auto"]):
        refused(3, "Ray", "pip install", "--workers", argv=("extract", *common, *more))


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "many", ""])
def test_odd_numbers_of_workers(text: str) -> None:
    answer = sherl("extract", f"--workers={text}")
    assert answer.code == 2 and "--workers" in answer.err and "auto" in answer.err


@pytest.mark.parametrize("value", ["0", "true", "some", "2.5"])
def test_odd_numbers_in_a_file(world: Path, value: str) -> None:
    Path("run.yaml").write_text(f"extract:\n  workers: {value}\n")
    refused(3, "extract.workers", argv=("run", "run.yaml"))


@pytest.mark.parametrize(
    ("address", "code", "part"),
    [
        ("127.0.0.1:1", 10, "ray start --head"),
        ("nowhere", 3, "host:port"),
        ("ray://127.0.0.1:1", 3, "host:port"),
        ("127.0.0.1:99999", 10, "127.0.0.1:99999"),
    ],
)
def test_no_cluster_there(address: str, code: int, part: str) -> None:
    begun = time.monotonic()
    refused(code, address, part, argv=("extract", "--ray-address", address))
    assert time.monotonic() - begun < 60  # the first of them imports Ray


def test_a_cluster_is_divided() -> None:
    from sherl_pipe.pipeline.workers import Node, Share, share

    plain, gpus = [Node(8, 0), Node(5, 0)], [Node(16, 4), Node(0, 0), Node(8, 4)]
    assert share(plain, None, "auto") == Share(2, 5, 0)
    assert share(plain, 3, "cpu") == Share(3, 4, 0)
    assert share(plain, 13, "auto") == Share(13, 1, 0)
    assert share(gpus, None, "auto") == Share(8, 2, 1)
    assert share(gpus, 4, "cuda") == Share(4, 5, 1)
    assert share(gpus, 2, "cpu") == Share(2, 8, 0)
    for found, count, device, part in (
        (plain, 14, "auto", "at most 13"),
        (gpus, 9, "auto", "GPUs"),
        (plain, 1, "cuda", "--device cpu"),
        (gpus, 2, "cuda:1", "CUDA_VISIBLE_DEVICES"),
    ):
        with pytest.raises(InputError, match=part):
            share(found, count, device)
