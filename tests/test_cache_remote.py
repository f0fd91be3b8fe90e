"""A cache in an object store is the cache in a folder, whatever happens on the way there."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from cache_tools import write_split
from s3_tools import SECRET, Wire, every
from sherl_pipe.cache import CacheWriter, FeatureCache, connect, errors, lease, remote
from sherl_pipe.cache.record import FileRecord
from sherl_pipe.cache.remote import RemoteStore
from sherl_pipe.cache.stores import open_store
from test_cache_faults import SPEC, labels

LENGTHS = [3, 1, 4, 1, 5, 2, 6]
SHARD = "sst2/train/hidden/values/c/0/0/0"
MANIFEST = "sst2/train/hidden/manifest.json"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits are as many as ever, and shorter."""
    monkeypatch.setattr(remote, "SHORTEST", 0.005)
    monkeypatch.setattr(remote, "LONGEST", 0.02)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """What the small cache holds in a folder."""
    path = tmp_path_factory.mktemp("local")
    write_split(path, LENGTHS)
    return FeatureCache.open(path).content()


def store_of(url: str) -> RemoteStore:
    store = open_store(url)
    assert isinstance(store, RemoteStore)
    return store


def overwrite(url: str, key: str, change: Callable[[bytes], bytes]) -> None:
    """Damage an object, behind the back of everybody."""
    store = store_of(url)
    store.replace(key, change(store.read(key)))


def read_all(url: str) -> list[bytes]:
    stream = FeatureCache.open(url).stream("sst2/train", "hidden")
    return [stream.read_shard(shard).codes.tobytes() for shard in range(stream.layout.shards)]


def test_the_same_cache_as_in_a_folder(
    wire: Wire, url: str, local: list[tuple[str, str]], tmp_path: Path
) -> None:
    write_split(url, LENGTHS)
    cache = FeatureCache.open(url)
    assert cache.content() == local and cache.verify() == [] and cache.splits == ["sst2/train"]
    assert str(cache.path) == url
    write_split(tmp_path, LENGTHS)
    near = FeatureCache.open(tmp_path).stream("sst2/train", "hidden")
    assert read_all(url) == [near.read_shard(n).codes.tobytes() for n in range(near.layout.shards)]
    assert write_split(url, LENGTHS) == []  # it is finished


def test_nobody_lists_the_bucket_to_know_what_is_there(wire: Wire, url: str) -> None:
    write_split(url, LENGTHS)
    with CacheWriter.open(url, SPEC) as writer:
        writer.write_labels(labels(1.5))
    wire.seen.clear()
    cache = FeatureCache.open(url)
    assert cache.verify() == [] and list(cache.tasks) == ["size"] and read_all(url)
    assert wire.seen and not [each for each in wire.seen if "list-type" in each.query]


def test_resumed_after_a_death(wire: Wire, url: str, local: list[tuple[str, str]]) -> None:
    first = write_split(url, LENGTHS, stop_after=2)
    with pytest.raises(errors.IncompleteSplitError, match="2 of [0-9]+ shards are committed"):
        FeatureCache.open(url)
    wire.seen.clear()
    second = write_split(url, LENGTHS)
    assert first and second and not set(first) & set(second)
    assert FeatureCache.open(url).content() == local
    puts = [each.key for each in wire.seen if each.method == "PUT" and "/values/c/" in each.key]
    assert len(puts) == len(second)


@pytest.mark.parametrize("fault", ["503", "drop", "lost", "slow", "truncate", "short", "flip"])
def test_faults_that_pass_leave_no_trace(
    wire: Wire, url: str, local: list[tuple[str, str]], fault: str
) -> None:
    """Every second request of every kind fails: what is asked again goes well."""
    wire.delay = 0.02
    # A body that is wrong is seen where the manifest says what is right.
    methods = ("PUT",) if fault == "flip" else ("GET",) if fault == "truncate" else ()
    if fault != "short":
        wire.fault = every(2, fault, *methods)
    write_split(url, LENGTHS)
    if fault in ("short", "flip"):
        seen: set[str] = set()

        def once(method: str, key: str) -> str | None:
            known = key in seen or "/values/c/" not in key
            seen.add(key)
            return None if known else fault

        wire.fault = once
    cache = FeatureCache.open(url)
    assert cache.content() == local and cache.verify() == []
    wire.fault = lambda _, __: None
    assert cache.verify() == [] and read_all(url)
    assert not [key for key in store_of(url).list() if "/receipts/" in key or "plan.json" in key]


class Killed(BaseException):
    """As kill -9: nothing that follows is done, the lock is not given back."""


def killed_write(url: str, point: int, applied: bool) -> bool:
    """Write the cache and die at its request number `point`; whether it came so far.

    Where `applied`, the store has done that request, and nobody was there for the answer.
    """
    heal, lock, seen = RemoteStore._heal, threading.Lock(), [0]

    def strike(self: RemoteStore, key: str, request: Callable[[], Any], size: int = 0) -> Any:
        with lock:
            seen[0] += 1
            number = seen[0]
        if number > point or (number == point and not applied):
            raise Killed
        answer = heal(self, key, request, size)
        if number == point:
            raise Killed
        return answer

    with patch.object(RemoteStore, "_heal", strike):
        try:
            write_split(url, LENGTHS)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("applied", [False, True])
def test_killed_at_any_request(
    wire: Wire, url: str, server: str, local: list[tuple[str, str]], applied: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)  # without the wire it is faster
    monkeypatch.setattr(lease, "_is_dead", lambda _: True)  # this very process was the holder
    point, step = 3, 9
    while killed_write(place := f"{url}/{point}", point, applied):
        # Of readers meanwhile, none sees a stream before it is whole.
        with contextlib.suppress(errors.IncompleteSplitError, errors.InputError):
            assert FeatureCache.open(place).content() in ([], local)
        write_split(place, LENGTHS)
        cache = FeatureCache.open(place)
        assert cache.content() == local and cache.verify() == []
        left = {key.rpartition("/")[0] for key in store_of(place).list()}
        assert not any(folder.endswith("receipts") for folder in left)
        point += step
    assert point > 50


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("503", "the server answers 503 SlowDown, again and again"),
        ("drop", "the connection broke, again and again"),
        ("truncate", "the connection broke, again and again"),
        ("403", "the server answers 403 AccessDenied: no permission"),
    ],
)
def test_faults_that_stay_end_with_the_url(
    wire: Wire, url: str, monkeypatch: pytest.MonkeyPatch, fault: str, words: str
) -> None:
    write_split(url, LENGTHS)
    monkeypatch.setattr(remote, "PATIENCE", 0.2)
    wire.fault = lambda _, __: fault
    begun = time.monotonic()
    with pytest.raises(errors.StorageError) as caught:
        FeatureCache.open(url)
    assert time.monotonic() - begun < 20
    text = str(caught.value.args[-1])
    assert caught.value.exit_code == 7 and f"{url}/zarr.json: {words}" in text
    assert "run the same command again" in text
    for secret in ("WHO", SECRET):  # the server's answer has it
        assert secret not in text and secret not in repr(caught.value.__cause__)
    if fault == "403":
        assert sum(each.status == 403 for each in wire.seen) == 1  # asking again is no use
    with pytest.raises(errors.StorageError):
        write_split(f"{url}2", LENGTHS)


def test_no_answer_at_all(wire: Wire, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE", 0.1)
    monkeypatch.setattr(connect, "seconds_for", lambda _: 1)
    wire.fault, wire.delay = every(1, "slow"), 3
    wire.fault = lambda _, __: "slow"
    with pytest.raises(errors.StorageError, match=r"zarr\.json: there was no answer in time"):
        FeatureCache.open(url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(errors.StorageError, match=r"zarr\.json: the connection was refused"):
        FeatureCache.open(url)


def test_requests_have_time_for_their_size() -> None:
    assert [connect.seconds_for(size << 20) for size in (0, 12, 13, 32, 512)] == [
        32, 32, 64, 64, 1024
    ]  # fmt: skip
    # The promise of FORMAT.md: a shard of the usual size ends within two minutes.
    assert remote.PATIENCE + connect.seconds_for(32 << 20) < 120


DAMAGE: dict[str, Callable[[str, str], None]] = {
    "gone": lambda url, key: store_of(url).delete(key),
    "empty": lambda url, key: overwrite(url, key, lambda _: b""),
    "cut": lambda url, key: overwrite(url, key, lambda data: data[:-1]),
    "longer": lambda url, key: overwrite(url, key, lambda data: data + b"x"),
    "flipped": lambda url, key: overwrite(url, key, lambda d: d[:-1] + bytes([d[-1] ^ 1])),
    "swapped": lambda url, key: overwrite(
        url, key, lambda _: store_of(url).read(SHARD.replace("0/0/0", "0/1/0"))
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_not_read(wire: Wire, url: str, damage: str) -> None:
    write_split(url, LENGTHS)
    before = FeatureCache.open(url).stream("sst2/train", "hidden")
    DAMAGE[damage](url, SHARD)
    cache = FeatureCache.open(url)
    for stream in (before, cache.stream("sst2/train", "hidden")):
        with pytest.raises(errors.CorruptCacheError, match=f"{url}/{SHARD}"):
            stream.read_shard(0)
        stream.read_shard(1)
    (problem,) = cache.verify()
    assert f"{url}/{SHARD}" in problem
    if damage not in ("flipped", "swapped"):  # for a size it need not be fetched
        with pytest.raises(errors.CorruptCacheError, match=SHARD):
            write_split(url, LENGTHS)


def test_damaged_metadata(wire: Wire, url: str) -> None:
    write_split(url, LENGTHS)
    store = store_of(url)
    for key in ("zarr.json", "sst2/train/hidden/zarr.json", MANIFEST, "_catalogue.json"):
        before = store.read(key)
        for damage in ("gone", "empty", "cut", "flipped"):
            if (key, damage) == ("_catalogue.json", "gone"):
                continue  # as of a cache that was copied there
            DAMAGE[damage](url, key)
            no_cache = (key, damage) == ("zarr.json", "gone")
            with pytest.raises(
                errors.InputError if no_cache else errors.CorruptCacheError, match=url
            ):
                FeatureCache.open(url)
            store.replace(key, before)
    assert FeatureCache.open(url).verify() == []


def test_a_deleted_stream_is_gone_and_can_be_made_again(
    wire: Wire, url: str, local: list[tuple[str, str]]
) -> None:
    write_split(url, LENGTHS)
    store = store_of(url)
    for key in list(store.list("sst2/train/hidden")):
        store.delete(key)
    assert FeatureCache.open(url).splits == []
    write_split(url, LENGTHS)
    assert FeatureCache.open(url).content() == local


def test_a_cache_that_was_copied_into_a_bucket(
    wire: Wire, url: str, tmp_path: Path, local: list[tuple[str, str]]
) -> None:
    write_split(tmp_path, LENGTHS)
    store = store_of(url)
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.name != "_lock":
            store.create(file.relative_to(tmp_path).as_posix(), file.read_bytes())
    assert FeatureCache.open(url).content() == local
    with CacheWriter.open(url, SPEC) as writer:
        writer.write_labels(labels(0.5))
    wire.seen.clear()
    cache = FeatureCache.open(url)
    assert cache.content() == local and list(cache.tasks) == ["size"]
    assert not [each for each in wire.seen if "list-type" in each.query]


def test_labels_are_replaced_under_a_condition(wire: Wire, url: str) -> None:
    write_split(url, LENGTHS)
    for value in (1.0, 2.0):
        with CacheWriter.open(url, SPEC) as writer:
            assert writer.write_labels(labels(value)) == 1
    assert FeatureCache.open(url).tasks["size"]["train"].labels == (2.0,)
    puts = [e for e in wire.seen if e.method == "PUT" and e.key.endswith("size/train.json")]
    assert [sorted({"if-match", "if-none-match"} & set(e.headers)) for e in puts] == [
        ["if-none-match"], ["if-match"]
    ]  # fmt: skip


def test_every_put_has_a_condition(wire: Wire, url: str) -> None:
    write_split(url, LENGTHS)
    puts = [each for each in wire.seen if each.method == "PUT"]
    assert puts and all({"if-match", "if-none-match"} & set(each.headers) for each in puts)


def test_created_once(wire: Wire, url: str) -> None:
    store = store_of(url)
    store.create("a/b", b"one")
    store.create("a/b", b"one")  # as after an answer that was lost
    with pytest.raises(FileExistsError):
        store.create("a/b", b"two")
    assert store.read("a/b") == b"one" and store.size("a/b") == 3 and store.size("a/c") is None
    with pytest.raises(FileNotFoundError):
        store.read("a/c")
    store.delete("a/b")
    store.delete("a/b")
    assert not store.exists("a/b") and list(store.list()) == []
    with pytest.raises(errors.UnsafeError, match="does not stay inside"):
        store.read("a/../../b")


def test_two_that_change_one_object(wire: Wire, url: str) -> None:
    """Every change is made, of whoever is faster; with answers that are lost, too."""
    wire.fault = every(5, "lost", "PUT")

    def add(word: str) -> Callable[[bytes | None], bytes]:
        return lambda old: b" ".join(sorted({*(old or b"").split(), word.encode()}))

    words = [f"w{number}" for number in range(12)]
    threads = [
        threading.Thread(target=lambda w=word: store_of(url).update("k", add(w))) for word in words
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store_of(url).read("k").split() == sorted(word.encode() for word in words)


def test_a_bucket_that_is_not_there(wire: Wire) -> None:
    with pytest.raises(errors.InputError, match="s3://nothing-here/cache is not a cache"):
        FeatureCache.open("s3://nothing-here/cache")
    with pytest.raises(errors.StorageError, match="there is no such bucket"):
        write_split("s3://nothing-here/cache", LENGTHS)


def test_bytes_that_are_not_those_written(
    wire: Wire, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that keeps other bytes is found out at once, and the bytes do not stay."""
    store = store_of(url)
    put = RemoteStore._put
    monkeypatch.setattr(
        RemoteStore, "_put", lambda self, key, data, mode: put(self, key, data[:-1] + b"?", mode)
    )
    with pytest.raises(errors.CorruptCacheError, match="does not read back as written"):
        store.create("a", b"what was meant")
    assert not store.exists("a")


def test_an_entity_tag_that_is_no_md5(
    wire: Wire, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(url)
    head = RemoteStore._head
    monkeypatch.setattr(RemoteStore, "_head", lambda *a: {**head(*a), "e_tag": '"0x8D"'})
    store.create("a", b"content")
    assert wire.count("GET", "/a") == 1  # it was read back
    assert store.holds("a", FileRecord.of(b"content"))
    assert not store.holds("a", FileRecord.of(b"other"))
