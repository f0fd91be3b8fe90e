"""Which store a place has, and what every store offers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sherl_pipe.cache.copies import Copies
from sherl_pipe.cache.lock import write_lock
from sherl_pipe.cache.place import Place, parse_place
from sherl_pipe.cache.record import FileRecord
from sherl_pipe.cache.store import LocalStore

Item = TypeVar("Item")
Result = TypeVar("Result")


class Store(Protocol):
    """Whole files under keys: what `LocalStore` and `RemoteStore` have in common.

    Attributes:
        lists: whether a listing is cheap, and shows all that is there.
    """

    lists: bool

    @property
    def root(self) -> Place: ...
    def path(self, key: str) -> Place: ...
    def read(self, key: str, record: FileRecord | None = None, *, keep: bool = False) -> bytes: ...
    def exists(self, key: str) -> bool: ...
    def size(self, key: str) -> int | None: ...
    def holds(self, key: str, record: FileRecord) -> bool: ...
    def create(self, key: str, data: bytes) -> None: ...
    def replace(self, key: str, data: bytes) -> None: ...
    def update(self, key: str, change: Callable[[bytes | None], bytes]) -> None: ...
    def delete(self, key: str) -> None: ...
    def delete_folder(self, key: str) -> None: ...
    def list(self, prefix: str = "") -> Iterator[str]: ...
    def remove_partials(self, prefix: str = "") -> int: ...
    def free_bytes(self) -> int | None: ...
    def each(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Sequence[Result]: ...


def open_store(place: str | Place, copies: Copies | None = None) -> Store:
    """The store of a folder or a URL.

    Args:
        place: a folder, or a URL such as `s3://bucket/prefix`.
        copies: where files of an object store that are read again and again are kept; a folder
            needs none.

    Raises InputError for a URL that cannot be used, or where obstore is not installed;
    UnsafeError for one with credentials in it.
    """
    place = parse_place(place)
    if isinstance(place, Path):
        return LocalStore(place)
    from sherl_pipe.cache.remote import RemoteStore

    return RemoteStore(place, copies)


@contextmanager
def writing(place: str | Place) -> Iterator[Store]:
    """The store of a place, held by this writer alone.

    Raises what `open_store` raises; LockedError naming the holder where another writer has it;
    StorageError.
    """
    store: Any = open_store(place)
    if isinstance(store, LocalStore):
        with write_lock(store.root):
            yield store
    else:
        from sherl_pipe.cache.lease import lease

        with lease(store):
            yield store
