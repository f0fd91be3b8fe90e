"""A cache in an object store is the cache in a folder, whatever happens on the way there."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from cache_tools import write_split
from s3_tools import SECRET, Wire, every
from sherl_pipe.cache import CacheWriter, FeatureCache, connect, errors, lease, remote
from sherl_pipe.cache.place import Url, parse_place
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


# -- the lock --------------------------------------------------------------------------------


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("LEASE", 2.0), ("BEAT", 0.1), ("WATCH", 0.3)):
        monkeypatch.setattr(lease, name, seconds)


def holder(url: str, **change: Any) -> None:
    """The lock of another machine's writer, which is not heard of any more."""
    body = {"owner": "o", "pid": 77, "host": "far", "process": None, "beat": 1, "released": False}
    store_of(url).replace("_lock", json.dumps(body | change).encode())


def test_one_writer_at_a_time(wire: Wire, url: str, short_lease: None) -> None:
    for _ in range(3):
        with CacheWriter.open(url, SPEC):
            with pytest.raises(errors.LockedError) as caught, CacheWriter.open(url, SPEC):
                pass
            assert caught.value.exit_code == 6
            me = lease._Lease(store_of(url))._me
            assert f"process {me['pid']} on {me['host']}" in str(caught.value)
    with CacheWriter.open(url, SPEC) as writer:
        time.sleep(2.5)  # longer than the lease: it is renewed
        with pytest.raises(errors.LockedError), CacheWriter.open(url, SPEC):
            pass
        writer.store.create("still/mine", b"x")


def test_a_dead_holder_elsewhere(wire: Wire, url: str, short_lease: None) -> None:
    holder(url)
    with pytest.raises(errors.LockedError, match="process 77 on far.*ends 2 seconds after"):
        write_split(url, LENGTHS)
    time.sleep(3.2)  # times of objects are whole seconds
    assert write_split(url, LENGTHS)


def test_a_dead_holder_on_this_machine(wire: Wire, url: str) -> None:
    process = lease._process(1)
    if process is None:
        pytest.skip("this system does not tell one process from another")
    holder(url, process=process)
    with pytest.raises(errors.LockedError):  # process 1 lives
        write_split(url, LENGTHS)
    holder(url, process=[*process[:3], "1"])  # as of one that had its number before
    assert write_split(url, LENGTHS)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"process": [1, 2, 3, "x"]}'])
def test_a_lock_that_says_nothing(wire: Wire, url: str, content: bytes) -> None:
    store_of(url).replace("_lock", content)
    with pytest.raises(errors.LockedError, match="by another process"):
        write_split(url, LENGTHS)


def test_clocks_that_differ(
    wire: Wire, url: str, short_lease: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a machine whose clock is an hour ahead every lease looks old; a live one is renewed."""

    class Ahead(lease.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz) + timedelta(hours=1)

    with CacheWriter.open(url, SPEC):
        monkeypatch.setattr(lease, "datetime", Ahead)
        with pytest.raises(errors.LockedError), CacheWriter.open(url, SPEC):
            pass


def test_a_writer_that_lost_its_lock_writes_nothing(
    wire: Wire, url: str, short_lease: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was stopped for longer than its lease, and goes on while another writes."""
    monkeypatch.setattr(lease, "BEAT", 1000)
    with CacheWriter.open(url, SPEC) as writer:
        store = writer.store
        holder(url, owner="p", pid=78)
        store.create("before/its/end", b"x")
        monkeypatch.setattr(lease, "LEASE", -1.0)
        for change in (
            lambda: store.create("a", b"x"),
            lambda: store.replace("a", b"x"),
            lambda: store.delete("before/its/end"),
        ):
            with pytest.raises(errors.LockedError, match="was taken over by process 78 on far"):
                change()
    assert json.loads(store_of(url).read("_lock"))["owner"] == "p"  # it is not given back either


def test_a_lock_whose_answers_are_lost(wire: Wire, url: str, short_lease: None) -> None:
    wire.fault = lambda method, key: "lost" if method == "PUT" and wire.count("PUT") % 2 else None
    with CacheWriter.open(url, SPEC) as writer:
        time.sleep(0.5)
        writer.store.create("mine", b"x")


# -- where, and with which rights ------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "bucket", "key"),
    [
        ("s3://bucket", "bucket", ""),
        ("s3://bucket/", "bucket", ""),
        ("gs://my.bucket_1/a/b-c/d=1/", "my.bucket_1", "a/b-c/d=1"),
        ("az://container/x", "container", "x"),
    ],
)
def test_urls(text: str, bucket: str, key: str) -> None:
    place = parse_place(text)
    assert place == Url(text[:2], bucket, key) and parse_place(place) is place
    assert str(place) == text.removesuffix("/") and parse_place(str(place)) == place
    assert str(place / "a" / "b").startswith(str(place)) and (place / "a").parent == place


@pytest.mark.parametrize("text", ["cache", "./s3", "/a/b", "C:/x", "a:b/c", "", "ünï/x"])
def test_folders(text: str) -> None:
    assert parse_place(text) == Path(text) == parse_place(Path(text))


@pytest.mark.parametrize(
    "text",
    [
        f"s3://me:{SECRET}@bucket/x",
        f"s3://{SECRET}@bucket",
        f"s3://bucket/x?X-Amz-Signature={SECRET}",
        f"az://container/x#{SECRET}",
        f"https://me:{SECRET}@host/x",
    ],
)
def test_urls_with_secrets(text: str) -> None:
    with pytest.raises(errors.UnsafeError) as caught:
        FeatureCache.open(text)
    assert SECRET not in str(caught.value) and caught.value.__cause__ is None


@pytest.mark.parametrize(
    "text",
    [
        "http://host/x",
        "file:///x",
        "s3:/bucket/x",
        "s3://",
        "s3:///x",
        "s3://b/x",
        "s3://bucket//x",
        "s3://bucket/a/../b",
        "s3://bucket/a b",
        "s3://bucket/a%2e",
        "s3://bucket/" + "x" * 600,
        Path("s3://bucket/x"),
    ],
)
def test_urls_that_are_none(text: str | Path) -> None:
    with pytest.raises(errors.InputError):
        parse_place(text)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(errors.InputError, match=r"pip install 'sherl-pipe\[cloud\]'"):
        FeatureCache.open("s3://bucket/x")


def who(wire: Wire) -> set[str]:
    return {each.headers["authorization"].split("Credential=")[1][:6] for each in wire.seen}


def test_credentials_of_a_profile(
    wire: Wire, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "credentials"
    text = "[{}]\naws_access_key_id = {}\naws_secret_access_key = x\n"
    file.write_text(text.format("default", "ALPHA1") + text.format("other", "OTHER1"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    write_split(url, LENGTHS)
    assert who(wire) == {"ALPHA1"}
    wire.seen.clear()
    monkeypatch.setenv("AWS_PROFILE", "other")
    FeatureCache.open(url)
    assert who(wire) == {"OTHER1"}
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(errors.InputError, match="AWS profile gives no credentials"):
        FeatureCache.open(url)


def test_plain_http_is_for_this_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = connect._plain_loopback
    assert plain({"AWS_ENDPOINT_URL": "http://127.0.0.1:5000"})
    assert plain({"AWS_ENDPOINT_URL": "http://x", "AWS_ENDPOINT_URL_S3": "http://localhost:1"})
    for far in ("http://10.0.0.1:9000", "https://localhost", "http://localhost.evil.org", ""):
        assert not plain({"AWS_ENDPOINT_URL": far})


def test_other_stores_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no server of theirs here; that they are understood can be seen."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    for text, kind in (("gs://bucket/x", "GCSStore"), ("az://container/x", "AzureStore")):
        place = parse_place(text)
        assert isinstance(place, Url)
        assert type(connect.client(place, timedelta(seconds=1))).__name__ == kind
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    with pytest.raises(errors.InputError, match="az://container: the store cannot be opened"):
        connect.client(Url("az", "container"), timedelta(seconds=1))


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
