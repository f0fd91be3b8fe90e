"""Added taps under faults: what was there is read all the time, and an addition resumes."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_tools import TAPS, encode, identity, ids_of
from sherl_pipe.cache import CacheWriter, FeatureCache, Identity, StreamSpec, errors
from sherl_pipe.cache.layout import assign
from sherl_pipe.cache.sealed import seal, unseal
from test_cache_faults import (  # noqa: F401 - a fixture acts where its name is
    DAMAGE,
    LENGTHS,
    SPEC,
    TRAIN,
    _no_disk_waits,
    at,
    forked,
    operations,
    refused,
    write,
)

WIDER = identity((0, 1, 2, 3, 4))
ADDED = f"{TRAIN}/hidden.1"
DECLARED = "_taps/1.json"


def extra(example: int, length: int, taps: int) -> np.ndarray[Any, Any]:
    """Values of added taps."""
    rng = np.random.default_rng(1000 + example)
    return rng.standard_normal((taps, length, 70)).astype(np.float32)


def add(path: Path, wanted: Identity = WIDER) -> Path:
    """What `extract` does where taps are missing, without the backbone."""
    with CacheWriter.open(path, wanted) as writer:
        for split, lengths in LENGTHS.items():
            layout = assign(np.asarray(lengths, np.int64), 9, seed=0)
            for part in writer.identity.parts("hidden")[1:]:
                stream = writer.stream(split, part, ids_of(len(lengths)), layout, {})
                for shard in stream.pending():
                    count = len(stream.spec.taps)
                    rows = [extra(int(e), lengths[e], count) for e in layout.members(shard)]
                    block = np.concatenate(rows, axis=1)
                    stream.commit(shard, *encode(writer.identity.codec, block))
                stream.finish()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "cache"
    write(path)
    return add(path)


def damaged(cache: FeatureCache, split: str) -> set[int]:
    """Examples whose added taps are refused; all that is given must be the truth."""
    found = set()
    for example, length in enumerate(LENGTHS[split]):
        try:
            states = cache.stream(split, "hidden").read_example(example, [3, 1])
            truth = extra(example, length, 2)[::-1]
            np.testing.assert_allclose(states, truth, atol=0.05)
        except errors.CorruptCacheError:
            found.add(example)
    return found


def old_taps_are_read(path: Path) -> FeatureCache:
    cache = FeatureCache.open(path)
    for split, lengths in LENGTHS.items():
        stream = cache.stream(split, "hidden")
        assert {*TAPS} <= {*stream.spec.taps}
        for example in range(len(lengths)):
            assert stream.read_example(example, TAPS).shape[0] == len(TAPS)
        stream.spec = replace(stream.spec, taps=TAPS)  # `refused` reads every tap that there is
        assert not refused(cache, split)
    return FeatureCache.open(path)


def killed_addition(path: Path, point: int) -> None:
    with operations(at(point, lambda: os.kill(os.getpid(), signal.SIGKILL))):
        add(path)


@pytest.mark.parametrize("step", [89, pytest.param(1, marks=pytest.mark.slow)])
def test_an_addition_killed_at_any_operation(tmp_path: Path, whole: Path, step: int) -> None:
    write(tmp_path / "old")
    for point in itertools.count(0, step):
        path = shutil.copytree(tmp_path / "old", tmp_path / str(point))
        before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
        code = os.waitstatus_to_exitcode(os.waitpid(forked(killed_addition, path, point), 0)[1])
        assert code in (0, -signal.SIGKILL)
        cache = old_taps_are_read(path)
        assert cache.verify() == []
        done = cache.specs()["hidden"].taps == (0, 1, 2, 3, 4)
        # Before the declaration nothing is missed, and behind the last manifest neither.
        declared = (path / DECLARED).exists()
        assert bool(cache.incomplete) == (declared and not done)
        add(path)
        assert {f: f.read_bytes() for f in before if f.name != "_lock"} == {
            f: data for f, data in before.items() if f.name != "_lock"
        }
        assert FeatureCache.open(path).content() == FeatureCache.open(whole).content()
        assert not [file for file in path.rglob("*") if file.name.startswith(".partial-")]
        shutil.rmtree(path)
        if code == 0:
            break
    assert point > 200


@pytest.mark.parametrize(
    "key",
    [f"{ADDED}/{k}" for k in ("values/c/0/0/0", "scales/c/0/1/0", "index/c/0/0", "ids/c/0/0")],
)
@pytest.mark.parametrize("damage", ["half", "hole", "deleted"])
def test_damage_of_added_taps(tmp_path: Path, whole: Path, key: str, damage: str) -> None:
    """It is found, named, and costs none of the old taps."""
    path = shutil.copytree(whole, tmp_path / "copy")
    good = (path / key).read_bytes()
    (path / key).unlink()
    if damage != "deleted":
        (path / key).write_bytes(DAMAGE[damage](good))
    cache = FeatureCache.open(path)
    assert any(str(path / key) in problem for problem in cache.verify())
    if "/c/0/0/0" in key or "/c/0/1/0" in key:
        shard = int(key.split("/")[-2])
        members = {*cache.stream(TRAIN, "hidden").layout.members(shard).tolist()}
        assert damaged(cache, TRAIN) == members
        old_taps_are_read(path)
    elif "index" in key:
        assert damaged(cache, TRAIN) == {0, 1, 2, 3}
    shutil.rmtree(path / ADDED)
    left = FeatureCache.open(path)
    assert left.incomplete == {ADDED: (0, 2)} and left.specs()["hidden"].taps == TAPS
    assert left.specs(["sst2/validation"])["hidden"].taps == (0, 1, 2, 3, 4)
    add(path)
    assert FeatureCache.open(path).content() == FeatureCache.open(whole).content()


@pytest.mark.parametrize("name", ["zarr.json", "manifest.json", "values/zarr.json", DECLARED])
def test_flipped_bits_of_metadata(tmp_path: Path, whole: Path, name: str) -> None:
    path = shutil.copytree(whole, tmp_path / "copy")
    file = path / (name if name == DECLARED else f"{ADDED}/{name}")
    good, rng = file.read_bytes(), random.Random(name)
    for place in rng.sample(range(len(good) * 8), 12):
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        file.write_bytes(bad)
        with pytest.raises(errors.SherlPipeError) as caught:
            FeatureCache.open(path)
        assert str(file) in str(caught.value), place
        assert caught.value.exit_code in (4, 8)


def test_lost_metadata(tmp_path: Path, whole: Path) -> None:
    path = shutil.copytree(whole, tmp_path / "copy")
    (path / ADDED / "manifest.json").unlink()
    with pytest.raises(errors.CorruptCacheError, match="holds data of a stream"):
        FeatureCache.open(path)
    path = shutil.copytree(whole, tmp_path / "other")
    (path / DECLARED).unlink()
    with pytest.raises(errors.CorruptCacheError, match=r"_taps/1\.json, which says which"):
        FeatureCache.open(path)
    add(path)  # says the same again
    assert FeatureCache.open(path).content() == FeatureCache.open(whole).content()
    more = identity((0, 1, 2, 3, 4, 5))
    add(path, more)
    assert FeatureCache.open(path).specs()["hidden"].taps == (0, 1, 2, 3, 4, 5)
    (path / DECLARED).unlink()
    with pytest.raises(errors.CorruptCacheError, match=r"called \*\.1 or later"):
        FeatureCache.open(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "field 'format': expected 2, found 1"),
        ({"number": 2}, "field 'number': expected 1"),
        ({"number": True}, "field 'number': expected int"),
        ({"identity": "x"}, "field 'identity'"),
        ({"streams": {"encoder": StreamSpec((1,), 5, 70).to_json()}}, "stream: expected"),
        ({"streams": {"hidden": StreamSpec((1, 2), 5, 70).to_json()}}, "does not have yet"),
        ({"streams": {"hidden": StreamSpec((3, 1), 5, 70).to_json()}}, "ascending taps"),
        ({"streams": {"hidden": StreamSpec((1, 1), 5, 70).to_json()}}, "ascending taps"),
        ({"streams": {"hidden": StreamSpec((1, 6), 5, 70).to_json()}}, "ascending taps"),
        ({"streams": {"hidden": StreamSpec((-1, 1), 5, 70).to_json()}}, "ascending taps"),
        ({"streams": {"hidden": StreamSpec((1, 3), 5, 71).to_json()}}, "ascending taps"),
        ({"streams": {"hidden": 3}}, "expected list, found None"),
    ],
)
def test_odd_declarations(
    tmp_path: Path, whole: Path, change: dict[str, Any], message: str
) -> None:
    path = shutil.copytree(whole, tmp_path / "copy")
    file = path / DECLARED
    file.write_bytes(seal({**unseal(file.read_bytes(), ""), **change}))
    with pytest.raises(errors.CorruptCacheError, match=message):
        FeatureCache.open(path)


def test_added_taps_of_other_examples(tmp_path: Path, whole: Path) -> None:
    """A whole stream of the same cache, under a name that is not its own."""
    path = shutil.copytree(whole, tmp_path / "copy")
    shutil.rmtree(path / ADDED)
    with CacheWriter.open(path, WIDER) as writer:
        layout = assign(np.asarray(LENGTHS[TRAIN], np.int64), 9, seed=0)
        stream = writer.stream(TRAIN, "hidden.1", ids_of(4, 50), layout, {})
        for shard in stream.pending():
            stream.commit(
                shard, *encode(SPEC.codec, np.zeros((2, layout.used_rows(shard), 70), "f4"))
            )
        stream.finish()
    with pytest.raises(errors.CorruptCacheError, match=r"of other examples \(data\)"):
        FeatureCache.open(path)


def test_names_of_added_taps(tmp_path: Path, whole: Path) -> None:
    path = shutil.copytree(whole, tmp_path / "copy")
    with CacheWriter.open(path, WIDER) as writer:
        assert writer.identity.parts("hidden") == ["hidden", "hidden.1"]
        layout = assign(np.asarray([1], np.int64), 9, seed=0)
        for name in ("hidden.2", "hidden.01", "hidden.0", "other.1"):
            with pytest.raises(errors.InputError, match="stream: expected one of"):
                writer.stream(TRAIN, name, ids_of(1), layout, {})
    assert not (path / "_taps/2.json").exists()
