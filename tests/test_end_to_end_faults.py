"""Faults seen from outside: rival writers, readers, hostile names and links, killed commands."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import pytest
from cache_tools import ids_of, write_split
from cli_tools import done, refused, sherl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_tools import save_model, write_data
from sherl_pipe.cache import CacheWriter, FeatureCache, errors
from sherl_pipe.cache.names import MAX_NAME_BYTES
from sherl_pipe.cache.sealed import seal, unseal
from sherl_pipe.cache.store import LocalStore
from test_cache_faults import (  # noqa: F401 - a fixture acts where its name is
    FILES,
    HIDDEN,
    LAYOUT,
    SPEC,
    TRAIN,
    _no_disk_waits,
    assert_told,
    complaint,
    forked,
    labels,
    operations,
    refuse,
    write,
    write_whole,
)
from test_cache_faults import refused as lost


def hold(path: Path, ready: int) -> None:
    with CacheWriter.open(path, SPEC):
        os.write(ready, b"x")
        signal.pause()


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    for _ in range(20):
        wait, ready = os.pipe()
        pid = forked(hold, tmp_path, ready)
        os.close(ready)
        assert os.read(wait, 1) == b"x"
        os.close(wait)
        try:
            with pytest.raises(errors.LockedError) as caught, CacheWriter.open(tmp_path, SPEC):
                pass
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert f"process {pid} on {socket.gethostname()}" in str(caught.value)
        assert caught.value.exit_code == 6
        with CacheWriter.open(tmp_path, SPEC):  # a dead holder holds nothing
            pass


def test_reader_sees_committed_splits_only(tmp_path: Path) -> None:
    names = [f"task{number}/train" for number in range(5)]
    pid = forked(lambda: write(tmp_path, *names, pause=0.03))
    ended, seen = 0, set[int]()
    while not ended:
        ended, status = os.waitpid(pid, os.WNOHANG)
        try:
            cache = FeatureCache.open(tmp_path)
        except errors.InputError:
            assert not any(seen)  # no cache yet, or nothing of it is finished
            continue
        assert cache.splits == names[: len(cache.splits)]
        assert not any(lost(cache, split) for split in cache.splits)
        assert cache.verify() == []
        seen.add(len(cache.splits))
    assert status == 0 and cache.splits == names and len(seen) > 3


def test_split_that_is_finished_while_a_reader_opens(tmp_path: Path) -> None:
    """Its plan is listed, and gone when it is read."""
    write_split(tmp_path, [4, 4, 4], stop_after=1)
    assert_told(tmp_path)
    listing = LocalStore.list

    def list_then_finish(store: LocalStore, prefix: str = "") -> Iterator[str]:
        keys = list(listing(store, prefix))
        with patch.object(LocalStore, "list", listing):
            write_split(tmp_path, [4, 4, 4])
        return iter(keys)

    with patch.object(LocalStore, "list", list_then_finish):
        cache = FeatureCache.open(tmp_path)
    assert cache.splits == [TRAIN] and cache.incomplete == {} and cache.verify() == []


@pytest.mark.parametrize("role", ["train", "plan", "manifest"])
def test_names_are_not_taken_for_more(tmp_path: Path, role: str) -> None:
    """Nor is what a killed writer left behind taken for labels."""
    write(tmp_path, "a.partial-b/train")
    with CacheWriter.open(tmp_path, SPEC) as writer:
        writer.write_labels(replace(labels(1), role=role))
    (tmp_path / "_labels/size/.partial-1-train.json").write_bytes(b"{")
    cache = FeatureCache.open(tmp_path)
    assert cache.splits == ["a.partial-b/train"] and cache.verify() == []
    assert list(cache.tasks["size"]) == [role]


@pytest.mark.parametrize("key", FILES)
@pytest.mark.parametrize("deleted", [False, True])
def test_damage_before_the_manifest(tmp_path: Path, key: str, deleted: bool) -> None:
    """What a manifest will vouch for is held against what the writer knows, and made good."""
    whole, path = write_whole(tmp_path / "whole"), tmp_path / "torn"
    with pytest.raises(KeyboardInterrupt), patch("time.sleep", side_effect=[0, KeyboardInterrupt]):
        write(path, TRAIN)
    file = path / key
    data = file.read_bytes()
    file.unlink()
    if not deleted:
        file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    lost = {0: {(TRAIN, 0)}, 1: {(TRAIN, 1)}}.get(FILES.index(key), set())
    assert write(path) == {*lost, ("sst2/validation", 0)}
    cache = FeatureCache.open(path)
    assert cache.content() == FeatureCache.open(whole).content() and cache.verify() == []


def test_synced_before_it_is_named(tmp_path: Path) -> None:
    names: list[str] = []
    with operations(lambda _, name: names.append(name)):
        LocalStore(tmp_path).create("a", b"data")
    assert names == ["open", "write", "write", "fsync", "link", "unlink", "open", "fsync"]


FOLDERS = ["sst2", TRAIN, f"{HIDDEN}/values", "_labels", "_labels/size"]
PLAIN = ["zarr.json", f"{HIDDEN}/manifest.json", "_labels/size/train.json", "_lock"]
SHARD = f"{HIDDEN}/values/c/0/0/0"


@pytest.mark.parametrize(
    ("key", "dangling"),
    [(key, False) for key in [*FOLDERS, *PLAIN, SHARD]] + [(key, True) for key in [*PLAIN, SHARD]],
)
def test_links_are_refused(tmp_path: Path, key: str, dangling: bool) -> None:
    path, target = write_whole(tmp_path / "cache"), tmp_path / "outside"
    (path / key).rename(target)
    (path / key).symlink_to("nowhere" if dangling else target)

    def outside() -> dict[Path, int]:
        files = [file for file in tmp_path.rglob("*") if not file.is_relative_to(path)]
        return {file: file.stat().st_mtime_ns for file in files}

    before = outside()
    if key != "_lock":
        assert isinstance(complaint(path), errors.UnsafeError)
    if key in FOLDERS:
        with pytest.raises(errors.UnsafeError):
            LocalStore(path).create(f"{key}/new/file", b"")
    with pytest.raises(errors.UnsafeError), CacheWriter.open(path, SPEC) as writer:
        writer.write_labels(labels(2.5))
        writer.stream(TRAIN, "hidden", ids_of(4), LAYOUT, {})
    assert outside() == before and not (path / "nowhere").exists()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_only_plain_files_are_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """A pipe would be waited at for ever."""
    file = write_whole(tmp_path) / SHARD
    file.unlink()
    make(file)
    assert isinstance(complaint(tmp_path), errors.UnsafeError)


def test_unreadable_folder_is_not_an_empty_one(tmp_path: Path) -> None:
    write_whole(tmp_path)
    with operations(lambda _, n: n == "scandir" and refuse(errno.EACCES, tmp_path), "scandir"):
        assert isinstance(complaint(tmp_path), errors.StorageError)


def test_manifest_that_points_outside(tmp_path: Path) -> None:
    file = write_whole(tmp_path) / f"{HIDDEN}/manifest.json"
    body = unseal(file.read_bytes(), "")
    record = body["files"]["zarr.json"]
    for key in ("../zarr.json", "/etc/zarr.json", "a//zarr.json", "a\0/zarr.json", "_lock"):
        file.write_bytes(seal({**body, "files": {**body["files"], key: record}}))
        assert isinstance(complaint(tmp_path), errors.UnsafeError)


BAD = ["", ".", "..", "a/../b", "/etc", "a//b", "a/", ".hidden", "a/.b", "a/zarr.json"]
BAD += ["a\0b", "a\n", "a b", "a\\b", "_labels", "a" * (MAX_NAME_BYTES + 1), "é"]


@pytest.mark.parametrize("name", BAD)
def test_bad_names_are_refused(tmp_path: Path, name: str) -> None:
    with CacheWriter.open(tmp_path, SPEC) as writer:
        with pytest.raises(errors.UnsafeError) as caught:
            writer.stream(name, "hidden", ids_of(4), LAYOUT, {})
        assert caught.value.exit_code == 8
        for table in (replace(labels(1), task=name), replace(labels(1), role=name)):
            with pytest.raises(errors.UnsafeError):
                writer.write_labels(table)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["_lock", "zarr.json"]


@given(st.text("a./\\\0-_~ \n", max_size=8) | st.text(max_size=MAX_NAME_BYTES + 9))
@settings(max_examples=50, deadline=None, suppress_health_check=[*HealthCheck])
def test_no_name_leads_outside(tmp_path: Path, name: str) -> None:
    root = tmp_path / "inside"
    with suppress(errors.UnsafeError):
        write(root, name)
    with suppress(errors.UnsafeError, errors.StorageError, FileExistsError):
        LocalStore(root).create(f"x/{name}", b"")
    assert [file.name for file in tmp_path.iterdir()] == ["inside"]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of an extraction of about 14 shards."""
    folder = tmp_path_factory.mktemp("tiny")
    model = save_model(folder / "model", "bert")
    data = write_data(folder / "data", train=2000, validation=100)
    line = "--codec float32 --taps all --shard-mib 1 --batch-tokens 64 --device cpu"
    return ["--model", model, "--data", str(data), *line.split()]


@pytest.fixture(scope="module")
def reference(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "cache"
    done("extract", *options, "--cache", path)
    return path


def start(options: list[str], path: Path) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).with_name("sherl-pipe")), "extract", *options, "--cache"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, str(path)], stderr=subprocess.PIPE, text=True, env=env)


def receipts(path: Path) -> list[Path]:
    return sorted(path.glob("colour/train/hidden/receipts/[0-9]*.json"))


def stamps(path: Path, keys: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Inode and time of files."""
    stats = {key: (path / key).stat() for key in keys}
    return {key: (stat.st_ino, stat.st_mtime_ns) for key, stat in stats.items()}


@pytest.mark.slow
def test_killed_extraction_resumes(tmp_path: Path, options: list[str], reference: Path) -> None:
    rng, path = random.Random(0), tmp_path / "cache"
    kept: dict[str, tuple[int, int]] = {}
    codes = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}
    for number, code in [*codes.items(), *codes.items()]:
        process = start(options, path)
        while len(receipts(path)) <= len(kept) and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(number)
        begun = time.monotonic()
        _, message = process.communicate(timeout=60)
        assert process.returncode == code, message
        if code > 0:
            assert time.monotonic() - begun < 5
            assert "run the same command again" in message and "Traceback" not in message
        names = [unseal(file.read_bytes(), "")["files"] for file in receipts(path)]
        now = stamps(path, chain(*names))
        assert len(now) > len(kept) and {key: now[key] for key in kept} == kept
        kept = now
        with pytest.raises(errors.IncompleteSplitError, match=f"{len(kept)} of "):
            FeatureCache.open(path)
    assert start(options, path).wait(120) == 0
    assert stamps(path, kept) == kept
    cache = FeatureCache.open(path)
    assert cache.verify() == [] and cache.content() == FeatureCache.open(reference).content()


def test_flipped_bit_stops_every_command(tmp_path: Path, reference: Path) -> None:
    path = shutil.copytree(reference, tmp_path / "cache")
    file = path / "colour/train/hidden/values/c/0/2/0"
    data = bytearray(file.read_bytes())
    data[random.Random(0).randrange(len(data))] ^= 16
    file.write_bytes(data)
    answer = sherl("verify", "--cache", path)
    assert (answer.code, answer.out) == (4, "") and str(file) in answer.err
    runs = tmp_path / "runs"
    refused(4, str(file), "shard 2", argv=("tune", "--cache", path, "--epochs", 1, "--out", runs))
    assert not [*runs.rglob("*.safetensors")]
