"""Coded rows in memory that the processes of a host share: each shard is read from the cache once.

The rows lie in a file of the system's memory file system, mapped read-only by everybody. Whoever
needs a shard first reads it, under a lock of that shard, and leaves a checksum, which the others
check. The last process that uses the file removes it. What a crash has left behind is removed by
whoever shares next: every user holds a lock, which dies with it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import tempfile
import time
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from sherl_pipe.cache.errors import UnsafeError
from sherl_pipe.stages.shelf import Blocks, Bytes, Form, Room

FOLDER = "sherl-pipe"
# In the order of preference: memory, else files that the system keeps in memory while it can.
PLACES = (Path("/dev/shm"), Path(tempfile.gettempdir()))
_ROWS, _MARKS, _USERS = "rows", "marks", "users"
_ALIGNED = 64
# Shards that are filled at the same time, at most.
_LOCKS = 64
# A mark is this bit and a checksum; none is there while it is zero.
_THERE = 1 << 32


class Commons:
    """The shared rows of one set of shards.

    Args:
        key: names what the rows are; equal keys mean equal rows.
        forms: by role.

    Attributes:
        folder: of the files; None where no place has room, and each process has its own rows.
    """

    def __init__(self, key: str, forms: Mapping[str, Form]) -> None:
        self._forms = dict(forms)
        self._offsets, self._size = _layout(forms)
        shards = len(next(iter(forms.values())).rows)
        self.folder: Path | None = None
        for place in PLACES:
            home = _home(place)
            if home is None:
                continue
            clear(home)
            user = _enter(home / key)
            with suppress(OSError):
                _make(home / key / _ROWS, self._size)
                _make(home / key / _MARKS, 8 * shards)
                self.folder = home / key
                break
            _leave(home / key, user)
        if self.folder is None:
            return
        self._close = weakref.finalize(self, _leave, self.folder, user)
        self._rows = _mapped(self.folder / _ROWS, mmap.ACCESS_READ)
        self._marks = _mapped(self.folder / _MARKS, mmap.ACCESS_WRITE).view(np.uint64)

    def close(self) -> None:
        """Use the rows no more; the last user removes them. Happens by itself at the end."""
        if self.folder is not None:
            self._close()

    def blocks(self) -> Blocks:
        """By role the rows of all shards: codes `[taps, rows, bytes]`, and scales or None."""
        found = {}
        for role, form in self._forms.items():
            codes, scales = (self._view(self._rows, role, part) for part in (0, 1))
            with warnings.catch_warnings():
                # Tensors do not know what is read-only. Nothing writes to these.
                warnings.filterwarnings("ignore", ".*not writable.*")
                found[role] = (
                    torch.from_numpy(codes),
                    torch.from_numpy(scales) if form.scale_bytes else None,
                )
        return found

    def bring(self, shard: int, fill: Callable[[int, Room], None]) -> None:
        """Have the rows of a shard there; as `Shelf.bring`."""
        if self.folder is None:
            raise TypeError("there are no shared rows")
        if self._whole(shard):
            return
        with _locked(self.folder / f"lock-{shard % _LOCKS}"):
            # Somebody may have read it meanwhile.
            if self._whole(shard):
                return
            self._marks[shard] = 0
            room = {role: self._scratch(role, shard) for role in self._forms}
            fill(shard, room)
            self._put(shard, room)
            self._marks[shard] = _THERE | self._checksum(shard)

    def _whole(self, shard: int) -> bool:
        """Whether a shard is there, and as it was written."""
        mark = int(self._marks[shard])
        return mark != 0 and mark == _THERE | self._checksum(shard)

    def _checksum(self, shard: int) -> int:
        found = 0
        for role in self._forms:
            for part in (0, 1):
                for tap in self._own(self._view(self._rows, role, part), role, shard):
                    found = zlib.crc32(tap, found)
        return found

    def _scratch(self, role: str, shard: int) -> tuple[Bytes, Bytes | None]:
        form = self._forms[role]
        sizes = form.code_bytes, form.scale_bytes
        codes, scales = (
            np.empty((form.taps, int(form.rows[shard]), size), np.uint8) for size in sizes
        )
        return codes, scales if form.scale_bytes else None

    def _put(self, shard: int, room: Room) -> None:
        # A map to write through lives no longer than this.
        whole = _mapped(self.folder / _ROWS, mmap.ACCESS_WRITE) if self.folder else self._rows
        for role, parts in room.items():
            for part, values in enumerate(parts):
                if values is not None:
                    self._own(self._view(whole, role, part), role, shard)[:] = values

    def _view(self, rows: Bytes, role: str, part: int) -> Bytes:
        form = self._forms[role]
        shape = form.taps, int(form.rows.sum()), (form.code_bytes, form.scale_bytes)[part]
        start = self._offsets[role][part]
        return rows[start : start + int(np.prod(shape))].reshape(shape)

    def _own(self, block: Bytes, role: str, shard: int) -> Bytes:
        rows = self._forms[role].rows
        start = int(rows[:shard].sum())
        return block[:, start : start + int(rows[shard])]


def clear_all(patience: float = 0.0) -> None:
    """Remove what nobody uses any more, wherever it is; wait so many seconds for the last users,
    such as workers that are being ended."""
    until = time.monotonic() + patience
    homes = [place / f"{FOLDER}-{os.getuid()}" for place in PLACES]
    while any(home.is_dir() and clear(home) for home in homes) and time.monotonic() < until:
        time.sleep(0.1)


def clear(home: Path) -> int:
    """Remove what nobody uses any more; returns how much is left."""
    for folder in home.iterdir():
        if folder.suffix == ".gone":
            shutil.rmtree(folder, ignore_errors=True)
            continue
        with suppress(OSError):
            _leave(folder, os.open(folder / _USERS, os.O_RDWR | os.O_CLOEXEC))
    return len(list(home.iterdir()))


def _home(place: Path) -> Path | None:
    """The user's own folder at a place; None where nothing can be written."""
    home = place / f"{FOLDER}-{os.getuid()}"
    try:
        home.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return None
    found = home.lstat()
    if home.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UnsafeError(f"{home} can be written by others. Remove it.")
    return home


def _enter(folder: Path) -> int:
    """Be a user of a folder; returns the open file whose lock says so."""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError):
            user = os.open(folder / _USERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(user, fcntl.LOCK_SH)
            # It may have been removed in between.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(user), (folder / _USERS).stat()):
                    return user
            os.close(user)


def _leave(folder: Path, user: int) -> None:
    """Be a user no more: remove the folder, unless somebody else uses it; `user` is closed."""
    try:
        # Not an upgrade of a shared lock: two that leave at once would each see the other.
        fcntl.flock(user, fcntl.LOCK_UN)
        fcntl.flock(user, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(user), (folder / _USERS).stat()):
            # Whoever comes now makes a new one.
            gone = folder.with_name(f"{folder.name}-{os.getpid()}-{user}.gone")
            folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
    except (BlockingIOError, FileNotFoundError):
        return
    finally:
        os.close(user)


def _make(path: Path, size: int) -> None:
    """Have a file of so many bytes, zeros at first. Raises OSError where there is no room."""
    with _locked(path.with_name("lock-make")):
        if path.is_file() and path.stat().st_size == size:
            return
        new = path.with_name(f"{path.name}-new")
        with new.open("wb") as file:
            # Now, and not by a signal when a page that has no room is touched.
            os.posix_fallocate(file.fileno(), 0, max(1, size))
            file.truncate(size)
        new.rename(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _mapped(path: Path, access: int) -> Bytes:
    with path.open("rb" if access == mmap.ACCESS_READ else "r+b") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=access), np.uint8)


def _layout(forms: Mapping[str, Form]) -> tuple[dict[str, tuple[int, int]], int]:
    """Where the codes and the scales of every role begin, and the size of all."""
    offsets, size = {}, 0
    for role, form in forms.items():
        starts = []
        for width in (form.code_bytes, form.scale_bytes):
            starts.append(size)
            size += form.taps * int(form.rows.sum()) * width
            size += -size % _ALIGNED
        offsets[role] = starts[0], starts[1]
    return offsets, size
