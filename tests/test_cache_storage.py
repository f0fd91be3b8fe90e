"""Names that would share a folder or file, and file systems that lack what commits need."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from cache_tools import ids_of
from sherl_pipe.cache import CacheWriter, FeatureCache, errors
from sherl_pipe.cache.sealed import seal
from sherl_pipe.cache.store import LocalStore
from test_cache_faults import (  # noqa: F401 - a fixture acts where its name is
    HIDDEN,
    LAYOUT,
    SPEC,
    TRAIN,
    _no_disk_waits,
    labels,
    operations,
    refuse,
    write,
)


@pytest.mark.parametrize("inner", [HIDDEN, f"{HIDDEN}/receipts", f"{HIDDEN}/values/c/0"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_streams_do_not_share_a_folder(
    tmp_path: Path, inner: str, turned: bool, begun: bool
) -> None:
    first, second = (inner, TRAIN) if turned else (TRAIN, inner)
    write(tmp_path, first)
    before = FeatureCache.open(tmp_path).content()
    with CacheWriter.open(tmp_path, SPEC) as writer:
        if begun:
            shutil.rmtree(tmp_path / first / "hidden")
            writer.stream(first, "hidden", ids_of(4), LAYOUT, {})
        with pytest.raises(errors.InputError) as caught:
            writer.stream(second, "hidden", ids_of(4), LAYOUT, {})
    assert f"of split {first!r}" in str(caught.value) and "Rename" in str(caught.value)
    assert f"of split {second!r}" in str(caught.value)
    write(tmp_path, first)
    assert FeatureCache.open(tmp_path).content() == before


def test_a_table_has_a_file_of_its_own(tmp_path: Path) -> None:
    with CacheWriter.open(tmp_path, SPEC) as writer:
        for table in (replace(labels(1), task="a/b"), replace(labels(1), role="b/d")):
            with pytest.raises(errors.UnsafeError, match="name '[ab]/[bd]': expected letters"):
                writer.write_labels(table)
        with pytest.raises(errors.UnsafeError, match="stream name 'hidden-a/b'"):
            writer.stream("a", "hidden-a/b", ids_of(4), LAYOUT, {})
        with pytest.raises(errors.InputError, match="found 'encoder'"):
            writer.stream("a", "encoder", ids_of(4), LAYOUT, {})
    write(tmp_path, TRAIN)
    nested = tmp_path / "_labels/a/b/d.json"
    nested.parent.mkdir(parents=True)
    nested.write_bytes(seal({**labels(1).to_json(), "task": "a/b", "role": "d"}))
    with pytest.raises(errors.UnsafeError, match=f"{nested}: task name 'a/b': expected letters"):
        _ = FeatureCache.open(tmp_path).tasks


@pytest.mark.parametrize("name", ["c", "zarr.json"])
def test_names_that_mean_something_in_arrays_only(tmp_path: Path, name: str) -> None:
    table = replace(labels(1, 2), task=name, role=name)
    with CacheWriter.open(tmp_path, SPEC) as writer:
        writer.write_labels(table)
    if name == "c":
        write(tmp_path, f"{name}/{name}")
    cache = FeatureCache.open(tmp_path)
    assert cache.tasks == {name: {name: table}} and cache.verify() == []
    assert cache.splits == (["c/c"] if name == "c" else [])


def test_labels_that_are_none_are_not_written(tmp_path: Path) -> None:
    table = replace(labels(1, float("nan")))
    ranks = replace(table, labels=(0, 2), spec=replace(table.spec, kind="classification"))
    with CacheWriter.open(tmp_path, SPEC) as writer:
        for bad, words in (
            (table, "row 2, example .*: expected a finite number, found nan"),
            (ranks, "row 1, example .*: expected a class from 0 to -1, found 0"),
            (replace(table, ids=table.ids[:1]), "1 ids and 2 labels"),
        ):
            with pytest.raises(errors.InputError, match=f"labels of size/train: {words}"):
                writer.write_labels(bad)
    assert not (tmp_path / "_labels").exists()


Lack = AbstractContextManager[object]


def no_links(_: int, name: str) -> object:
    return name == "link" and refuse(errno.EPERM, Path())


def no_folder_sync(handle: int) -> None:
    if stat.S_ISDIR(os.fstat(handle).st_mode):
        refuse(errno.EINVAL, Path())


def no_locks(*_: object) -> None:
    refuse(errno.ENOLCK, Path())


@pytest.mark.parametrize(
    ("feature", "lack"),
    [
        ("hard links", lambda: operations(no_links)),
        ("sync of folders", lambda: patch.object(os, "fsync", no_folder_sync)),
        ("locks (flock)", lambda: patch.object(fcntl, "flock", no_locks)),
    ],
)
def test_file_system_without(tmp_path: Path, feature: str, lack: Callable[[], Lack]) -> None:
    with pytest.raises(errors.StorageError) as caught, lack():
        write(tmp_path)
    text = caught.value.args[1]
    assert f"the file system there offers no {feature}" in text and str(tmp_path) in text
    assert "Choose a folder on another one" in text and "permission" not in text.split(")")[-1]
    assert caught.value.exit_code == 7


def test_other_refusals_of_a_link_are_not_taken_for_it(tmp_path: Path) -> None:
    with (
        pytest.raises(errors.StorageError, match="Free space or fix permissions"),
        operations(lambda _, name: name == "link" and refuse(errno.ENOSPC, tmp_path)),
    ):
        write(tmp_path)


@pytest.mark.parametrize("name", ["stat", "statvfs"])
def test_free_space_that_nobody_may_ask_for(tmp_path: Path, name: str) -> None:
    with (
        pytest.raises(errors.StorageError) as caught,
        operations(lambda _, n: n == name and refuse(errno.EACCES, tmp_path), name),
    ):
        LocalStore(tmp_path / "cache").free_bytes()
    assert str(tmp_path / "cache") in str(caught.value) and caught.value.errno == errno.EACCES
