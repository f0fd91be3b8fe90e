"""What was committed and is gone is missed, and every message leads back to the same cache."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from cache_tools import ids_of, write_split
from sherl_pipe.cache import CacheWriter, FeatureCache, errors, manifest
from sherl_pipe.cache.layout import Layout, assign
from sherl_pipe.cache.store import LocalStore
from test_cache_faults import (  # noqa: F401 - a fixture acts where its name is
    ALL_FILES,
    FILES,
    HIDDEN,
    LENGTHS,
    SPEC,
    TRAIN,
    _no_disk_waits,
    write,
    write_whole,
)

PLAN, MANIFEST = f"{HIDDEN}/plan.json", f"{HIDDEN}/manifest.json"


def truth(tmp_path: Path) -> list[tuple[str, str]]:
    return FeatureCache.open(write_whole(tmp_path / "truth")).content()


@pytest.mark.parametrize("left", ["all", "values/c/0/1/0", "ids/c/0/0", "index/c/0/0"])
def test_deleted_manifest_is_missed(tmp_path: Path, left: str) -> None:
    """Also where more went with it; and either remedy leads back."""
    path = write_whole(tmp_path / "cache")
    (path / MANIFEST).unlink()
    for file in (path / HIDDEN).rglob("*"):
        if left != "all" and file.is_file() and file != path / HIDDEN / left:
            file.unlink()
    with pytest.raises(errors.CorruptCacheError) as caught:
        FeatureCache.open(path)
    assert f"{path / HIDDEN} holds data of a stream: expected its manifest.json or" in str(
        caught.value
    )
    assert f"delete {path / HIDDEN} and extract again" in str(caught.value)
    again = shutil.copytree(path, tmp_path / "again")
    shutil.rmtree(path / HIDDEN)
    assert FeatureCache.open(path).splits == ["sst2/validation"]
    assert write(path) == write(again) == {(TRAIN, 0), (TRAIN, 1)}
    assert (
        truth(tmp_path) == FeatureCache.open(path).content() == FeatureCache.open(again).content()
    )


def test_receipt_alone_is_missed(tmp_path: Path) -> None:
    write_split(tmp_path, [9, 9], stop_after=1)
    for name in ("plan.json", "values", "scales", "ids", "index"):
        file = tmp_path / HIDDEN / name
        file.unlink() if file.is_file() else shutil.rmtree(file)
    with pytest.raises(errors.CorruptCacheError, match="found neither"):
        FeatureCache.open(tmp_path)


def test_no_false_alarm(tmp_path: Path) -> None:
    """Arrays of others, a split whose parts are called like ours, and what deleting one leaves."""
    write(tmp_path, TRAIN, "a/hidden/values/c/0/1", "receipts/b")
    shutil.copytree(tmp_path / HIDDEN, tmp_path / "mine/other")
    (tmp_path / "mine/other/manifest.json").unlink()
    shutil.rmtree(tmp_path / "a/hidden/values/c/0/1")
    for name in ("mine/plan.json", "receipts/manifest.json"):
        (tmp_path / name).write_text("of somebody else")
    assert FeatureCache.open(tmp_path).splits == ["receipts/b", TRAIN]


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("unseen", [("plan.json", "manifest.json"), ("manifest.json",)])
def test_no_alarm_while_a_writer_is_at_work(
    tmp_path: Path, finished: bool, unseen: tuple[str, ...]
) -> None:
    """A listing takes time: it may show a stream's data, and have missed both of its files."""
    write_split(tmp_path, [9, 9], stop_after=None if finished else 1)
    listing = LocalStore.list

    def late(store: LocalStore, prefix: str = "") -> Iterator[str]:
        return (key for key in listing(store, prefix) if not key.endswith(unseen))

    with patch.object(LocalStore, "list", late):
        if finished:
            assert FeatureCache.open(tmp_path).splits == [TRAIN]
        else:
            with pytest.raises(errors.IncompleteSplitError, match="1 of 2"):
                FeatureCache.open(tmp_path)


def test_the_plan_is_there_before_all_else(tmp_path: Path) -> None:
    """It is what tells a stream that was begun from one whose manifest is gone."""
    keys: list[str] = []
    create = LocalStore.create

    def noted(store: LocalStore, key: str, data: bytes) -> None:
        keys.append(key)
        create(store, key, data)

    with patch.object(LocalStore, "create", noted):
        write(tmp_path, TRAIN)
    assert keys[:2] == ["zarr.json", PLAN] and keys[-1] == MANIFEST


def test_receipts_without_their_plan_are_not_believed(tmp_path: Path) -> None:
    """A folder that was half deleted may have held other data."""
    other, path = tmp_path / "other", tmp_path / "cache"
    write_split(path, [9, 9], stop_after=1)
    (path / PLAN).unlink()
    write_split(other, [9, 9], first_id=7)
    assert write_split(path, [9, 9], first_id=7) == [0, 1]
    assert FeatureCache.open(path).content() == FeatureCache.open(other).content()


def test_damaged_receipt(tmp_path: Path) -> None:
    write_split(tmp_path, [9, 9, 9], stop_after=2)
    file = tmp_path / HIDDEN / "receipts/0.json"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(errors.CorruptCacheError) as caught:
        write_split(tmp_path, [9, 9, 9])
    assert str(file) in str(caught.value)
    assert "Delete it and run the same command again" in str(caught.value)
    file.unlink()
    assert write_split(tmp_path, [9, 9, 9]) == [0, 2]


def test_damaged_plan(tmp_path: Path) -> None:
    write_split(tmp_path, [9, 9, 9], stop_after=2)
    (tmp_path / PLAN).write_bytes(b"{}")
    for use in (lambda: FeatureCache.open(tmp_path), lambda: write_split(tmp_path, [9, 9, 9])):
        with pytest.raises(errors.CorruptCacheError, match=f"delete {tmp_path / HIDDEN} and"):
            use()
    shutil.rmtree(tmp_path / HIDDEN)
    assert write_split(tmp_path, [9, 9, 9]) == [0, 1, 2]


def test_nothing_is_finished_before_every_shard_is_committed(tmp_path: Path) -> None:
    write_split(tmp_path, [9, 9, 9], stop_after=2)
    (tmp_path / HIDDEN / "receipts/0.json").unlink()
    layout = assign(np.array([9, 9, 9]), 9, seed=0)
    with CacheWriter.open(tmp_path, SPEC) as writer:
        stream = writer.stream(TRAIN, "hidden", ids_of(3), layout, {})
        with pytest.raises(errors.IncompleteSplitError) as caught:
            stream.finish()
    assert f"{tmp_path / HIDDEN}: 2 of 3 shards are not committed, the first is 0" in str(
        caught.value
    )
    assert not (tmp_path / MANIFEST).exists()


def test_what_a_reader_would_refuse_is_not_committed(tmp_path: Path) -> None:
    with (
        patch.multiple(manifest, PLAIN_BYTES=0, MAX_RATIO=1),
        pytest.raises(errors.UnsafeError, match="bytes of a shard .* smaller --shard-mib"),
    ):
        write(tmp_path, TRAIN)
    with pytest.raises(errors.IncompleteSplitError, match="2 of 2"):
        FeatureCache.open(tmp_path)


COMMITTED = [key for key in ALL_FILES if key not in (MANIFEST, "_labels/size/train.json")]


@pytest.mark.parametrize("key", COMMITTED)
@pytest.mark.parametrize("found", ["no file", "n - 1 bytes"])
def test_damage_in_a_finished_stream(tmp_path: Path, key: str, found: str) -> None:
    """Extracting again is the first thing that many try."""
    path = write_whole(tmp_path / "cache")
    file = path / key
    data = file.read_bytes()
    file.unlink() if found == "no file" else file.write_bytes(data[:-1])
    with pytest.raises(errors.CorruptCacheError) as caught:
        write(path)
    text = str(caught.value)
    size = found.replace("n - 1", str(len(data) - 1))
    assert f"{file} is not the file that was committed: expected {len(data)} bytes" in text
    assert f"found {size}. Run `sherl-pipe verify --cache {path}`" in text
    # What several streams share goes with all of them.
    folder = path / HIDDEN if key.startswith(HIDDEN) else file.parent
    assert f"delete {folder} and extract again" in text
    shutil.rmtree(folder)
    assert (TRAIN, 0) in write(path)
    assert FeatureCache.open(path).content() == truth(tmp_path)


def test_a_finished_stream_is_not_read_again(tmp_path: Path) -> None:
    write_whole(tmp_path)
    read, keys = LocalStore.read, []

    def noted(store: LocalStore, key: str, *how: Any, **more: Any) -> bytes:
        keys.append(key)
        return read(store, key, *how, **more)

    with patch.object(LocalStore, "read", noted):
        assert write(tmp_path) == set()
        assert not [key for key in keys if "/c/" in key]
        keys.clear()
        FeatureCache.open(tmp_path)
    assert keys.count("zarr.json") == 1  # once for all streams


def test_every_manifest_vouches_for_the_root(tmp_path: Path) -> None:
    """The bytes that the identity is from are those that are compared, for each stream."""
    write_whole(tmp_path)
    file = tmp_path / "zarr.json"
    file.write_bytes(file.read_bytes().replace(b'"name": "tiny"', b'"name": "tidy"'))
    with pytest.raises(errors.CorruptCacheError, match=f"{file} .metadata. is not the file"):
        FeatureCache.open(tmp_path)
    for split in LENGTHS:
        shutil.rmtree(tmp_path / split)
    write(tmp_path, "sst2/validation")  # of the root as it is now
    assert FeatureCache.open(tmp_path).verify() == []


def test_what_differs_from_the_plan_is_written_anew(tmp_path: Path) -> None:
    """Of a stream that is not finished; a shared group's metadata only where it is missing."""
    write_split(tmp_path, [9, 9], stop_after=1)
    own = [tmp_path / key for key in FILES if "/c/0/0/0" not in key and "/c/0/1/0" not in key]
    good = {file: file.read_bytes() for file in own}
    for file in own:
        file.write_bytes(b"{}")
    shared, missing = tmp_path / "sst2/zarr.json", tmp_path / TRAIN / "zarr.json"
    other = shared.read_bytes() + b"\n"
    shared.write_bytes(other)
    missing.unlink()
    write_split(tmp_path, [9, 9])
    assert {file: file.read_bytes() for file in own} == good and len(own) == 4
    assert shared.read_bytes() == other and missing.exists()
    assert FeatureCache.open(tmp_path).verify() == []


@pytest.mark.parametrize("rows", [[[0, 0, 4], [0, 5, 2]], [[0, 0, 4], [0, 3, 2]]])
def test_layout_with_gaps_or_overlaps_is_not_begun(tmp_path: Path, rows: list[list[int]]) -> None:
    layout = Layout(9, 1, np.array(rows, np.int64))
    with (
        CacheWriter.open(tmp_path, SPEC) as writer,
        pytest.raises(errors.CorruptCacheError, match="gaps, overlaps"),
    ):
        writer.stream(TRAIN, "hidden", ids_of(2), layout, {})
    assert not (tmp_path / "sst2").exists()
