"""The cache under faults: killed at any operation, refusing storage, damaged files."""

from __future__ import annotations

import errno
import io
import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from cache_tools import encode, identity, ids_of, values_of
from sherl_pipe.cache import CacheWriter, FeatureCache, LabelTable, TaskSpec, errors
from sherl_pipe.cache.fence import FENCE_NAME, admit, committing, shut
from sherl_pipe.cache.layout import assign
from sherl_pipe.cache.store import LocalStore

TRAIN, HIDDEN = "sst2/train", "sst2/train/hidden"
LENGTHS = {"sst2/validation": [2, 3], TRAIN: [4, 2, 5, 7]}
ALL = {("sst2/validation", 0), (TRAIN, 0), (TRAIN, 1)}
LAYOUT = assign(np.asarray(LENGTHS[TRAIN]), 9, seed=0)
SPEC = identity()


@pytest.fixture(autouse=True)
def _no_disk_waits() -> Iterator[None]:
    # A killed process loses nothing that it wrote, synced or not; the waits took all the time.
    with patch.object(os, "fsync"):
        yield


def write(path: Path, *splits: str, first: int = 0, pause: float = 0) -> set[tuple[str, int]]:
    """Write splits (all by default); the (split, shard) pairs that this call committed."""
    done = set()
    with CacheWriter.open(path, SPEC) as writer:
        for split in splits or LENGTHS:
            lengths = LENGTHS.get(split, LENGTHS[TRAIN])  # any other split is like it
            layout = assign(np.asarray(lengths, np.int64), 9, seed=0)
            stream = writer.stream(split, "hidden", ids_of(len(lengths), first), layout, {})
            for shard in stream.pending():
                rows = [values_of(int(e) + first, lengths[e]) for e in layout.members(shard)]
                stream.commit(shard, *encode(SPEC.codec, np.concatenate(rows, axis=1)))
                done.add((split, shard))
                time.sleep(pause)
            stream.finish()
    return done


def labels(*values: float) -> LabelTable:
    ids = tuple(ids_of(len(values)))
    return LabelTable("size", "train", TaskSpec("regression", (), (), ()), ids, values)


TABLES = [labels(2.5), labels(1.5, 1e-05)]


def write_whole(path: Path) -> Path:
    """An uninterrupted cache with labels, replaced once."""
    write(path)
    with CacheWriter.open(path, SPEC) as writer:
        for table in TABLES:
            writer.write_labels(table)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole(tmp_path_factory.mktemp("whole") / "cache")


def refused(cache: FeatureCache, split: str) -> set[int]:
    """Examples that a split does not give; all that it gives must be the truth."""
    stream, found = cache.stream(split, "hidden"), set()
    for example, length in enumerate(LENGTHS.get(split, LENGTHS[TRAIN])):
        truth = values_of(example, length)
        try:
            np.testing.assert_allclose(stream.read_example(example), truth, atol=0.05)
        except errors.CorruptCacheError:
            found.add(example)
    return found


def complaint(path: Path) -> errors.SherlPipeError | None:
    """What opening, checking or reading everything raises; no wrong value may come back."""
    try:
        cache = FeatureCache.open(path)
        lost = [split for split in cache.splits if refused(cache, split)]
        if problems := cache.verify():
            return errors.CorruptCacheError("\n".join(problems))
        assert cache.splits == sorted(LENGTHS) and not lost
        assert cache.tasks == {"size": {"train": TABLES[-1]}}
        for split, lengths in LENGTHS.items():
            assert [*map(bytes, cache.stream(split, "hidden").ids)] == ids_of(len(lengths))
    except errors.SherlPipeError as error:
        return error
    return None


Strike = Callable[[int, str], object]


@contextmanager
def operations(strike: Strike, *more: str) -> Iterator[None]:
    """`strike(number, name)` runs before every file-system operation, and before `more` of os.

    A write is two operations, so that it can be torn.
    """
    numbers = itertools.count()

    def hook(name: str) -> Callable[..., Any]:
        real = getattr(os, name)
        return lambda *args, **named: (strike(next(numbers), name), real(*args, **named))[1]

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            data = data.encode() if isinstance(data, str) else data
            for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                strike(next(numbers), "write")
                super().write(part)
            return len(data)

    names = ("open", "fsync", "link", "unlink", "rename", "mkdir", "rmdir", *more)
    hooks: dict[str, Any] = {name: hook(name) for name in names}
    hooks["fdopen"] = lambda handle, mode, **_: File(handle, mode.replace("b", ""))
    with patch.multiple(os, **hooks):
        yield


def forked(action: Callable[..., object], *args: Any) -> int:
    """The pid of a child that runs `action`. No exec: imports would take most of the time."""
    pid = os.fork()
    if pid == 0:
        try:
            action(*args)
            os._exit(0)
        finally:  # nothing of the child may return into pytest
            os._exit(1)
    return pid


def committed(path: Path) -> dict[tuple[str, int], list[tuple[int, int]]]:
    """Inode and time of the files of every committed shard."""
    found = {}
    for split, shard in ALL:
        base = path / split / "hidden"
        if (base / "manifest.json").exists() or (base / f"receipts/{shard}.json").exists():
            stats = [(base / name / f"c/0/{shard}/0").stat() for name in ("values", "scales")]
            found[split, shard] = [(stat.st_ino, stat.st_mtime_ns) for stat in stats]
    return found


def assert_told(path: Path) -> None:
    """A reader of a torn cache gets the committed splits and is told how far the others are."""
    done = committed(path)
    ready = [s for s in sorted(LENGTHS) if (path / s / "hidden/manifest.json").exists()]
    torn = {
        f"{split}/hidden": tuple(sum(split == s for s, _ in some) for some in (done, ALL))
        for split in LENGTHS
        if split not in ready and (path / split / "hidden/plan.json").exists()
    }
    try:
        cache = FeatureCache.open(path)
    except errors.IncompleteSplitError as error:
        assert not ready and any(f": {k} of {n} shards" in str(error) for k, n in torn.values())
    except errors.InputError as error:
        assert "is not a cache" in str(error) and not (path / "zarr.json").exists()
    else:
        assert (cache.splits, cache.incomplete) == (ready, torn) and len(ready) >= len(torn)
        assert not any(refused(cache, split) for split in ready)
        assert not cache.tasks or cache.tasks["size"]["train"] in TABLES


def assert_resumes(path: Path, whole: Path) -> None:
    """The same write does the rest, leaves what was committed, and ends in the same cache."""
    before = committed(path)
    assert write(path) == ALL - before.keys()
    assert {shard: committed(path)[shard] for shard in before} == before
    assert not [file for file in path.rglob("*") if file.name.startswith(".partial-")]
    cache = FeatureCache.open(path)
    assert cache.content() == FeatureCache.open(whole).content() and cache.verify() == []


def at(point: int, action: Callable[[], object], lasting: bool = False) -> Strike:
    """`action` at one operation, or at it and at all that follow."""
    return lambda n, _: action() if n == point or (lasting and n > point) else None


def killed_write(path: Path, point: int) -> None:
    with operations(at(point, lambda: os.kill(os.getpid(), signal.SIGKILL))):
        write_whole(path)


@pytest.mark.parametrize("step", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_operation(tmp_path: Path, whole: Path, step: int) -> None:
    """Just before operation n + 1 is just after operation n; the last point is behind them all."""
    for point in itertools.count(0, step):
        path = tmp_path / str(point)
        code = os.waitstatus_to_exitcode(os.waitpid(forked(killed_write, path, point), 0)[1])
        assert code in (0, -signal.SIGKILL)
        assert_told(path)
        assert_resumes(path, whole)
        shutil.rmtree(path)
        if code == 0:
            break
    assert point > 300


def refuse(code: int, path: Path) -> object:
    raise OSError(code, os.strerror(code), str(path))


@pytest.mark.parametrize("step", [53, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("lasting", [False, True])
def test_storage_refuses(tmp_path: Path, whole: Path, lasting: bool, step: int) -> None:
    for point in itertools.count(0, max(step, 7 if lasting else 1)):
        path = tmp_path / str(point)
        code = (errno.ENOSPC, errno.EIO, errno.EACCES)[point % 3]
        strike = at(point, partial(refuse, code, path), lasting)
        try:
            with operations(strike, "stat", "scandir"):
                write(path)
        except errors.StorageError as error:
            assert (error.errno, error.exit_code) == (code, 7) and str(path) in error.args[1]
        else:
            break
        assert_resumes(path, whole)
        shutil.rmtree(path)
    assert point > 600


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_storage_refuses_to_change_who_may_commit(tmp_path: Path, code: int) -> None:
    for change, count in ((admit, 4), (shut, 4)):
        for point in itertools.count():
            try:
                with operations(at(point, partial(refuse, code, tmp_path))):
                    change(tmp_path)
            except errors.StorageError as error:
                assert error.errno == code and FENCE_NAME in error.args[1]
            else:
                break
        assert point >= count
    with pytest.raises(errors.LockedError), committing(tmp_path, "any"):
        pass


def test_a_file_where_a_folder_belongs(tmp_path: Path) -> None:
    with CacheWriter.open(tmp_path, SPEC):
        (tmp_path / "sst2").write_text("mine")
    with pytest.raises(errors.UnsafeError, match="sst2.*where a folder of the cache belongs"):
        write(tmp_path)
    with pytest.raises(errors.UnsafeError, match="sst2: a file lies where a folder"):
        LocalStore(tmp_path).create("sst2/other", b"")
    assert (tmp_path / "sst2").read_text() == "mine"


FILES = [f"{HIDDEN}/{name}" for name in ("values/c/0/0/0", "scales/c/0/1/0", "ids/c/0/0")]
FILES += [f"{HIDDEN}/{name}" for name in ("index/c/0/0", "values/zarr.json", "zarr.json")]
ALL_FILES = [*FILES, f"{HIDDEN}/manifest.json", "sst2/zarr.json", "_labels/size/train.json"]


@pytest.mark.parametrize("key", [*ALL_FILES, "zarr.json"])
@pytest.mark.parametrize("flips", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_flipped_bit(tmp_path: Path, key: str, flips: int) -> None:
    copy, rng = write_whole(tmp_path), random.Random(key)
    assert complaint(copy) is None
    file = copy / key
    good = file.read_bytes()
    places = [good.find(b"e-05") * 8 + 5] if b"e-05" in good else []  # 1E-05 is the same number
    for place in places + rng.sample(range(len(good) * 8), min(flips, len(good))):
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        file.write_bytes(bad)
        error = complaint(copy)
        assert error is not None and str(file) in str(error), place
        if key.endswith(".json") and key[0] != "_":  # metadata is checked before anything is read
            pytest.raises(errors.SherlPipeError, FeatureCache.open, copy)
        # Whether an odd root is damaged or foreign nobody can tell before it is believed.
        assert isinstance(error, errors.CorruptCacheError) or key == "zarr.json", place


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "0 bytes": lambda _: b"",
    "1 byte": lambda data: data[:1],
    "half": lambda data: data[: len(data) // 2],
    "n - 1": lambda data: data[:-1],
    "appended": lambda data: data + b"\0",
    "hole": lambda data: data[:40] + bytes(40) + data[80:],
}


@pytest.mark.parametrize("name", ["values", "scales"])
@pytest.mark.parametrize("damage", [*DAMAGE, "deleted", "swapped", "foreign"])
def test_damaged_shard(tmp_path: Path, name: str, damage: str) -> None:
    copy, other = write_whole(tmp_path / "copy"), tmp_path / "foreign"
    write(other, TRAIN, first=50)
    files = [copy / f"{HIDDEN}/{name}/c/0/{shard}/0" for shard in (0, 1)]
    good = [file.read_bytes() for file in files]
    foreign = (other / files[0].relative_to(copy)).read_bytes()
    # Values of equal lengths: nothing but a hash can tell these.
    assert name == "scales" or len(good[0]) == len(good[1]) == len(foreign)
    bad = files if damage == "swapped" else files[:1]
    if damage == "deleted":
        files[0].unlink()
    else:
        data = {"swapped": good[1], "foreign": foreign}
        files[0].write_bytes(data[damage] if damage in data else DAMAGE[damage](good[0]))
    if damage == "swapped":
        files[1].write_bytes(good[0])
    cache = FeatureCache.open(copy)
    assert all(any(str(f) in problem for problem in cache.verify()) for f in bad)
    stream = cache.stream(TRAIN, "hidden")
    for shard, file in enumerate(bad):
        with pytest.raises(errors.CorruptCacheError, match=f"shard {shard}") as caught:
            stream.read_shard(shard)
        assert str(file) in str(caught.value) and caught.value.exit_code == 4
    assert refused(cache, TRAIN) == set(np.flatnonzero(stream.layout.index[:, 0] < len(bad)))
