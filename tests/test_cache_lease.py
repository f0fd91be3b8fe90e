"""One writer per cache in an object store, whoever dies, sleeps or has a clock of their own."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any

import pytest
from cache_tools import write_split
from s3_tools import Wire
from sherl_pipe.cache import CacheWriter, errors, lease
from test_cache_faults import SPEC
from test_cache_remote import LENGTHS, _quick, store_of  # noqa: F401 - a fixture acts where its name is


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
