"""The cache under faults: crashes, refusing storage, damaged files, rivals, hostile names."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from cache_tools import identity, ids_of, values_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sherl_pipe.cache import (
    CacheWriter,
    CorruptCacheError,
    FeatureCache,
    IncompleteSplitError,
    InputError,
    LabelTable,
    LockedError,
    SherlPipeError,
    StorageError,
    TaskSpec,
    UnsafeError,
)
from sherl_pipe.cache.layout import assign
from sherl_pipe.cache.store import LocalStore

LENGTHS = {"sst2/validation": [2, 3], "sst2/train": [3, 1, 7, 2]}  # one shard, two shards
BASE = "sst2/train/hidden"
SPEC = identity()
WRITES = ("open", "fsync", "link", "unlink", "rename", "mkdir", "rmdir")
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def _no_disk_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    # A killed process loses nothing that it wrote, synced or not; the waits took all the time.
    monkeypatch.setattr(os, "fsync", lambda _: None)


def write(path: Path, *splits: str, first: int = 0, pause: float = 0) -> list[tuple[str, int]]:
    """Write splits (all by default); the (split, shard) pairs that this call committed."""
    done = []
    with CacheWriter.open(path, SPEC) as writer:
        for split in splits or LENGTHS:
            lengths = LENGTHS.get(split, LENGTHS["sst2/train"])
            layout = assign(np.asarray(lengths, np.int64), 9, seed=0)
            stream = writer.stream(split, "hidden", ids_of(len(lengths), first), layout, {})
            for shard in stream.pending():
                members = layout.members(shard)
                rows = [values_of(int(e) + first, lengths[e]) for e in members]
                stream.commit(shard, *SPEC.codec.encode(np.concatenate(rows, axis=1)))
                done.append((split, shard))
                time.sleep(pause)
            stream.finish()
    return done


def assert_right(cache: FeatureCache, split: str) -> int:
    """Whatever a split gives is the truth; how many examples it refused."""
    stream = cache.stream(split, "hidden")
    lengths, refused = LENGTHS.get(split, LENGTHS["sst2/train"]), 0
    for example, length in enumerate(lengths):
        truth = SPEC.codec.decode(*SPEC.codec.encode(values_of(example, length)), 70)
        try:
            np.testing.assert_array_equal(stream.read_example(example), truth)
        except CorruptCacheError:
            refused += 1
    return refused


class _File:
    """A file whose write of bytes is two operations, so that it can be torn."""

    def __init__(self, file: Any, strike: Callable[[str], None]) -> None:
        self._file, self._strike = file, strike

    def write(self, data: Any) -> None:
        half = len(data) // 2 if isinstance(data, bytes) else 0
        for part in (data[:half], data[half:]):
            self._strike("write")
            self._file.write(part)
            self._file.flush()

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def operations(strike: Callable[[int, str], None], *more: str) -> Iterator[None]:
    """`strike(number, name)` runs before every file-system operation."""
    numbers = itertools.count()

    def struck(name: str) -> None:
        strike(next(numbers), name)

    def hook(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            struck(name)
            return real(*args, **named)

        return call

    hooks: dict[str, Any] = {name: hook(name, getattr(os, name)) for name in (*WRITES, *more)}
    fdopen = os.fdopen
    with patch.multiple(os, **hooks, fdopen=lambda *args, **named: _File(fdopen(*args, **named), struck)):
        yield


def forked(action: Callable[[], object]) -> int:
    """The pid of a child that runs `action`. No exec: imports would take most of the time."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        finally:  # nothing of the child may return into pytest
            os._exit(1)
    return pid
