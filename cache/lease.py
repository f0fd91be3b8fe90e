"""One writer per cache in an object store: a lock that has to be renewed.

A bucket does not see that a process died, so its lock is a lease: the holder renews it every BEAT
seconds, and one that was not renewed for LEASE seconds may be taken over, after watching for WATCH
seconds that nothing renews it, so that clocks that differ between machines do no harm. A holder
that finds that it was paused for longer renews first, and stops where it was taken over. Every
change is a conditional put, of which one of two wins.

Where the holder was a process of this very machine and is gone, nobody waits.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sherl_pipe.cache.errors import LockedError, StorageError
from sherl_pipe.cache.lock import LOCK_NAME
from sherl_pipe.cache.remote import Found, RemoteStore

LEASE, BEAT, WATCH = 60.0, 10.0, 20.0
# Whoever is told to stop does not wait longer for the lock to be given back.
HURRY = 3.0


@contextmanager
def lease(store: RemoteStore) -> Iterator[None]:
    """Hold the writer's lock of the cache in `store`, which then refuses changes without it.

    Raises LockedError naming the holder, StorageError.
    """
    held = _Lease(store)
    held.acquire()
    store.guard = held.check
    stop = threading.Event()
    beats = threading.Thread(target=held.beat, args=(stop,), name="lease", daemon=True)
    beats.start()
    try:
        yield
    finally:
        stop.set()
        store.guard = lambda: None
        held.release()


class _Lease:
    """The lock object of one store, as one writer sees it."""

    def __init__(self, store: RemoteStore) -> None:
        self._store = store
        self._me = {
            "owner": uuid.uuid4().hex,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "process": _process(os.getpid()),
            "seconds": LEASE,
        }
        self._beats = 0
        self._version: dict[str, str] | None = None
        self._renewed = 0.0
        self._mutex = threading.Lock()

    def acquire(self) -> None:
        """Take the lock. Raises LockedError, StorageError."""
        found = self._store.find(LOCK_NAME)
        if found is not None and not self._free(found):
            raise self._locked(found)
        if not self._put(None if found is None else found.version):
            raise self._locked(self._store.find(LOCK_NAME))

    def beat(self, stop: threading.Event) -> None:
        """Renew until told to stop."""
        while not stop.wait(BEAT):
            try:
                self._renew()
            except LockedError:
                return  # `check` says so to the writer, before its next change
            except StorageError:
                continue  # there is time for more than one attempt; `check` raises the last

    def check(self) -> None:
        """Return if the lock is certainly held. Raises LockedError, StorageError."""
        if time.monotonic() - self._renewed > LEASE:
            self._renew()

    def release(self) -> None:
        """Give the lock back, if it is still held and the store answers soon."""
        self._store.patience = HURRY
        if not self._mutex.acquire(timeout=HURRY):
            return  # a beat waits for the store; the lock ends by itself
        try:
            self._put(self._version, released=True)
        except StorageError:
            return  # as above
        finally:
            self._mutex.release()

    def _renew(self) -> None:
        with self._mutex:
            if not self._put(self._version):
                self._renewed = float("-inf")
                raise self._locked(self._store.find(LOCK_NAME), "was taken over")

    def _put(self, version: dict[str, str] | None, *, released: bool = False) -> bool:
        """Write the lock if it still has `version`; whether it is ours now."""
        self._beats += 1
        body = {**self._me, "beat": self._beats, "released": released}
        begun = time.monotonic()
        if not self._store.swap(LOCK_NAME, json.dumps(body).encode(), version):
            return False
        # The version of what was just put; another's would not be replaced by the next beat.
        found = self._store.find(LOCK_NAME)
        if found is None or _holder(found).get("owner") != self._me["owner"]:
            return False
        self._version, self._renewed = found.version, begun
        return True

    def _free(self, found: Found) -> bool:
        """Whether the lock that was found may be taken: given back, or its holder is dead."""
        holder = _holder(found)
        if holder.get("released") is True or _is_dead(holder):
            return True
        if (datetime.now(UTC) - found.modified).total_seconds() <= LEASE:
            return False
        time.sleep(WATCH)
        again = self._store.find(LOCK_NAME)
        return again is not None and again.version == found.version

    def _locked(self, found: Found | None, how: str = "is being written") -> LockedError:
        holder = {} if found is None else _holder(found)
        who = "another process"
        if "pid" in holder and "host" in holder:
            who = f"process {str(holder['pid'])[:20]} on {str(holder['host'])[:80]}"
        return LockedError(
            f"{self._store.root} {how} by {who}. Wait until it ends, or write to another --cache. "
            f"If it is dead, its lock ends {LEASE:.0f} seconds after it was last renewed."
        )


def _holder(found: Found) -> Mapping[str, Any]:
    try:
        body = json.loads(found.data)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _process(pid: int) -> list[str] | None:
    """What no other process ever has: machine since its start, process table, number, start.

    None where the system does not tell (it has no /proc), or there is no such process.
    """
    proc = Path("/proc")
    try:
        start = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[19]
        boot = (proc / "sys/kernel/random/boot_id").read_text().strip()
        table = str((proc / "self/ns/pid").readlink())
    except (OSError, IndexError):
        return None
    return [boot, table, str(pid), start]


def _is_dead(holder: Mapping[str, Any]) -> bool:
    """Whether a holder was a process of this machine that is certainly gone."""
    process, here = holder.get("process"), _process(os.getpid())
    if not isinstance(process, list) or len(process) != 4 or here is None:
        return False
    if process[:2] != here[:2] or not str(process[2]).isdigit():
        return False
    return _process(int(process[2])) != process
