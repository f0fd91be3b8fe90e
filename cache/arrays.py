"""Zarr v3 arrays of a stream: their metadata, and shards to and from bytes.

Zarr builds and parses every byte; files reach the disk only through `store.py`. An array lives in
a memory store for as long as a shard is built or decoded, so what Zarr sees is exactly what was
checked against the manifest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from sherl_pipe.cache.codecs import Codec
from sherl_pipe.cache.errors import UnsafeError, explain
from sherl_pipe.cache.schema import StreamSpec
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import MemoryStore

# MiniLM's int8 codes take 6.37, 6.26, 6.20 and 6.17 bits a value at levels 1 to 4, at 700, 640, 420
# and 340 MB/s of a processor. What the higher ones find is tap 0, which repeats itself.
ZSTD_LEVEL = 2


@dataclass(frozen=True)
class ArraySpec:
    """One Zarr array of a stream.

    `shape`, `shard` and `chunk` are Zarr's; a one-shard array has `shard == shape`.
    """

    name: str
    shape: tuple[int, ...]
    shard: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: str
    fill: Any

    def metadata(self) -> bytes:
        """The array's `zarr.json`."""
        files: dict[str, Buffer] = {}
        self._create(files)
        return files["zarr.json"].to_bytes()

    def encode(self, shard: int, block: npt.NDArray[Any]) -> bytes:
        """The bytes of the file of `shard`, of a `block` of the shard's shape."""
        files: dict[str, Buffer] = {}
        array = self._create(files)
        array[self._region(shard)] = block
        return files[self.chunk_key(shard)].to_bytes()

    def decode(
        self,
        shard: int,
        data: bytes,
        taps: Sequence[int] | None,
        rows: int,
        out: npt.NDArray[Any] | None = None,
        slots: Sequence[int] | None = None,
        room: int | None = None,
    ) -> npt.NDArray[Any]:
        """The first `rows` rows (axis 1) of the listed `taps` (axis 0) of a shard's file.

        They are put into `out` if there is one, in which case the file and one chunk are all that
        it takes of memory; at its places `slots`, by default one after another. Without one there
        is `room` for so many taps, by default for the listed ones.

        Raises UnsafeError for chunks of other sizes; ValueError, RuntimeError for damaged ones.
        """
        self._check_chunks(data)
        buffer = default_buffer_prototype().buffer.from_bytes(data)
        files: dict[str, Buffer] = {}
        array = self._create(files)
        files[self.chunk_key(shard)] = buffer
        start = shard * self.shard[1]
        window = slice(start, start + rows)
        # One chunk is one tap, so only the listed taps are decompressed.
        wanted = range(self.shape[0]) if taps is None else taps
        if out is None:
            out = np.empty((room or len(wanted), rows, self.shape[2]), self.dtype)
        for place, tap in zip(slots or range(len(wanted)), wanted, strict=True):
            out[place] = array[tap, window]
        return out

    @property
    def shard_bytes(self) -> int:
        """Bytes of a shard before compression."""
        return math.prod(self.shard) * np.dtype(self.dtype).itemsize

    def chunk_key(self, shard: int) -> str:
        """The file of a shard, below the array's folder."""
        place = ["0"] * len(self.shape)
        place[1 if len(self.shape) > 2 else 0] = str(shard)
        return "/".join(["c", *place])

    def _check_chunks(self, data: bytes) -> None:
        """Raise UnsafeError unless every chunk in a shard's file says that it has a chunk's size.

        Zarr takes a chunk that is not there for fill, and zstd reserves whatever a frame asks for.
        """
        chunks = math.prod(self.shard) // math.prod(self.chunk)
        size = self.shard_bytes // chunks
        places = data[-(16 * chunks + 4) : -4]  # offset and length of each; then a crc32c
        if len(places) < 16 * chunks:
            raise UnsafeError(f"{len(data)} bytes are too few for {chunks} chunks")
        for start, length in np.frombuffer(places, "<u8").reshape(-1, 2).tolist():
            inside = start + length <= len(data)
            found = _frame_bytes(data[start : start + min(length, 18)]) if inside else None
            if found != size:
                raise UnsafeError(explain("bytes in a chunk", expected=size, found=found))

    def _region(self, shard: int) -> tuple[slice, ...]:
        axis = 1 if len(self.shape) > 2 else 0
        region = [slice(None)] * len(self.shape)
        region[axis] = slice(shard * self.shard[axis], (shard + 1) * self.shard[axis])
        return tuple(region)

    def _create(self, files: dict[str, Buffer]) -> zarr.Array[Any]:
        # The memory store keeps the very dict it is given.
        return zarr.create_array(
            MemoryStore(files),
            shape=self.shape,
            shards=self.shard,
            chunks=self.chunk,
            dtype=self.dtype,
            compressors=[ZstdCodec(level=ZSTD_LEVEL, checksum=True), Crc32cCodec()],
            fill_value=self.fill,
            config={"write_empty_chunks": True},
        )


def _frame_bytes(frame: bytes) -> int | None:
    """The decoded size in a zstd frame's header (RFC 8878, 3.1.1); None where it has none."""
    if len(frame) < 5 or frame[:4] != b"\x28\xb5\x2f\xfd":
        return None
    flags = frame[4]
    single = flags >> 5 & 1
    width = (single, 2, 4, 8)[flags >> 6]
    start = 6 - single + (0, 1, 2, 4)[flags & 3]
    size = int.from_bytes(frame[start : start + width], "little")
    return (size + 256 if width == 2 else size) if width else None


def stream_arrays(
    spec: StreamSpec, codec: Codec, capacity: int, shards: int
) -> dict[str, ArraySpec]:
    """The feature arrays of a stream: `values`, and `scales` where the codec has them."""
    taps, rows = len(spec.taps), capacity * shards
    widths: list[tuple[str, int, str, Any]] = [
        ("values", codec.code_bytes(spec.width), "uint8", codec.fill)
    ]
    if codec.scale_bytes(spec.width):
        # 0xFFFF is no number, as a bfloat16.
        widths.append(("scales", codec.scale_bytes(spec.width), "uint8", 0xFF))
    return {
        name: ArraySpec(
            name,
            shape=(taps, rows, width),
            shard=(taps, capacity, width),
            chunk=(1, capacity, width),
            dtype=dtype,
            fill=fill,
        )
        for name, width, dtype, fill in widths
    }


def table_array(name: str, shape: tuple[int, ...], dtype: str) -> ArraySpec:
    """A small array in one chunk: `index` and `ids`."""
    whole = (max(1, shape[0]), *shape[1:])
    return ArraySpec(name, shape, whole, whole, dtype, 255 if dtype == "uint8" else -1)


def decode_table(spec: ArraySpec, data: bytes | None) -> npt.NDArray[Any]:
    """The content of a `table_array`; an empty one has no file. Raises what `decode` does."""
    files: dict[str, Buffer] = {}
    array = spec._create(files)
    if data is not None:
        spec._check_chunks(data)
        files[spec.chunk_key(0)] = default_buffer_prototype().buffer.from_bytes(data)
    return np.asarray(array[:])


def group_metadata(attributes: dict[str, Any]) -> bytes:
    """The `zarr.json` of a group."""
    files: dict[str, Buffer] = {}
    zarr.create_group(MemoryStore(files), attributes=attributes)
    return files["zarr.json"].to_bytes()
