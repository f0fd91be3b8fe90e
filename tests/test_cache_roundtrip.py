"""Shards written are the shards read, and a resumed cache equals an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cache_tools import identity, ids_of, values_of, write_split
from sherl_pipe.cache import (
    CODECS,
    CacheWriter,
    CorruptCacheError,
    FeatureCache,
    IncompleteSplitError,
    InputError,
    StaleCacheError,
)
from sherl_pipe.cache.layout import assign, same_shards


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_written_is_read(tmp_path: Path, codec: str) -> None:
    lengths = [3, 1, 7, 2, 5, 4]
    write_split(tmp_path, lengths, codec=codec)
    stream = FeatureCache.open(tmp_path).stream("sst2/train", "hidden")
    assert stream.layout.shards == 3
    tolerance = {"float32": 0.0, "bfloat16": 2.0**-8, "int8": 0.02, "int4": 0.15}[codec]
    for example, length in enumerate(lengths):
        found = stream.read_example(example)
        expected = values_of(example, length)
        assert found.shape == (3, length, 70)
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
        one = stream.read_example(example, taps=[4])
        np.testing.assert_array_equal(one[0], found[2])


def test_any_zarr_reader_can_read_it(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    write_split(tmp_path, [3, 1, 7], codec="float32")
    group = zarr.open_group(tmp_path, mode="r")
    assert group.attrs["sherl_pipe"]["format"] == 1
    values = group["sst2/train/hidden/values"]
    assert values.shape[0] == 3 and values.shape[2] == 280
    assert group["sst2/train/hidden/index"][:].shape == (3, 3)


def test_all_zero_rows_are_stored(tmp_path: Path) -> None:
    write_split(tmp_path, [2, 2], codec="float32", zero=True)
    found = FeatureCache.open(tmp_path).stream("sst2/train", "hidden").read_example(0)
    assert (found == 0).all()


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_resumed_equals_uninterrupted(tmp_path: Path, stop: int) -> None:
    lengths = [3, 1, 7, 2, 5, 4]
    write_split(tmp_path / "whole", lengths)
    assert write_split(tmp_path / "torn", lengths, stop_after=stop) == list(range(stop))
    with pytest.raises(IncompleteSplitError, match=f"{stop} of 3 shards"):
        FeatureCache.open(tmp_path / "torn")
    assert write_split(tmp_path / "torn", lengths) == list(range(stop, 3))
    assert write_split(tmp_path / "torn", lengths) == []
    whole, torn = FeatureCache.open(tmp_path / "whole"), FeatureCache.open(tmp_path / "torn")
    assert whole.content() == torn.content()
    assert torn.verify() == []
    left = [path.name for path in (tmp_path / "torn").rglob("*") if "partial" in path.name]
    assert left == []


def test_empty_split(tmp_path: Path) -> None:
    write_split(tmp_path, [])
    stream = FeatureCache.open(tmp_path).stream("sst2/train", "hidden")
    assert (stream.examples, stream.layout.shards) == (0, 0)


def test_other_data_is_stale(tmp_path: Path) -> None:
    write_split(tmp_path, [3, 1], stop_after=0)
    with pytest.raises(StaleCacheError, match="data"):
        write_split(tmp_path, [3, 1], first_id=7)
    write_split(tmp_path, [3, 1])
    with pytest.raises(StaleCacheError, match="data"):
        write_split(tmp_path, [3, 1], first_id=7)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("backbone weights", {"backbone": {"fingerprint": "x", "config": "c", "dtype": "float32"}}),
        ("backbone config", {"backbone": {"fingerprint": "f", "config": "x", "dtype": "float32"}}),
        ("backbone dtype", {"backbone": {"fingerprint": "f", "config": "c", "dtype": "bfloat16"}}),
        ("tokenizer", {"tokenizer": "x"}),
        ("template", {"template": "task"}),
        ("max_length", {"max_length": 7}),
        ("codec", {"codec": CODECS["float32"]}),
        ("hidden taps", {"taps": (0, 1)}),
    ],
)
def test_expectations_are_held(tmp_path: Path, field: str, change: dict[str, object]) -> None:
    write_split(tmp_path, [3, 1])
    FeatureCache.open(tmp_path, expect=identity())
    with pytest.raises(StaleCacheError, match=field):
        FeatureCache.open(tmp_path, expect=identity(**change))
    if field.endswith("taps"):
        return  # a writer adds them
    with (
        pytest.raises(StaleCacheError, match=field),
        CacheWriter.open(tmp_path, identity(**change)),
    ):
        pass


def test_foreign_format_and_no_cache(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a cache"):
        FeatureCache.open(tmp_path)
    write_split(tmp_path, [3])
    root = tmp_path / "zarr.json"
    root.write_text(root.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(InputError, match="expected 1, found 2"):
        FeatureCache.open(tmp_path)


def test_unknown_tap_and_split_are_named(tmp_path: Path) -> None:
    write_split(tmp_path, [3])
    cache = FeatureCache.open(tmp_path)
    with pytest.raises(InputError, match="tap 1"):
        cache.stream("sst2/train", "hidden").read_shard(0, taps=[1])
    with pytest.raises(InputError, match="sst2/train"):
        cache.streams("cola/train")


def test_layout_is_a_partition() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 500)
    layout = assign(lengths, 256, seed=3)
    for shard in range(layout.shards):
        members = layout.members(shard)
        rows = layout.index[members]
        np.testing.assert_array_equal(rows[:, 1], np.cumsum(rows[:, 2]) - rows[:, 2])
        assert rows[:, 2].sum() <= 256 and (np.diff(rows[:, 2]) >= 0).all()
    prefix = same_shards(layout, 4)
    np.testing.assert_array_equal(prefix.index[:, 0], layout.index[:, 0])
    for shard in range(layout.shards):
        np.testing.assert_array_equal(prefix.members(shard), layout.members(shard))
    with pytest.raises(InputError, match="max-length"):
        assign(np.array([300]), 256, seed=0)


def test_swapped_shards_are_found(tmp_path: Path) -> None:
    # Two shards of the same size would decode without complaint in each other's place.
    write_split(tmp_path, [4, 4], capacity=4)
    first, second = sorted((tmp_path / "sst2/train/hidden/values/c/0").glob("*/0"))
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    stream = FeatureCache.open(tmp_path).stream("sst2/train", "hidden")
    with pytest.raises(CorruptCacheError, match="shard 0"):
        stream.read_shard(0)


def test_ids_name_content() -> None:
    assert len(set(ids_of(50))) == 50
