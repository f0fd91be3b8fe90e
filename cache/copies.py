"""Copies of shards nearby, so that epochs after the first do not fetch them again.

One folder for all caches of a user: a file is named by the sha256 that a manifest has for it, and
is compared with the manifest before it is used. The oldest go first when there is no room.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sherl_pipe.cache.errors import InputError, StorageError, explain
from sherl_pipe.cache.record import FileRecord

_USED, _PARTIAL = "_used", ".partial-"
# A partial file that is older was left behind by a process that died.
_STALE_SECONDS = 3600
# What room is made for at a time, so that the folder is not looked through for every shard.
_SPARE = 8
_UNKNOWN = 1 << 62


@dataclass(frozen=True)
class Copies:
    """A folder with copies of shards; any number of processes may share it.

    Attributes:
        folder: where they are.
        limit: bytes that they take at most; 0 keeps none.
    """

    folder: Path
    limit: int

    def get(self, record: FileRecord) -> bytes | None:
        """The bytes of `record` if a good copy is here. A damaged copy is removed."""
        path = self._path(record)
        if path is None:
            return None
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._refused(error) from error
        if not record.matches(data):
            path.unlink(missing_ok=True)
            return None
        # Another reader may have made room by it meanwhile.
        with suppress(FileNotFoundError):
            os.utime(path)
        return data

    def put(self, record: FileRecord, data: bytes) -> None:
        """Keep `data`, the bytes of `record`, if it fits at all. Raises StorageError.

        No sync: what a crash tears is found when it is read, and fetched again.
        """
        path = self._path(record)
        if path is None or len(data) > self.limit or path.exists():
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{_PARTIAL}{uuid.uuid4().hex}")
            with self._counted() as counter:
                # Counted before it is there: whoever dies between leaves the count too high,
                # which the next look through the folder corrects.
                used = _count(counter.read_bytes()) + len(data)
                if used > self.limit:
                    used = self._make_room(len(data)) + len(data)
                counter.write_bytes(str(used).encode())
                try:
                    partial.write_bytes(data)
                    partial.replace(path)
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            raise self._refused(error) from error

    def _path(self, record: FileRecord) -> Path | None:
        name = record.sha256
        if not self.limit or len(name) != 64 or set(name) - set("0123456789abcdef"):
            return None
        return self.folder / name[:2] / name

    @contextmanager
    def _counted(self) -> Iterator[Path]:
        """The file that says how much is used, locked."""
        counter = self.folder / _USED
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(counter, flags, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield counter
        finally:
            os.close(handle)

    def _make_room(self, size: int) -> int:
        """Remove the oldest copies until `size` bytes and some more fit; the bytes left."""
        files = []
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            with suppress(FileNotFoundError):
                found = path.lstat()
                files.append((found.st_mtime, found.st_size, path))
        left, now = sum(size for _, size, _ in files), time.time()
        target = self.limit - max(size, self.limit // _SPARE)
        for modified, each, path in sorted(files):
            stale = path.name.startswith(_PARTIAL) and now - modified > _STALE_SECONDS
            if stale or (left > target and not path.name.startswith(_PARTIAL)):
                path.unlink(missing_ok=True)
                left -= each
        return left

    def _refused(self, error: OSError) -> StorageError:
        return StorageError(
            error.errno,
            f"{self.folder}: {os.strerror(error.errno or 0)}. Copies of streamed shards are kept "
            "there; free space, choose another folder with --local-copies, or keep none with "
            "--local-copies-size 0.",
        )


def _count(text: bytes) -> int:
    """The number in the counter; so large that it is counted anew, where it is none."""
    return int(text) if text.isdigit() else _UNKNOWN


def used_bytes(folder: Path) -> int:
    """What copies in a folder take, or a little more; 0 where there are none."""
    try:
        used = _count((folder / _USED).read_bytes())
    except OSError:
        return 0
    return 0 if used == _UNKNOWN else used


def check_folder(folder: Path) -> None:
    """Raise InputError where there is something else than a folder."""
    if folder.exists() and not folder.is_dir():
        raise InputError(explain("local copies", expected="a folder", found=f"the file {folder}"))
