"""Sealed JSON files, and checked fields of them.

Every JSON file of a cache that is not Zarr's own is *sealed*: `{"body": ..., "sha256": ...}`, so
that a flipped bit in it is found before anything in it is believed.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from sherl_pipe.cache.errors import CorruptCacheError, UnsafeError, explain, shown
from sherl_pipe.cache.fingerprint import canonical_json, hash_bytes, hash_json

T = TypeVar("T")


def take(body: Any, name: str, kind: type[T], path: str) -> T:
    """The field `name` of a JSON object, which must be of exactly this type.

    Raises CorruptCacheError naming `path` and the field.
    """
    value = body.get(name) if isinstance(body, dict) else None
    if type(value) is not kind:  # isinstance would take true for a number
        raise CorruptCacheError(
            explain(f"{path}: field {name!r}", expected=kind.__name__, found=shown(value))
        )
    return value


def seal(body: Any) -> bytes:
    """The bytes of a sealed JSON file."""
    text = canonical_json(body)
    return b'{"body":' + text + b',"sha256":"' + hash_bytes(text).encode() + b'"}\n'


def unseal(data: bytes, path: str) -> Any:
    """The body of a sealed file. Raises CorruptCacheError naming `path`."""
    try:
        outer = json.loads(data)
        body, found = outer["body"], outer["sha256"]
        written = seal(body)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCacheError(
            explain(f"{path} is damaged", expected="sealed JSON", found=type(error).__name__)
        ) from error
    # The bytes and not the hash alone: one bit makes 1E-05 of 1e-05, which is the same number.
    if data != written:
        raise CorruptCacheError(
            explain(
                f"{path} is damaged: sha256 or form",
                expected=shown(found),
                found=shown(hash_json(body)),
            )
        )
    return body


def bounded(value: int, low: int, high: int, what: str) -> int:
    """`value` if it lies in the bounds; else UnsafeError."""
    if not low <= value <= high:
        raise UnsafeError(explain(what, expected=f"{low} to {high}", found=shown(value)))
    return value
