"""One writer per cache. The kernel drops the lock of a dead process, so it is never stale."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from sherl_pipe.cache.errors import LockedError, StorageError, UnsafeError
from sherl_pipe.cache.store import needs

LOCK_NAME = "_lock"


@contextmanager
def write_lock(root: Path) -> Iterator[None]:
    """Hold the writer's lock of the cache at `root`.

    Raises:
        LockedError: another live process holds it; the message has its pid and host.
        StorageError: the folder cannot be written, or its file system has no locks.
        UnsafeError: the lock's file is a link.
    """
    path = root / LOCK_NAME
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = _acquire(path)
    except (LockedError, StorageError):
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeError(f"{path} is a symbolic link. Remove the link.") from error
        raise StorageError(
            error.errno,
            f"{path}: {os.strerror(error.errno or 0)}. Free space, fix permissions, or choose "
            "another folder with --cache.",
        ) from error
    with file:
        yield


def _acquire(path: Path) -> TextIO:
    """The open, locked file with this process's name in it. Raises LockedError, OSError."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    file = os.fdopen(handle, "r+", encoding="utf-8", errors="replace")
    try:
        with needs("locks (flock)", path):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.seek(0)
        file.truncate()
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
    except BlockingIOError as error:
        with file:
            raise LockedError(
                f"{path.parent} is being written by {_holder(file.read())}. "
                "Wait until it ends, or write to another --cache."
            ) from error
    except BaseException:
        file.close()
        raise
    return file


def _holder(text: str) -> str:
    try:
        found = json.loads(text)
        return f"process {found['pid']} on {found['host']}"
    except (ValueError, KeyError, TypeError):
        # The holder has the lock and has not written its name yet.
        return "another process that is just starting"
