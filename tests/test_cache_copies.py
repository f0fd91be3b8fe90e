"""Copies of shards nearby: used when they are whole, few enough, and nobody's business else."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cache_tools import write_split
from s3_tools import Wire
from sherl_pipe.cache import FeatureCache, errors
from sherl_pipe.cache.copies import Copies, check_folder, used_bytes
from sherl_pipe.cache.record import FileRecord

LENGTHS = [3, 1, 4, 1, 5, 2, 6]


def content(number: int, size: int = 1000) -> bytes:
    return np.random.default_rng(number).bytes(size)


def files(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in folder.glob("??/*")}


def keep(copies: Copies, *numbers: int) -> None:
    for number in numbers:
        copies.put(FileRecord.of(content(number)), content(number))


def kept(copies: Copies, among: int) -> list[int]:
    """Numbers of the contents that are there, without touching them."""
    names = files(copies.folder)
    return [n for n in range(among) if FileRecord.of(content(n)).sha256 in names]


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    copies = Copies(tmp_path / "new" / "copies", 10_000)
    record = FileRecord.of(content(1))
    assert copies.get(record) is None
    copies.put(record, content(1))
    assert copies.get(record) == content(1) and used_bytes(copies.folder) == 1000
    assert Copies(copies.folder, 0).get(record) is None  # keeps none, uses none


@pytest.mark.parametrize("damage", [b"", b"short", content(2), content(1) + b"x"])
def test_a_damaged_copy_is_none(tmp_path: Path, damage: bytes) -> None:
    copies, record = Copies(tmp_path, 10_000), FileRecord.of(content(1))
    copies.put(record, content(1))
    (file,) = tmp_path.glob("??/*")
    file.write_bytes(damage)
    assert copies.get(record) is None and not file.exists()


def test_the_oldest_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = Copies(tmp_path, 5000)
    keep(copies, 0, 1, 2, 3, 4)
    for age, number in enumerate((3, 0, 4, 2, 1)):
        path = copies._path(FileRecord.of(content(number)))
        assert path is not None
        os.utime(path, (1000 + age, 1000 + age))
    assert copies.get(FileRecord.of(content(3))) is not None  # used now: the youngest
    keep(copies, 5)
    assert kept(copies, 6) == [1, 2, 3, 4, 5]
    keep(copies, 6)
    assert kept(copies, 7) == [1, 2, 3, 5, 6]
    copies.put(FileRecord.of(content(9, 6000)), content(9, 6000))  # fits nowhere
    assert kept(copies, 7) == [1, 2, 3, 5, 6]


def test_never_more_than_the_limit(tmp_path: Path) -> None:
    """Of many readers at once, with sizes that differ, and a counter that somebody lost."""
    copies, most = Copies(tmp_path, 20_000), [0]
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            most[0] = max(most[0], sum(files_there()))

    def files_there() -> Iterator[int]:
        for file in tmp_path.glob("??/*"):
            try:
                yield file.stat().st_size
            except FileNotFoundError:
                continue

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            number = int(rng.integers(40))
            data = content(number, 500 + 37 * number)
            found = copies.get(FileRecord.of(data))
            assert found in (None, data)
            copies.put(FileRecord.of(data), data)
            if rng.random() < 0.05:
                (tmp_path / "_used").write_bytes(b"")

    watcher = threading.Thread(target=watch)
    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in (watcher, *readers):
        thread.start()
    for thread in readers:
        thread.join()
    stop.set()
    watcher.join()
    # While the watcher adds up, a file of each reader may come for one that it has counted.
    assert 10_000 < most[0] <= 20_000 + 4 * len(content(39, 500 + 37 * 39))
    assert sum(files_there()) <= 20_000
    assert not [name for name in files(tmp_path) if name.startswith(".partial")]


def test_partial_files_are_not_served_and_go(tmp_path: Path) -> None:
    copies, record = Copies(tmp_path, 2000), FileRecord.of(content(1))
    folder = tmp_path / record.sha256[:2]
    folder.mkdir()
    for name, age in ((".partial-old", 1000.0), (".partial-new", None)):
        (folder / name).write_bytes(content(1))
        if age is not None:
            os.utime(folder / name, (age, age))
    assert copies.get(record) is None
    keep(copies, 2, 3)
    assert ".partial-old" not in files(tmp_path) and ".partial-new" in files(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    copies = Copies(tmp_path / "file" / "below", 10_000)
    with pytest.raises(errors.StorageError, match="--local-copies-size 0") as caught:
        keep(copies, 1)
    assert caught.value.exit_code == 7
    with pytest.raises(errors.InputError, match="expected a folder, found the file"):
        check_folder(tmp_path / "file")


def test_names_that_are_no_hash(tmp_path: Path) -> None:
    copies = Copies(tmp_path / "copies", 10_000)
    record = FileRecord(5, 0, "../../../evil" + "0" * 51)
    copies.put(record, b"12345")
    assert copies.get(record) is None and list(tmp_path.iterdir()) == []


def test_streamed_shards_are_fetched_once(wire: Wire, url: str, tmp_path: Path) -> None:
    write_split(url, LENGTHS)
    copies = Copies(tmp_path / "copies", 1 << 20)
    cache = FeatureCache.open(url, copies=copies)
    stream = cache.stream("sst2/train", "hidden")
    shards = range(stream.layout.shards)
    first = [stream.read_shard(n, keep=True).codes.tobytes() for n in shards]
    fetched = wire.count("GET", "/values/c/")
    assert fetched == len(shards) == len(files(copies.folder)) // 2
    assert [stream.read_shard(n, keep=True).codes.tobytes() for n in shards] == first
    assert wire.count("GET", "/values/c/") == fetched
    file = min(copies.folder.glob("??/*"))
    file.write_bytes(file.read_bytes()[:-1])
    assert [stream.read_shard(n, keep=True).codes.tobytes() for n in shards] == first
    assert wire.count("GET", "/c/0/") > 0 and file.stat().st_size
    before = len(wire.seen)
    stream.read_shard(0)  # what stays in memory is read directly
    assert len(wire.seen) == before + 2 and wire.count("GET", "/values/c/0/0/0") >= 2


def test_what_is_damaged_in_the_store_is_not_kept(wire: Wire, url: str, tmp_path: Path) -> None:
    write_split(url, LENGTHS)
    copies = Copies(tmp_path / "copies", 1 << 20)
    stream = FeatureCache.open(url, copies=copies).stream("sst2/train", "hidden")
    _ = stream.layout
    wire.fault = lambda method, key: "flip" if "/values/" in key else None
    with pytest.raises(errors.CorruptCacheError, match="values/c/0/0/0"):
        stream.read_shard(0, keep=True)
    assert not files(copies.folder)
