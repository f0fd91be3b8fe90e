"""The files of a committed stream: every byte is checked before it is decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt
from sherl_pipe.cache.errors import CorruptCacheError, UnsafeError, explain, hint, shown
from sherl_pipe.cache.manifest import FileRecord, remedy
from sherl_pipe.cache.stores import Store


class Committed:
    """The files that a stream's manifest names.

    Args:
        store: where the cache is.
        base: folder of the stream.
        files: what was committed, by key.
    """

    def __init__(self, store: Store, base: str, files: Mapping[str, FileRecord]) -> None:
        self._store, self._base, self._files = store, base, files

    def checked(self, key: str, what: str, *, keep: bool = False) -> bytes:
        """The bytes of a file; `what` it is, for messages. `keep` is as for `Stream.read_shard`.

        Raises CorruptCacheError unless it is the one that was committed.
        """
        record = self._files.get(key)
        try:
            data = self._store.read(key, record, keep=keep)
        except FileNotFoundError as error:
            raise CorruptCacheError(
                f"{self._store.path(key)} ({what}) is missing. "
                f"{remedy(self._store, self._base, key)}"
            ) from error
        if record is None or not record.matches(data):
            raise self.other(key, what, FileRecord.of(data))
        return data

    def other(self, key: str, what: str, found: FileRecord) -> CorruptCacheError:
        """The error for another file in the place of one that was committed."""
        return CorruptCacheError(
            explain(
                f"{self._store.path(key)} ({what}) is not the file that was committed",
                expected=self._files.get(key, "one that the manifest names"),
                found=found,
                todo=remedy(self._store, self._base, key),
            )
        )

    def decoded(
        self,
        key: str,
        what: str,
        decode: Callable[[bytes], npt.NDArray[Any]],
        *,
        keep: bool = False,
    ) -> npt.NDArray[Any]:
        """What `decode` makes of a file's bytes. Raises what `checked` raises, and UnsafeError."""
        data, path = self.checked(key, what, keep=keep), self._store.path(key)
        with hint(remedy(self._store, self._base, key)):
            try:
                return decode(data)
            except UnsafeError as error:
                raise UnsafeError(f"{path} ({what}): {error}") from error
            except (ValueError, RuntimeError) as error:
                raise CorruptCacheError(f"{path} ({what}): {error}.") from error

    def problems(self) -> list[str]:
        """Every file that is not the one that was committed."""
        return [
            problem
            for problem in self._store.each(self._problem, sorted(self._files))
            if problem is not None
        ]

    def _problem(self, key: str) -> str | None:
        record, path = self._files[key], self._store.path(key)
        try:
            now = FileRecord.of(self._store.read(key, record))
        except FileNotFoundError:
            return f"{path} is missing"
        if now.size != record.size:
            return explain(f"{path}: bytes", expected=record.size, found=now.size)
        if now.sha256 != record.sha256:
            return explain(f"{path}: sha256", expected=shown(record.sha256), found=now.sha256)
        return None
