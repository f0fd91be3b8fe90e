"""Weights as hashes, and as byte ranges of safetensors files.

A memory-mapped file counts as resident memory wherever it was touched. Here a file is read
through one small buffer per thread, so hashing a whole checkpoint costs the memory of the
tensors that are kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from sherl_pipe.cache.fingerprint import canonical_json, hash_json
from torch import Tensor, nn

PIECE = 1 << 20  # bytes read at a time; whole elements of every type

Item = TypeVar("Item")
Result = TypeVar("Result")

# Types of safetensors that become float32 without a conversion of their own.
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class UnusualCheckpointError(Exception):
    """A checkpoint that only Hugging Face's own loading can be trusted with."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        file: where it is.
        start: offset of its first byte.
        dtype: as stored; None for a type that does not simply become float32.
        shape: its dimensions.
    """

    file: Path
    start: int
    dtype: torch.dtype | None
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def pieces(self) -> Iterator[Tensor]:
        """Its values in order, as float32 `[n]`; each piece is overwritten by the next.

        Raises UnusualCheckpointError for a type that needs a conversion of its own, or where the
        file has become shorter; OSError as reading does.
        """
        if self.dtype is None:
            raise UnusualCheckpointError(f"{self.file} has weights of an unusual type")
        left = self.elements * self.dtype.itemsize
        buffer = memoryview(bytearray(min(PIECE, left)))
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            while left:
                piece = buffer[: min(PIECE, left)]
                filled = 0
                while filled < len(piece):
                    got = file.readinto(piece[filled:])
                    if not got:
                        raise UnusualCheckpointError(f"{self.file} ends too early")
                    filled += got
                left -= filled
                yield torch.frombuffer(piece, dtype=self.dtype).float()


def read_header(file: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds, by name.

    Raises UnusualCheckpointError for a broken file.
    """
    from safetensors import SafetensorError, safe_open

    if sys.byteorder != "little":
        raise UnusualCheckpointError("safetensors files are little-endian")
    try:
        # The library checks the whole header against the file's size; it touches no tensor.
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UnusualCheckpointError(f"{file}: {error}") from error
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            file,
            8 + length + entry["data_offsets"][0],
            _TYPES.get(entry["dtype"]),
            tuple(entry["shape"]),
        )
        for name, entry in header.items()
    }


def weights_fingerprint(model: nn.Module) -> str:
    """sha256 over the sorted hashes of all weights, as float32 where they are floating."""

    def digest(item: tuple[str, Tensor]) -> tuple[str, str]:
        name, weight = item
        # Half-precision checkpoints get one fingerprint whatever dtype they are run in.
        weight = weight.detach().cpu()
        weight = (weight.float() if weight.is_floating_point() else weight).contiguous()
        hasher = _hasher(name, weight.shape)
        hasher.update(weight.reshape(-1).view(torch.uint8).numpy())
        return name, hasher.hexdigest()

    return fingerprint_of(in_threads(digest, model.state_dict().items()))


def read_and_hash(
    stored: StoredTensor, names: Sequence[str], keep: bool | Sequence[int]
) -> tuple[Tensor | None, list[tuple[str, str]]]:
    """One pass over a stored tensor.

    Args:
        stored: where it is.
        names: every name that the model has for it.
        keep: whether its values are wanted, or which rows of its first axis.

    Returns the values, float32 of its shape (or `[rows, ...]`), if wanted; and its hash under each
    name, for `fingerprint_of`. Raises what `StoredTensor.pieces` raises, and
    UnusualCheckpointError where a row is wanted that it does not have.
    """
    hashers = [_hasher(name, stored.shape) for name in names]
    shape = stored.shape
    # What is kept, as (first element here, one past the last, first element there).
    kept = [(0, stored.elements, 0)] if keep is True else []
    if not isinstance(keep, bool):
        size = math.prod(shape[1:])
        kept = [(row * size, (row + 1) * size, place * size) for place, row in enumerate(keep)]
        if kept and max(kept)[1] > stored.elements:
            raise UnusualCheckpointError(f"{names[0]} has {shape[0]} rows")
        shape = (len(kept), *shape[1:])
    values = torch.empty(math.prod(shape) if kept else 0, dtype=torch.float32)
    done = 0
    for piece in stored.pieces():
        raw = piece.view(torch.uint8).numpy()
        for hasher in hashers:
            hasher.update(raw)
        for first, last, place in kept:
            start, end = max(first, done), min(last, done + len(piece))
            if start < end:
                at = place + start - first
                values[at : at + end - start] = piece[start - done : end - done]
        done += len(piece)
    hashes = [(name, hasher.hexdigest()) for name, hasher in zip(names, hashers, strict=True)]
    return (values.reshape(shape) if kept else None), hashes


def same_values(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two stored tensors are equal in shape and values. Raises what `pieces` raises."""
    if first == second:
        return True
    # Pieces of one type have one length and can be compared side by side.
    if first.dtype != second.dtype:
        raise UnusualCheckpointError("tied weights of two types")
    if first.shape != second.shape:
        return False
    pairs = zip(first.pieces(), second.pieces(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def fingerprint_of(hashes: Iterable[tuple[str, str]]) -> str:
    """The fingerprint of a model from the hash of every weight by name."""
    return hash_json(sorted(hashes))


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`work` on every item, shared by threads: hashlib lets go of the interpreter's lock."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, items))


def _hasher(name: str, shape: Sequence[int]) -> Any:
    return hashlib.sha256(canonical_json([name, list(shape)]))
