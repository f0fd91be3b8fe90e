"""Small caches with known content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from sherl_pipe.cache import CODECS, CacheWriter, Codec, Identity, StreamSpec
from sherl_pipe.cache.fingerprint import example_id
from sherl_pipe.cache.layout import assign
from sherl_pipe.stages import quantize

WIDTH = 70  # not a multiple of a group
TAPS = (0, 2, 4)


def identity(taps: tuple[int, ...] = TAPS, **change: Any) -> Identity:
    """The identity of the small caches, with some fields changed."""
    fields: dict[str, Any] = {
        "backbone": {"fingerprint": "f", "config": "c", "dtype": "float32", "name": "tiny"},
        "tokenizer": "t",
        "template": "neutral",
        "max_length": 128,
        "streams": {"hidden": StreamSpec(taps, 5, WIDTH)},
        "codec": CODECS["int8"],
    }
    return Identity(**{**fields, **change})


def ids_of(count: int, first: int = 0) -> list[bytes]:
    return [example_id([f"text {number}"]) for number in range(first, first + count)]


def values_of(example: int, length: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    rng = np.random.default_rng(example)
    return rng.standard_normal((len(TAPS), length, WIDTH)).astype(np.float32)


def encode(codec: Codec, values: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    """Codes and scales of `values [K, n, d]` as arrays."""
    codes, scales = quantize.encode(codec, torch.from_numpy(values))
    return codes.numpy(), None if scales is None else scales.numpy()


def write_split(
    path: Path,
    lengths: list[int],
    *,
    codec: str = "int8",
    capacity: int = 9,
    stop_after: int | None = None,
    first_id: int = 0,
    zero: bool = False,
) -> list[int]:
    """Write `sst2/train`; the shards that this call committed."""
    spec = identity(codec=CODECS[codec])
    layout = assign(np.asarray(lengths, np.int64), capacity, seed=0)
    done = []
    with CacheWriter.open(path, spec) as writer:
        stream = writer.stream("sst2/train", "hidden", ids_of(len(lengths), first_id), layout, {})
        for shard in stream.pending():
            if stop_after is not None and len(done) == stop_after:
                return done
            rows = [values_of(int(e), lengths[e]) for e in layout.members(shard)]
            block = np.concatenate(rows, axis=1)
            stream.commit(shard, *encode(spec.codec, block * 0 if zero else block))
            done.append(shard)
        stream.finish()
    return done
