"""Files of a cache: atomic, durable, exclusive writes and link-free reads under one root.

A key is a `/`-separated path below the root. A file appears under its key whole or not at all:
it is written under a temporary name in the same folder, synced, read back, and linked into place.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from sherl_pipe.cache.errors import (
    CorruptCacheError,
    SherlPipeError,
    StorageError,
    UnsafeError,
    explain,
)
from sherl_pipe.cache.record import FileRecord

PARTIAL = ".partial-"
Item = TypeVar("Item")
Result = TypeVar("Result")
# What a call is answered with by a file system that does not offer it.
_LACKING = {errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EMLINK}


@contextmanager
def needs(feature: str, path: Path) -> Iterator[None]:
    """Turn the OSError of a file system that lacks a feature into a StorageError that says so."""
    try:
        yield
    except OSError as error:
        if error.errno not in _LACKING:
            raise
        raise StorageError(
            error.errno,
            f"{path}: the file system there offers no {feature} ({os.strerror(error.errno)}), "
            "without which files could be lost or mixed up. Choose a folder on another one, such "
            "as a local disk with ext4, XFS or APFS.",
        ) from error


@contextmanager
def storage_errors(path: Path, size: int | None = None) -> Iterator[None]:
    """Turn an OSError into a StorageError that names the path and the bytes needed."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, SherlPipeError):
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeError(
                f"{path} is a symbolic link; caches hold plain files only. Remove the link."
            ) from error
        if error.errno == errno.ENOTDIR:
            raise _not_a_folder(path) from error
        need = f" ({size} bytes needed)" if size is not None else ""
        raise StorageError(
            error.errno,
            f"{path}: {os.strerror(error.errno or 0)}{need}. "
            "Free space or fix permissions, then run the same command again: it resumes.",
        ) from error


def _not_a_folder(path: Path) -> UnsafeError:
    return UnsafeError(f"{path}: a file lies where a folder of the cache belongs. Move it away.")


def is_partial(key: str) -> bool:
    """Whether a key is a temporary file's; folders may be called anything."""
    return key.rsplit("/", 1)[-1].startswith(PARTIAL)


def _refuse_link(folder: Path) -> None:
    if folder.is_symlink():
        raise UnsafeError(
            f"{folder} is a symbolic link; caches hold plain folders. Remove the link."
        )


def _unlisted(error: OSError) -> None:
    """A folder that is not there holds nothing; of any other that is not known."""
    if not isinstance(error, FileNotFoundError):
        with storage_errors(Path(error.filename)):
            raise error


def key_parts(key: str) -> list[str]:
    """The parts of a key. Raises UnsafeError for one that would leave the root."""
    parts = key.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise UnsafeError(f"key {key!r} does not stay inside the cache")
    return parts


class LocalStore:
    """A folder of the local file system."""

    lists = True

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, key: str) -> Path:
        """The file of `key`. Raises UnsafeError for a key that would leave the root."""
        return self.root.joinpath(*key_parts(key))

    def _no_links(self, path: Path) -> None:
        """Refuse a folder below the root that is a link: its target may lie anywhere."""
        for parent in path.parents:
            if parent == self.root:
                return
            _refuse_link(parent)

    def read(self, key: str, record: FileRecord | None = None, *, keep: bool = False) -> bytes:
        """The bytes of `key`; what they should be makes no difference to a folder.

        Raises FileNotFoundError, UnsafeError, StorageError.
        """
        path = self.path(key)
        with storage_errors(path):
            self._no_links(path)
            # Opening a pipe would wait for ever for whoever writes to it.
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                os.close(handle)
                raise UnsafeError(f"{path} is not a plain file. Remove it.")
            with os.fdopen(handle, "rb") as file:
                try:
                    return file.read()
                except MemoryError as error:
                    raise UnsafeError(f"{path} is larger than the free memory.") from error

    def exists(self, key: str) -> bool:
        """Whether `key` is there; a link counts, so that whoever reads it then refuses it."""
        path = self.path(key)
        with storage_errors(path):
            return path.is_symlink() or path.is_file()

    def size(self, key: str) -> int | None:
        """Bytes of `key`; None where it is not there. Raises UnsafeError, StorageError."""
        path = self.path(key)
        with storage_errors(path):
            self._no_links(path)
            try:
                found = path.lstat()
            except FileNotFoundError:
                return None
            if not stat.S_ISREG(found.st_mode):
                raise UnsafeError(f"{path} is not a plain file. Remove it.")
            return found.st_size

    def holds(self, key: str, record: FileRecord) -> bool:
        """Whether `key` is there, whole. Raises UnsafeError, StorageError."""
        return self.exists(key) and record.matches(self.read(key))

    def create(self, key: str, data: bytes) -> None:
        """Write `key` once. Raises FileExistsError if it is there, StorageError, UnsafeError."""
        self._put(key, data, exclusive=True)

    def replace(self, key: str, data: bytes) -> None:
        """Write `key`, replacing it atomically."""
        self._put(key, data, exclusive=False)

    def update(self, key: str, change: Callable[[bytes | None], bytes]) -> None:
        """Replace `key` by what `change` makes of it; for the lock's holder."""
        self.replace(key, change(self.read(key) if self.exists(key) else None))

    def _put(self, key: str, data: bytes, *, exclusive: bool) -> None:
        path = self.path(key)
        with storage_errors(path, len(data)):
            self._no_links(path)
            self._make_folder(path.parent)
        temporary = path.parent / f"{PARTIAL}{os.getpid()}-{path.name}"
        try:
            with storage_errors(path, len(data)):
                self._write_synced(temporary, data)
                if exclusive:
                    with needs("hard links", path):
                        os.link(temporary, path)
                    temporary.unlink()
                else:
                    temporary.rename(path)
                self._sync_folder(path.parent)
        except BaseException:
            # Storage that just refused may refuse this too; the next writer clears it away.
            with suppress(OSError):
                temporary.unlink()
            raise

    def _make_folder(self, folder: Path) -> None:
        missing = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for new in reversed(missing):
            try:
                new.mkdir(exist_ok=True)
            except FileExistsError as error:
                raise _not_a_folder(new) from error
            self._sync_folder(new.parent)

    @staticmethod
    def _write_synced(path: Path, data: bytes) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o644), "r+b") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            if file.read() != data:
                raise CorruptCacheError(
                    explain(
                        f"{path} does not read back as written",
                        todo="The disk or its driver is faulty; use another one.",
                    )
                )

    @staticmethod
    def _sync_folder(folder: Path) -> None:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with needs("sync of folders", folder):
                os.fsync(handle)
        finally:
            os.close(handle)

    def delete(self, key: str) -> None:
        """Remove `key` if it is there."""
        path = self.path(key)
        with storage_errors(path):
            self._no_links(path)
            path.unlink(missing_ok=True)

    def delete_folder(self, key: str) -> None:
        """Remove the empty folder `key` if it is there."""
        path = self.path(key)
        with storage_errors(path):
            self._no_links(path)
            if path.is_dir():
                path.rmdir()

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys of all files below `prefix`, sorted; temporary files included, links too.

        Raises UnsafeError for a folder that is a link, StorageError for one that cannot be read:
        passing over either would make what is in it look as if it had never been committed.
        """
        top = self.path(prefix) if prefix else self.root
        for folder, folders, files in os.walk(top, onerror=_unlisted):
            folders.sort()
            for name in folders:
                with storage_errors(Path(folder)):
                    _refuse_link(Path(folder) / name)
            for name in sorted(files):
                yield (Path(folder) / name).relative_to(self.root).as_posix()

    def remove_partials(self, prefix: str = "") -> int:
        """Delete what an interrupted writer left behind; only the lock's holder may call this."""
        partials = [key for key in self.list(prefix) if is_partial(key)]
        for key in partials:
            self.delete(key)
        return len(partials)

    def each(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Sequence[Result]:
        """`work` on every item, in order; a disk gains nothing from several at once."""
        return [work(item) for item in items]

    def free_bytes(self) -> int:
        """Free space where the cache is, or where it will be. Raises StorageError."""
        folder = self.root
        with storage_errors(self.root):
            while not folder.exists():
                folder = folder.parent
            return shutil.disk_usage(folder).free
