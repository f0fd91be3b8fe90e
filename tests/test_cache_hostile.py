"""Caches that somebody made to do harm: every seal is valid, what is sealed is not."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from cache_tools import WIDTH, write_split
from sherl_pipe.cache import FeatureCache, errors
from sherl_pipe.cache.arrays import ArraySpec, table_array
from sherl_pipe.cache.manifest import FileRecord
from sherl_pipe.cache.sealed import seal, unseal
from test_cache_faults import (  # noqa: F401 - a fixture acts where its name is
    HIDDEN,
    TRAIN,
    _no_disk_waits,
    forked,
    write,
    write_whole,
)
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

MANIFEST, PLAN = f"{HIDDEN}/manifest.json", f"{HIDDEN}/plan.json"
RECEIPT, LABELS = f"{HIDDEN}/receipts/0.json", "_labels/size/train.json"
SHARD = f"{HIDDEN}/values/c/0/0/0"
GONE = object()
Place = tuple[str, ...]


def forge(file: Path, place: Place, value: Any) -> None:
    """Change one field of a sealed file, and seal it again."""
    inside = body = unseal(file.read_bytes(), "")
    for name in place[:-1]:
        inside = inside[name]
    if value is GONE:
        del inside[place[-1]]
    else:
        inside[place[-1]] = value
    file.write_bytes(seal(body))


def put(path: Path, key: str, data: bytes) -> None:
    """Other bytes for a committed file, which its manifest vouches for."""
    (path / key).write_bytes(data)
    forge(path / MANIFEST, ("files", key), FileRecord.of(data).to_json())


def places(body: Any, above: Place = ()) -> Iterator[Place]:
    for name, value in body.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from places(value, (*above, name))


def used(path: Path) -> errors.SherlPipeError | None:
    try:
        cache = FeatureCache.open(path)
        for split in cache.splits:
            stream = cache.stream(split, "hidden")
            assert len(stream.ids) == len(stream.layout.index) == stream.examples
            for shard in range(stream.layout.shards):
                stream.read_shard(shard)
        assert list(cache.tasks.get("size", {})) in (["train"], [])
        cache.verify()
    except errors.SherlPipeError as error:
        return error
    return None


def begin(path: Path) -> None:
    write_split(path, [9, 9, 9], stop_after=2)


def resumed(path: Path) -> errors.SherlPipeError | None:
    try:
        write_split(path, [9, 9, 9])
    except errors.SherlPipeError as error:
        return error
    return None


VALUES = [GONE, None, True, -1, 1.5, 1 << 36, 1 << 62, 10**4000, float("inf"), "x", [], [[]], {}]
# What a cache says about itself, and no reading depends on; or what only another hash can tell.
FREE = {"notes", "data", "sha256", "metrics", "words", "classes"}


@pytest.mark.parametrize("key", [MANIFEST, PLAN, RECEIPT, LABELS])
@pytest.mark.parametrize("number", [20, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_field_may_be_anything(tmp_path: Path, key: str, number: int) -> None:
    """One line that names the file, or no harm done."""
    make, check = (begin, resumed) if key in (PLAN, RECEIPT) else (write_whole, used)
    good, path = tmp_path / "good", tmp_path / "forged"
    make(good)
    pairs = [*itertools.product(places(unseal((good / key).read_bytes(), "")), VALUES)]
    for place, value in random.Random(key).sample(pairs, min(number, len(pairs))):
        shutil.copytree(good, path)
        forge(path / key, place, value)
        error = check(path)
        if error is None:  # a receipt that does not match has its shard done again
            assert place[-1] in FREE or key == RECEIPT, (place, value)
        else:
            text = str(error)
            assert str(path) in text and "\n" not in text and len(text) < 1000, (place, text)
            assert error.exit_code in (4, 5, 8), (place, text)
        shutil.rmtree(path)


@pytest.mark.parametrize(
    ("place", "value", "kind", "words"),
    [
        (("plan",), GONE, errors.CorruptCacheError, "field 'plan': expected dict, found None"),
        (("plan", "split"), 5, errors.CorruptCacheError, "field 'split': expected str, found 5"),
        (("plan", "format"), 2, errors.CorruptCacheError, "'format': expected 1, found 2"),
        (("plan", "layout", "rows"), True, errors.CorruptCacheError, "expected int, found True"),
        (("plan", "layout", "rows"), 19, errors.UnsafeError, "rows: expected 0 to 18, found 19"),
        (("plan", "layout", "rows"), 17, errors.CorruptCacheError, "rows: expected 18, found 17"),
        (("plan", "layout", "examples"), 1 << 36, errors.UnsafeError, "a shard of 'ids'"),
        (("plan", "layout", "shards"), 1 << 30, errors.CorruptCacheError, "each of 1073741824"),
        (("plan", "layout", "capacity"), 1 << 38, errors.UnsafeError, "a shard of 'values'"),
        (("plan", "layout", "capacity"), 1 << 40, errors.UnsafeError, "rows of all shards"),
        (("files", SHARD), GONE, errors.CorruptCacheError, f"lacks '{SHARD}'"),
        (("files", SHARD, "bytes"), "9", errors.CorruptCacheError, "'bytes': expected int"),
        (("files", SHARD, "crc32"), -1, errors.UnsafeError, "crc32: expected 0 to 4294967295"),
    ],
)
def test_manifest(tmp_path: Path, place: Place, value: Any, kind: type, words: str) -> None:
    write_whole(tmp_path)
    forge(tmp_path / MANIFEST, place, value)
    error = used(tmp_path)
    assert type(error) is kind and words in str(error) and str(tmp_path / MANIFEST) in str(error)
    assert f"delete {tmp_path / HIDDEN} and extract again" in str(error)
    with pytest.raises((kind, errors.StaleCacheError)):  # nor does a writer believe it
        write(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("role",), "validation", "expected those of its name, found 'size', 'validation'"),
        (("spec", "kind"), "ranking", "kind: expected classification or regression"),
        (("spec", "classes"), "ab", "field 'spec': classes: expected a list of texts, found 'ab'"),
        (("ids",), ["00" * 16, "zz"], "'ids' holds more than example ids"),
        (("ids",), ["00" * 16, "00"], "row 2: bytes of the id: expected 16, found 1"),
        (("ids",), ["00" * 16], "1 ids and 2 labels"),
        (("labels",), [1.5, "2"], "expected a finite number, found '2'"),
        (("labels",), [1.5, 10**400], "expected a finite number, found 1000"),
    ],
)
def test_labels(tmp_path: Path, place: Place, value: Any, words: str) -> None:
    write_whole(tmp_path)
    forge(tmp_path / LABELS, place, value)
    error = used(tmp_path)
    assert type(error) is errors.CorruptCacheError and words in str(error)
    assert str(tmp_path / LABELS) in str(error) and "Delete it and attach the labels again" in str(
        error
    )


def test_receipt_of_other_files(tmp_path: Path) -> None:
    for place, words in ((("shard",), "expected 0, found 1"), (("files",), "lacks")):
        begin(tmp_path)
        other = unseal((tmp_path / RECEIPT.replace("0.", "1.")).read_bytes(), "")
        forge(tmp_path / RECEIPT, place, other[place[0]])
        error = resumed(tmp_path)
        assert error is not None and words in str(error) and str(tmp_path / RECEIPT) in str(error)
        shutil.rmtree(tmp_path / TRAIN)


ROOTS: list[tuple[Place, Any, str]] = [
    (("backbone", "config"), [[]], "field 'config': expected text or a number, found list"),
    (("streams", "hidden", "taps"), [0, "2"], "hidden: field 'taps' holds more than whole"),
    (("streams", "hidden", "taps"), [], "taps: expected 1 to 4096, found 0"),
    (("streams", "hidden", "width"), 1 << 40, "width: expected 1 to 1048576"),
    (("streams", "a/b"), {}, "stream name 'a/b': expected letters"),
    (("codec",), {"name": "blosc"}, "codec: expected one of .*, found 'name': 'blosc'."),
    (("codec",), [], "codec: expected one of .*, found list"),
    (("seed",), 10**4000, "made for a cache with other settings"),
    (("seed",), None, "field 'seed': expected int, found None"),
    (("versions",), {"zarr": {}}, "versions: field 'zarr': expected str, found dict"),
]


@pytest.mark.parametrize(("place", "value", "words"), ROOTS)
def test_root(tmp_path: Path, place: Place, value: Any, words: str) -> None:
    write(tmp_path, TRAIN)
    metadata = json.loads((tmp_path / "zarr.json").read_bytes())
    inside = metadata["attributes"]["sherl_pipe"]
    for name in place[:-1]:
        inside = inside[name]
    inside[place[-1]] = value
    put(tmp_path, "zarr.json", json.dumps(metadata).encode())
    with pytest.raises(errors.SherlPipeError, match=f"{tmp_path}.*{words}") as caught:
        FeatureCache.open(tmp_path)
    assert len(str(caught.value)) < 1000


INDICES = [
    ([[0, 0, 9], [0, 0, 9], [0, 0, 9], [1, 0, 9]], "overlaps"),
    ([[0, 1, 4], [0, 5, 2], [1, 0, 5], [1, 5, 7]], "gaps"),
    ([[2, 0, 4], [0, 0, 2], [1, 0, 5], [1, 5, 7]], "outside the shards"),
    ([[0, (1 << 63) - 1, (1 << 63) - 1], [0, 0, 2], [1, 0, 5], [1, 5, 7]], "outside the shards"),
    ([[0, 0, 4], [0, 4, 2], [1, 0, 5], [1, 5, 3]], "rows: expected 14, found 18"),
]


@pytest.mark.parametrize(("index", "words"), INDICES)
def test_index(tmp_path: Path, index: list[list[int]], words: str) -> None:
    write(tmp_path, TRAIN)
    spec = table_array("index", (4, 3), "int64")
    put(tmp_path, f"{HIDDEN}/index/c/0/0", spec.encode(0, np.array(index, np.int64)))
    with pytest.raises(errors.CorruptCacheError, match=words) as caught:
        FeatureCache.open(tmp_path).stream(TRAIN, "hidden").read_shard(0)
    assert str(tmp_path / HIDDEN) in str(caught.value)


def values(capacity: int) -> ArraySpec:
    shape = (3, 2 * capacity, WIDTH)
    return ArraySpec("values", shape, (3, capacity, WIDTH), (1, capacity, WIDTH), "uint8", 128)


def without_chunks(spec: ArraySpec) -> bytes:
    """A whole shard whose index says that all chunks but one are fill."""
    files: dict[str, Any] = {}
    codecs = [ZstdCodec(checksum=True), Crc32cCodec()]
    array = zarr.create_array(
        MemoryStore(files), shape=spec.shape, shards=spec.shard, chunks=spec.chunk,
        dtype=spec.dtype, compressors=codecs, fill_value=128,
    )  # fmt: skip
    array[0, 0, 0] = 1
    return bytes(files["c/0/0/0"].to_bytes())


def bomb() -> bytes:
    """A small file that is whole, and decodes to 192 MiB."""
    spec = values((192 << 20) // 3 // WIDTH)
    return spec.encode(0, np.zeros(spec.shard, np.uint8))


FILES: dict[str, Callable[[], bytes]] = {
    "bomb": bomb,
    "holes": lambda: without_chunks(values(9)),
    "empty": lambda: b"",
    "noise": lambda: random.Random(0).randbytes(3000),
    "short": lambda: values(8).encode(0, np.zeros((3, 8, WIDTH), np.uint8)),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("key", [SHARD, f"{HIDDEN}/ids/c/0/0", f"{HIDDEN}/index/c/0/0"])
def test_file_of_other_chunks(tmp_path: Path, name: str, key: str) -> None:
    """Refused before a byte is decoded, as it may be decoded to anything."""
    write(tmp_path, TRAIN)
    put(tmp_path, key, FILES[name]())
    stream = FeatureCache.open(tmp_path).stream(TRAIN, "hidden")
    with pytest.raises(errors.UnsafeError, match="chunk") as caught:
        _ = (stream.ids, stream.read_shard(0))
    assert str(tmp_path / key) in str(caught.value) and caught.value.exit_code == 8


def test_damage_inside_a_chunk_of_the_right_size(tmp_path: Path) -> None:
    for key in (SHARD, f"{HIDDEN}/ids/c/0/0"):
        write(tmp_path / key, TRAIN)
        data = bytearray((tmp_path / key / key).read_bytes())
        data[20] ^= 1
        put(tmp_path / key, key, bytes(data))
        stream = FeatureCache.open(tmp_path / key).stream(TRAIN, "hidden")
        with pytest.raises(errors.CorruptCacheError, match=key):
            _ = (stream.ids, stream.read_shard(0))


def read_with_8_gib(path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    with pytest.raises(errors.UnsafeError, match="larger than the free memory"):
        FeatureCache.open(path)


def test_file_larger_than_memory(tmp_path: Path) -> None:
    write(tmp_path, TRAIN)
    with (tmp_path / MANIFEST).open("r+b") as file:
        file.truncate(64 << 30)  # a hole: no disk is used
    pid = forked(read_with_8_gib, tmp_path)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_shard_that_shrinks_far_is_read_while_it_is_small(tmp_path: Path) -> None:
    spec = values(9)
    data = spec.encode(0, np.zeros(spec.shard, np.uint8))
    assert len(data) < 300
    np.testing.assert_array_equal(spec.decode(0, data, None, 9), np.zeros(spec.shard))
