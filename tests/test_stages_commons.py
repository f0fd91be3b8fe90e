"""Coded rows that processes share: read once, checked, and gone when nobody uses them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sherl_pipe.cache import UnsafeError
from sherl_pipe.stages import commons
from sherl_pipe.stages.commons import Commons
from sherl_pipe.stages.shelf import Form, Room, Shelf, arrivals
from test_stages_shelf import CPU, FORMS, SHARDS, fill, holds
from tune_tools import World, make_world, run, weights

ALL = [[shard] for shard in range(SHARDS)]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    home = tmp_path / "memory"
    home.mkdir()
    monkeypatch.setattr(commons, "PLACES", (home,))
    yield home / f"{commons.FOLDER}-{os.getuid()}"


def never(shard: int, _: Room) -> None:
    raise AssertionError(f"shard {shard} was read again")


def bring_all(shared: Commons, read: object = fill) -> Shelf:
    kept = Shelf(FORMS, CPU, commons=shared)
    for _ in arrivals(kept, ALL, read, 4):  # type: ignore[arg-type]
        pass
    return kept


def test_one_reads_and_all_have(place: Path) -> None:
    first, second = Commons("key", FORMS), Commons("key", FORMS)
    assert all(holds(bring_all(first), shard) for shard in range(SHARDS))
    kept = bring_all(second, never)
    assert all(holds(kept, shard) for shard in range(SHARDS))
    assert not second._rows.flags.writeable
    first.close()
    assert all(holds(kept, shard) for shard in range(SHARDS))
    second.close()
    assert list(place.iterdir()) == []


def test_a_shard_is_read_by_one_while_others_wait() -> None:
    reads: list[int] = []

    def slow(shard: int, room: Room) -> None:
        reads.append(shard)
        fill(shard, room)

    users = [Commons("key", FORMS) for _ in range(4)]
    threads = [threading.Thread(target=bring_all, args=(user, slow)) for user in users]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(reads) == list(range(SHARDS))


def test_a_changed_byte_is_read_again(place: Path) -> None:
    shared = Commons("key", FORMS)
    bring_all(shared)
    with (place / "key" / "rows").open("r+b") as file:
        file.write(b"\xff")
    other, reads = Commons("key", FORMS), list[int]()

    def note(shard: int, room: Room) -> None:
        reads.append(shard)
        fill(shard, room)

    assert all(holds(bring_all(other, note), shard) for shard in range(SHARDS))
    assert len(reads) == 1


def test_what_failed_is_not_there() -> None:
    def fail(_: int, __: Room) -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        bring_all(Commons("key", FORMS), fail)
    assert holds(bring_all(Commons("key", FORMS)), 3)


def test_other_rows_have_other_memory(place: Path) -> None:
    one, two = Commons("one", FORMS), Commons("two", FORMS)
    assert {one.folder, two.folder} == set(place.iterdir())


def test_without_room_each_has_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    shared = Commons("key", FORMS)
    assert shared.folder is None
    assert holds(bring_all(shared), 3)


def test_a_folder_of_somebody_else_is_refused(place: Path) -> None:
    place.mkdir(mode=0o700)
    place.chmod(0o777)
    with pytest.raises(UnsafeError, match="by others"):
        Commons("key", FORMS)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from sherl_pipe.stages import commons
commons.PLACES = (Path(sys.argv[1]),)
from test_stages_commons import FORMS, fill
shared = commons.Commons("key", FORMS)
shared.bring(0, fill)
def half(shard, room):
    fill(shard, room)
    os.kill(os.getpid(), signal.SIGKILL)
shared.bring(1, half)
"""


@pytest.mark.slow
def test_what_a_killed_process_left_is_taken_away(place: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(place.parent), str(Path(__file__).parent)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert [each.name for each in place.iterdir()] == ["key"]
    Commons("other", FORMS).close()
    assert list(place.iterdir()) == []


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("shared"), "bert")


def test_tunings_are_the_same_from_shared_rows(
    world: World, tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    alone = run(world.tuner(tmp_path / "alone", task="kind"))
    tuner = world.tuner(tmp_path / "shared", task="kind", shared=True)
    assert "shared" in tuner.train.summary
    assert run(tuner).metrics == alone.metrics
    assert weights(tmp_path / "alone") == weights(tmp_path / "shared")
    assert len(list(place.iterdir())) == 2  # training and held-out rows
    del tuner


def test_forms_without_rows_are_fine() -> None:
    forms = {"a": Form(1, 4, 0, np.zeros(3, np.int64))}
    kept = Shelf(forms, torch.device("cpu"), commons=Commons("none", forms))
    codes, scales, _ = kept.rows("a", np.zeros(0, np.int64), CPU)
    assert codes.shape == (1, 0, 4) and scales is None
