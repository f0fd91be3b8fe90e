"""What is known of a committed file."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

from sherl_pipe.cache.fingerprint import hash_bytes
from sherl_pipe.cache.schema import MAX_ROWS
from sherl_pipe.cache.sealed import bounded, take


@dataclass(frozen=True)
class FileRecord:
    """What is known of a committed file.

    Not crc32c: a Zarr shard ends every chunk and its index with the crc32c of what precedes it,
    and the crc32c of such a sequence depends on the lengths alone. Two shards of equal length
    have the same one, so it cannot tell a swapped shard.
    """

    size: int
    crc32: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> FileRecord:
        return cls(len(data), zlib.crc32(data), hash_bytes(data))

    def matches(self, data: bytes) -> bool:
        """Whether size and crc32 are those of `data`; fast enough for every read."""
        return len(data) == self.size and zlib.crc32(data) == self.crc32

    def to_json(self) -> dict[str, Any]:
        return {"bytes": self.size, "crc32": self.crc32, "sha256": self.sha256}

    @classmethod
    def from_json(cls, data: Any, path: str) -> FileRecord:
        return cls(
            bounded(take(data, "bytes", int, path), 0, MAX_ROWS, f"{path}: bytes"),
            bounded(take(data, "crc32", int, path), 0, 0xFFFFFFFF, f"{path}: crc32"),
            take(data, "sha256", str, path),
        )

    def __str__(self) -> str:
        return f"{self.size} bytes with crc32 {self.crc32}"
