"""One writer per cache. The kernel drops the lock of a dead process, so it is never stale."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sherl_pipe.cache.errors import LockedError, StorageError

LOCK_NAME = "_lock"


@contextmanager
def write_lock(root: Path) -> Iterator[None]:
    """Hold the writer's lock of the cache at `root`.

    Raises:
        LockedError: another live process holds it; the message has its pid and host.
        StorageError: the folder cannot be written.
    """
    path = root / LOCK_NAME
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StorageError(
            error.errno,
            f"{path}: {os.strerror(error.errno or 0)}. Choose a writable folder with --cache.",
        ) from error
    with os.fdopen(handle, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockedError(
                f"{root} is being written by {_holder(file.read())}. "
                "Wait until it ends, or write to another --cache."
            ) from error
        file.seek(0)
        file.truncate()
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
        yield


def _holder(text: str) -> str:
    try:
        found = json.loads(text)
        return f"process {found['pid']} on {found['host']}"
    except (ValueError, KeyError, TypeError):
        # The holder has the lock and has not written its name yet.
        return "another process that is just starting"
