"""Files of a cache in an object store: whole objects, put once, read whole.

A put is atomic, and one that may only create is refused where the key is there. So what a folder
needs links and folder syncs for, a bucket has of itself. What it lacks is an answer that arrives:
a put may have been done although its answer was lost, so a put that fails is tried again, and one
that finds its own bytes has succeeded.
"""

from __future__ import annotations

import errno
import hashlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

from sherl_pipe.cache import connect
from sherl_pipe.cache.copies import Copies
from sherl_pipe.cache.errors import CorruptCacheError, StorageError, UnsafeError, explain
from sherl_pipe.cache.place import Url
from sherl_pipe.cache.record import FileRecord
from sherl_pipe.cache.store import key_parts

Item = TypeVar("Item")
Result = TypeVar("Result")

# A request that fails is sent again for so many seconds, after waits that double up to LONGEST.
PATIENCE, SHORTEST, LONGEST = 45.0, 0.1, 8.0
# Requests that are under way at once where there are many: each is mostly waiting.
PARALLEL = 16
# The largest object that one put makes (S3's limit); whatever is larger was not written here.
MAX_BYTES = 5 << 30


@dataclass(frozen=True)
class Found:
    """An object: its bytes, what a conditional put compares, and when the server wrote it."""

    data: bytes
    version: dict[str, str]
    modified: datetime


class RemoteStore:
    """A prefix in a bucket.

    Args:
        root: where.
        copies: nearby, of what is read again and again.

    Attributes:
        guard: called before every change; raises where the writer's lock was lost.
        patience: seconds for which a request is sent again.

    Raises InputError where obstore is not installed. Every method raises StorageError, naming the
    URL, for a fault that does not heal within its patience and the time of one request.
    """

    lists = False

    def __init__(self, root: Url, copies: Copies | None = None) -> None:
        self.root, self.copies = root, copies
        self.guard: Callable[[], None] = lambda: None
        self.patience = PATIENCE
        self._obstore = connect.library()
        self._clients: dict[int, Any] = {}

    def path(self, key: str) -> Url:
        """The URL of `key`. Raises UnsafeError for a key that would leave the root."""
        return self.root / "/".join(key_parts(key))

    def read(self, key: str, record: FileRecord | None = None, *, keep: bool = False) -> bytes:
        """The bytes of `key`.

        Args:
            record: what they should be. Others are fetched once more, for they may have been
                damaged on the way; whether they are right now is for the caller to see.
            keep: whether a copy may be kept nearby, and taken from there.

        Raises FileNotFoundError, UnsafeError.
        """
        copies = self.copies if keep else None
        if copies is not None and record is not None:
            near = copies.get(record)
            if near is not None:
                return near
        size = 0 if record is None else record.size
        data = self._get(key, size).data
        if record is not None and not record.matches(data):
            data = self._get(key, size).data
        if copies is not None and record is not None and record.matches(data):
            copies.put(record, data)
        return data

    def find(self, key: str) -> Found | None:
        """The object with its version; None where it is not there."""
        try:
            return self._get(key)
        except FileNotFoundError:
            return None

    def exists(self, key: str) -> bool:
        """Whether `key` is there."""
        return self.size(key) is not None

    def size(self, key: str) -> int | None:
        """Bytes of `key`; None where it is not there."""
        try:
            return int(self._head(key)["size"])
        except FileNotFoundError:
            return None

    def holds(self, key: str, record: FileRecord) -> bool:
        """Whether `key` is there in its size: an object was checked when it was put, is never half
        there, and fetching all of them would take as long as reading the cache."""
        return self.size(key) == record.size

    def create(self, key: str, data: bytes) -> None:
        """Put `key` once. Raises FileExistsError where other bytes are there, CorruptCacheError."""

        def put() -> None:
            if self._put(key, data, "create") is None and self._get(key, len(data)).data != data:
                raise FileExistsError(errno.EEXIST, "there is another object", str(self.path(key)))

        self.guard()
        self._heal(key, put, len(data))
        self._check(key, data)

    def replace(self, key: str, data: bytes) -> None:
        """Put `key`, replacing it."""
        self.update(key, lambda _: data)

    def update(self, key: str, change: Callable[[bytes | None], bytes]) -> None:
        """Put what `change` makes of the bytes that are there (None for none).

        It is called again if another writer was faster, and has to make the same of its own result.
        """

        def step() -> bool:
            found = self.find(key)
            new = change(None if found is None else found.data)
            done = found is not None and found.data == new
            return done or self.swap(key, new, None if found is None else found.version)

        self.guard()
        ends = time.monotonic() + self.patience
        while not step():
            if time.monotonic() > ends:
                raise self._refusal(key, "other writers keep changing it")

    def swap(self, key: str, data: bytes, version: dict[str, str] | None) -> bool:
        """Put `data` if the object still has `version` (None: is not there); whether it was done.

        An answer that was lost is made up for by looking: `data` has to be what nobody else writes.
        """

        def put() -> bool:
            if self._put(key, data, "create" if version is None else version) is not None:
                return True
            found = self.find(key)
            return found is not None and found.data == data

        return self._heal(key, put, len(data))

    def delete(self, key: str) -> None:
        """Remove `key` if it is there."""
        self.guard()
        self._heal(key, lambda: self._obstore.delete(self._client(), self._name(key)))

    def delete_folder(self, key: str) -> None:
        """Folders are what keys have in common; an empty one is not there."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys below `prefix`, sorted. For clearing away and counting, and for caches without a
        catalogue: what is there is otherwise found by name."""
        top = f"{self._name(prefix)}/" if prefix else f"{self.root.key}/" if self.root.key else None

        def fetch() -> Iterable[str]:
            pages = self._obstore.list(self._client(), top)
            return [str(found["path"]) for page in pages for found in page]

        cut = len(self.root.key) + 1 if self.root.key else 0
        yield from sorted(name[cut:] for name in self._heal(prefix, fetch))

    def remove_partials(self, prefix: str = "") -> int:
        """An object is never partly there."""
        return 0

    def free_bytes(self) -> None:
        """Nobody knows how much more a bucket takes."""

    def each(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Sequence[Result]:
        """`work` on every item, several at once, in order."""
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="request") as pool:
            return list(pool.map(work, items))

    def _name(self, key: str) -> str:
        """The object's name in the bucket."""
        return self.path(key).key

    def _client(self, size: int = 0) -> Any:
        """A client whose requests have time for `size` bytes."""
        seconds = connect.seconds_for(size)
        if seconds not in self._clients:
            self._clients[seconds] = connect.client(self.root, timedelta(seconds=seconds))
        return self._clients[seconds]

    def _head(self, key: str) -> Any:
        return self._heal(key, lambda: self._obstore.head(self._client(), self._name(key)))

    def _get(self, key: str, size: int = 0) -> Found:
        def get() -> Found:
            answer = self._obstore.get(self._client(size), self._name(key))
            meta = answer.meta
            if meta["size"] > MAX_BYTES:
                raise UnsafeError(f"{self.path(key)}: {meta['size']} bytes are no file of a cache.")
            return Found(bytes(answer.bytes()), _version(meta), meta["last_modified"])

        return self._heal(key, get, size)

    def _put(self, key: str, data: bytes, mode: Any) -> str | None:
        """Put under a condition: the entity tag, or None where it does not hold."""
        wrong = self._obstore.exceptions
        try:
            done = self._obstore.put(
                self._client(len(data)), self._name(key), data, mode=mode, use_multipart=False
            )
        except (wrong.AlreadyExistsError, wrong.PreconditionError):
            return None
        except FileNotFoundError as error:
            raise self._refusal(key, "there is no such bucket") from error
        return str(done["e_tag"])

    def _check(self, key: str, data: bytes) -> None:
        """Raise CorruptCacheError, and take the object away, unless the store has `data`.

        An entity tag that is the MD5 of the bytes, as S3's is without KMS, says so; else they are
        fetched.
        """
        head, digest = self._head(key), hashlib.md5(data, usedforsecurity=False).hexdigest()
        if head["size"] == len(data) and str(head["e_tag"]).strip('"') == digest:
            return
        if self._get(key, len(data)).data != data:
            self.delete(key)
            raise CorruptCacheError(
                explain(
                    f"{self.path(key)} does not read back as written",
                    todo="The store, or something before it, is faulty; use another one.",
                )
            )

    def _heal(self, key: str, request: Callable[[], Result], size: int = 0) -> Result:
        """What `request` answers, asked again while it fails in a way that may pass."""
        wait, ends = SHORTEST, time.monotonic() + self.patience
        while True:
            try:
                return request()
            except self._obstore.exceptions.BaseError as error:
                reason, passing = connect.reason(error)
                # Many workers that were refused together should not come back together.
                pause = wait * random.uniform(0.5, 1)
                if not passing or time.monotonic() + pause > ends:
                    # Not from `error`: a server's answer may repeat who asked.
                    raise self._refusal(key, reason) from None
            time.sleep(pause)
            wait = min(2 * wait, LONGEST)

    def _refusal(self, key: str, reason: str) -> StorageError:
        where = self.path(key) if key else self.root
        return StorageError(
            errno.EIO,
            f"{where}: {reason}. Then run the same command again: it goes on where it was.",
        )


def _version(meta: Any) -> dict[str, str]:
    return {name: meta[name] for name in ("e_tag", "version") if meta[name] is not None}
