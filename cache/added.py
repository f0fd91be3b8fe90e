"""Taps that were added to a cache: their declarations, `_taps/<n>.json`.

The n-th addition is stored beside what is there, in streams of their own called
`<stream>.<n>`. Its declaration says which taps they hold. It is written before them and never
changed, as the root's metadata is, which goes on saying what the first extraction made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sherl_pipe.cache import catalogue
from sherl_pipe.cache.errors import CorruptCacheError, explain, hint, shown
from sherl_pipe.cache.manifest import METADATA, read_root
from sherl_pipe.cache.names import DECLARATIONS, declaration
from sherl_pipe.cache.schema import ADDED_VERSION, Identity, StreamSpec
from sherl_pipe.cache.sealed import seal, take, unseal
from sherl_pipe.cache.stores import Store


def read_added(store: Store, identity: Identity) -> Identity:
    """The `identity` of a cache's root metadata, with what was added to the cache.

    Raises CorruptCacheError, UnsafeError.
    """
    keys = set(catalogue.file_keys(store, DECLARATIONS))
    for number in range(1, len(keys) + 1):
        key = declaration(number)
        path = str(store.path(key))
        if key not in keys:
            raise CorruptCacheError(
                explain(
                    f"{store.path(DECLARATIONS)} says which taps were added",
                    expected=key,
                    found=", ".join(sorted(keys))[:200],
                    todo=f"Restore {path} from a copy of the cache; or delete that folder and all "
                    f"folders of streams called *.{number} or later, and extract these taps again.",
                )
            )
        with hint(f"Delete {path} and run `sherl-pipe extract` with the same --taps as then."):
            specs = _read(unseal(store.read(key), path), path, number, identity)
        identity = replace(identity, added=(*identity.added, specs))
    return identity


def stored_identity(store: Store) -> Identity | None:
    """What the cache at a store was made with, what was added included; None where there is none.

    Raises InputError for another format, CorruptCacheError, UnsafeError.
    """
    return read_added(store, read_root(store)[0]) if store.exists(METADATA) else None


def declare(store: Store, identity: Identity, missing: Mapping[str, StreamSpec]) -> Identity:
    """`identity` with taps that it lacks, by stream; from now on they are part of the cache.

    Raises StorageError.
    """
    number = len(identity.added) + 1
    body = {
        "format": ADDED_VERSION,
        "identity": identity.fingerprint(),
        "number": number,
        "streams": {name: spec.to_json() for name, spec in missing.items()},
    }
    catalogue.enter(store, declaration(number))
    store.create(declaration(number), seal(body))
    return replace(identity, added=(*identity.added, dict(missing)))


def _read(body: object, path: str, number: int, identity: Identity) -> dict[str, StreamSpec]:
    """The taps in a declaration's body, which must be new to `identity`."""
    wanted: tuple[tuple[str, int | str], ...] = (
        ("format", ADDED_VERSION),
        ("number", number),
        ("identity", identity.fingerprint()),
    )
    for name, expected in wanted:
        found = take(body, name, type(expected), path)
        if found != expected:
            raise CorruptCacheError(
                explain(f"{path}: field {name!r}", expected=expected, found=shown(found))
            )
    specs = {
        name: StreamSpec.from_json(spec, f"{path}: streams: {name[:60]!r}")
        for name, spec in take(body, "streams", dict, path).items()
    }
    for name, spec in specs.items():
        if name not in identity.streams:
            raise CorruptCacheError(
                explain(f"{path}: stream", expected=sorted(identity.streams), found=shown(name))
            )
        whole = identity.held(name)
        shape = (spec.blocks, spec.width) == (whole.blocks, whole.width)
        ordered = list(spec.taps) == sorted({*spec.taps} - {*whole.taps})
        if not shape or not ordered or not 0 <= spec.taps[0] <= spec.taps[-1] <= spec.blocks:
            raise CorruptCacheError(
                explain(
                    f"{path}: streams: {name}",
                    expected="ascending taps that the cache does not have yet",
                    found=list(spec.taps)[:60],
                )
            )
    return specs
