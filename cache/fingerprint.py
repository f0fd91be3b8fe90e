"""Hashes that name things by their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

ID_BYTES = 16


def canonical_json(data: Any) -> bytes:
    """The one byte form of a JSON value: sorted keys, no blanks, UTF-8."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    # Lone surrogates come from broken text; they still deserve a stable name.
    return text.encode("utf-8", errors="surrogatepass")


def hash_bytes(data: bytes) -> str:
    """sha256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def hash_json(data: Any) -> str:
    """sha256 of the canonical form of a JSON value."""
    return hash_bytes(canonical_json(data))


def example_id(texts: Sequence[str]) -> bytes:
    """The stable id (16 bytes) of an input: a hash of its text, or of both texts of a pair."""
    return hashlib.sha256(canonical_json(list(texts))).digest()[:ID_BYTES]


def data_fingerprint(ids: Iterable[bytes]) -> str:
    """Names a split's content: its example ids in the order of the data."""
    digest = hashlib.sha256()
    for identity in ids:
        digest.update(identity)
    return digest.hexdigest()
