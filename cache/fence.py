"""Which run's workers may commit: those of a run that was killed may live on for some seconds.

A run with workers writes a token of its own into `_fence`, and hands it to them. A commit holds a
shared lock on that file and goes ahead only if its token is there; whoever takes over the cache
takes the exclusive lock, which waits for commits under way, and changes the token. So from then on
nothing is committed by anybody else, however long it had been asleep.

In an object store there is no such lock: the token is an object that a commit reads before it
begins. One that was under way when another run took over goes on; what it writes is what that run
would write, byte for byte.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sherl_pipe.cache.errors import InputError, LockedError
from sherl_pipe.cache.place import Place
from sherl_pipe.cache.store import needs, storage_errors
from sherl_pipe.cache.stores import open_store

FENCE_NAME = "_fence"
# A commit takes seconds; one that takes longer is of a process that was stopped.
WAIT_SECONDS = 60.0
_POLL_SECONDS = 0.05


def admit(place: Place) -> str:
    """A new token; from now on only commits that have it go ahead.

    For the holder of the cache's lock. Raises LockedError where a commit of an earlier run does not
    end, StorageError, UnsafeError.
    """
    token = secrets.token_hex(8)
    if isinstance(place, Path):
        _write(_open(place / FENCE_NAME, os.O_RDWR | os.O_CREAT), place, token)
    else:
        open_store(place).replace(FENCE_NAME, token.encode())
    return token


def shut(place: Place) -> None:
    """Let no worker of an earlier run commit any more; as `admit`."""
    if not isinstance(place, Path):
        store = open_store(place)
        if store.exists(FENCE_NAME):
            store.replace(FENCE_NAME, b"")
        return
    try:
        handle = _open(place / FENCE_NAME, os.O_RDWR)
    except FileNotFoundError:
        return  # no run had workers yet
    _write(handle, place, "")


@contextmanager
def committing(place: Place, token: str) -> Iterator[None]:
    """Commit as a worker of the run that has `token`.

    Raises LockedError if another run has taken over, InputError where there is no such cache.
    """
    try:
        if isinstance(place, Path):
            path = place / FENCE_NAME
            handle = _open(path, os.O_RDONLY)
        else:
            found = open_store(place).read(FENCE_NAME).decode(errors="replace")
    except FileNotFoundError as error:
        raise InputError(
            f"{place} is not the cache that the run writes, as this machine sees it. Workers on "
            "several machines need a --cache folder that all of them share under the same path."
        ) from error
    if not isinstance(place, Path):
        _check(place, found, token)
        yield
        return
    with os.fdopen(handle, "r", encoding="ascii", errors="replace") as file:
        with needs("locks (flock)", path):
            fcntl.flock(file, fcntl.LOCK_SH)
        _check(place, file.read(), token)
        yield


def _check(place: Place, found: str, token: str) -> None:
    if found != token:
        raise LockedError(
            f"{place} is being written by another run, which took over from this worker's."
        )


def _open(path: Path, flags: int) -> int:
    with storage_errors(path):
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def _write(handle: int, folder: Path, token: str) -> None:
    """Change the token once no commit is under way."""
    path = folder / FENCE_NAME
    with storage_errors(path), os.fdopen(handle, "r+", encoding="ascii") as file:
        end = time.monotonic() + WAIT_SECONDS
        while not _locked(file.fileno(), path):
            if time.monotonic() > end:
                raise LockedError(
                    f"{folder} is still being written by a worker of an earlier run, for "
                    f"{WAIT_SECONDS:.0f} s now. End it, or wait, then run the same command again."
                )
            time.sleep(_POLL_SECONDS)
        file.truncate()
        file.write(token)
        file.flush()
        os.fsync(file.fileno())


def _locked(handle: int, path: Path) -> bool:
    try:
        with needs("locks (flock)", path):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
