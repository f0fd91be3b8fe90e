"""Which streams and labels a cache in an object store has: one object that names them.

A folder is listed, which is cheap and shows all there is. A bucket is not asked what it holds: a
listing costs a request for every thousand objects. Whoever is about to begin a stream, to attach
labels or to declare taps enters their name first, so what is not entered was never begun.
"""

from __future__ import annotations

from sherl_pipe.cache.fingerprint import canonical_json
from sherl_pipe.cache.manifest import MANIFEST, PLAN, RECEIPTS
from sherl_pipe.cache.names import DECLARATIONS
from sherl_pipe.cache.sealed import seal, take, unseal
from sherl_pipe.cache.store import is_partial
from sherl_pipe.cache.stores import Store

CATALOGUE = "_catalogue.json"
LABELS = "_labels"

# Enough to tell a stream that was half deleted from one that is gone.
_FIRST_DATA = ("ids/c/0/0", "index/c/0/0", "values/c/0/0/0", f"{RECEIPTS}/0.json")


def begin(store: Store) -> None:
    """Make the catalogue where there has to be one and is none; for the lock's holder.

    A cache that was copied into a bucket has none: it is listed, this once.
    """
    if not store.lists and not store.exists(CATALOGUE):
        store.create(CATALOGUE, _sealed(_listed(store)))


def enter(store: Store, name: str) -> None:
    """Note a stream (its folder) or labels (their file) that are about to be written."""
    if store.lists or name in (_names(store) or ()):
        return

    def add(old: bytes | None) -> bytes:
        known = set() if old is None else _parsed(old, str(store.path(CATALOGUE)))
        return _sealed(known | {name})

    store.update(CATALOGUE, add)


def stream_keys(store: Store) -> set[str]:
    """Keys by which a reader finds streams: plans, manifests, and some that lack both.

    Raises CorruptCacheError, UnsafeError, StorageError.
    """
    names = None if store.lists else _names(store)
    if names is None:
        found = {key for key in store.list() if not is_partial(key)}
        return {key for key in found if not key.startswith(f"{LABELS}/")}
    bases = sorted(
        name for name in names if not name.startswith((f"{LABELS}/", f"{DECLARATIONS}/"))
    )

    def marks(base: str) -> list[str]:
        # The plan first: it goes when the manifest is there.
        found = [key for mark in (PLAN, MANIFEST) if store.exists(key := f"{base}/{mark}")]
        if found:
            return found
        return [key for mark in _FIRST_DATA if store.exists(key := f"{base}/{mark}")]

    return {key for keys in store.each(marks, bases) for key in keys}


def label_keys(store: Store) -> list[str]:
    """The files of all labels."""
    return [key for key in file_keys(store, LABELS) if key.endswith(".json")]


def file_keys(store: Store, folder: str) -> list[str]:
    """The files of LABELS or of DECLARATIONS; what a writer left when it died is none."""
    names = None if store.lists else _names(store)
    if names is None:
        return [key for key in store.list(folder) if not is_partial(key)]
    named = sorted(name for name in names if name.startswith(f"{folder}/"))
    there = store.each(store.exists, named)
    return [key for key, found in zip(named, there, strict=True) if found]


def _listed(store: Store) -> set[str]:
    marks = (f"/{MANIFEST}", f"/{PLAN}")
    bases = {key.rpartition("/")[0] for key in stream_keys(store) if key.endswith(marks)}
    return bases | set(label_keys(store)) | set(file_keys(store, DECLARATIONS))


def _names(store: Store) -> set[str] | None:
    try:
        data = store.read(CATALOGUE)
    except FileNotFoundError:
        return None
    return _parsed(data, str(store.path(CATALOGUE)))


def _parsed(data: bytes, path: str) -> set[str]:
    names = take(unseal(data, path), "names", list, path)
    return {take({"name": name}, "name", str, path) for name in names}


def _sealed(names: set[str]) -> bytes:
    return seal({"names": sorted(names, key=canonical_json)})
