"""Codecs: the device decodes what numpy decodes, bit for bit, within the stated error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cache_tools import encode
from sherl_pipe.cache import CODECS, NonFiniteError, StreamSpec
from sherl_pipe.cache.layout import assign
from sherl_pipe.stages import quantize, shard_buffer

# 99th percentile of the relative error of a token, and what a tap like its neighbour may have.
ERROR = {"float32": 0.0, "bfloat16": 2.0**-8, "int8": 0.01, "int4": 0.08}


def states(width: int) -> np.ndarray:
    """Values of every size, with outliers, zeros, tiny groups, and a tap like the one before."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4, 50, width)) * 10.0 ** rng.integers(-6, 4, (4, 50, 1))
    values[2] = values[1] * 1.1 + 0.01 * values[3]
    values[:, 3] = 0
    values[:, 4] = 1e-9
    values[0, :, 5] *= 40
    values[:, 6] = 1e-44  # subnormal
    return values.astype(np.float32)


@pytest.mark.parametrize("width", [8, 36, 64, 70, 384])
@pytest.mark.parametrize("name", CODECS)
def test_decoding_is_bit_identical(name: str, width: int) -> None:
    codec, values = CODECS[name], states(width)
    codes, scales = encode(codec, values)
    decoded = codec.decode(codes, scales, width)
    device = [None if each is None else torch.from_numpy(each) for each in (codes, scales)]
    assert device[0] is not None
    found = quantize.decode(codec, device[0], device[1], width)
    np.testing.assert_array_equal(decoded.view(np.uint32), found.numpy().view(np.uint32))
    chosen = torch.tensor([3, 0, 49, 3])
    some = quantize.decode(codec, device[0], device[1], width, rows=chosen)
    assert torch.equal(some, found[:, chosen])
    picked = quantize.decode(codec, device[0], device[1], width, [2, 0]) if codec.chained else None
    assert picked is None or torch.equal(picked, found[[2, 0]])
    assert codes.shape[-1] == codec.code_bytes(width)
    assert (0 if scales is None else scales.shape[-1]) == codec.scale_bytes(width)
    assert np.isfinite(decoded).all() and not decoded[:, 3].any()


@pytest.mark.parametrize("name", CODECS)
def test_rows_that_hold_nothing_decode_to_no_number(name: str) -> None:
    codec = CODECS[name]
    codes = np.full((2, 3, codec.code_bytes(70)), codec.fill, np.uint8)
    scales = np.full((2, 3, codec.scale_bytes(70)), 0xFF, np.uint8)
    with np.errstate(invalid="ignore"):
        assert np.isnan(codec.decode(codes, scales, 70)).all()


@pytest.mark.parametrize("outlier", [1.0, 300.0])
@pytest.mark.parametrize("name", CODECS)
def test_error_per_token(name: str, outlier: float) -> None:
    """Gaussian states, with one channel far above the others as real models have it."""
    codec, rng = CODECS[name], np.random.default_rng(1)
    values = rng.standard_normal((3, 400, 384)).astype(np.float32)
    values[..., 7] *= outlier
    decoded = codec.decode(*encode(codec, values), 384)
    error = np.linalg.norm(decoded - values, axis=-1) / np.linalg.norm(values, axis=-1)
    assert np.quantile(error, 0.99) <= ERROR[name]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_tap_near_the_one_before_is_coded_as_their_difference(name: str) -> None:
    """Smaller numbers or a smaller error; and errors do not add up along the taps."""
    codec, rng = CODECS[name], np.random.default_rng(2)
    first = rng.standard_normal((1, 200, 64))
    near = (first + 0.2 * rng.standard_normal((12, 200, 64)).cumsum(0) * 0.5).astype(np.float32)
    codes, scales = encode(codec, near)
    assert scales is not None
    decoded = codec.decode(codes, scales, 64)
    error = np.linalg.norm(decoded - near, axis=-1) / np.linalg.norm(near, axis=-1)
    assert error[-1].mean() <= error[0].mean() * 1.05
    if name == "int8":
        spread = np.abs(codes.view(np.int8).astype(int)).mean(axis=(1, 2))
        assert spread[1:].max() < 0.5 * spread[0]
    else:
        assert error[1:].mean() < 0.3 * error[0].mean()


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("int8", np.nan),
        ("int8", np.inf),
        ("int4", -np.inf),
        ("int8", 1e19),
        ("int4", 1e37),
        ("bfloat16", 3.4e38),
        ("float32", np.inf),
    ],
)
def test_what_cannot_be_held_is_found(name: str, bad: float) -> None:
    codec, values = CODECS[name], states(70)
    assert not quantize.overflowed(codec, torch.from_numpy(values)).any()
    values[1, 7, 2] = bad
    flags = quantize.overflowed(codec, torch.from_numpy(values)).numpy()
    assert flags[1, 7] and flags.sum() == 1


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("size", [1e6, 0.9 * quantize.LONGEST, 1e-20, 1e-35])
def test_states_of_any_length_that_is_not_refused_are_held(name: str, size: float) -> None:
    """Some models have states beyond float16."""
    values = np.random.default_rng(5).standard_normal((3, 20, 64))
    values *= size / np.linalg.norm(values, axis=-1).max()
    coded = values.astype(np.float32)
    assert not quantize.overflowed(CODECS[name], torch.from_numpy(coded)).any()
    decoded = CODECS[name].decode(*encode(CODECS[name], coded), 64).astype(np.float64)
    error = np.linalg.norm(decoded - values, axis=-1)
    assert (error <= 0.12 * np.linalg.norm(values, axis=-1)).all()


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("width", [64, 36])
def test_turned_values_times_turned_weights(name: str, width: int) -> None:
    """What is left turned is turned back, or turns the weights; evaluation may come first."""
    quantize._hadamard.cache_clear()
    codec = CODECS[name]
    values = torch.randn(3, 7, width).cumsum(0)
    codes, scales = quantize.encode(codec, values)
    with torch.inference_mode():
        plain = quantize.decode(codec, codes, scales, width)
        turned = quantize.decode(codec, codes, scales, width, turned=True)
        assert torch.allclose(quantize.turn(turned, codec.group), plain, atol=1e-5)
    assert torch.equal(quantize.turn(plain, 0), plain)
    turned = quantize.decode(codec, codes, scales, width, turned=True)
    weights = [torch.randn(5, width, requires_grad=True)]
    weights.append(weights[0].detach().clone().requires_grad_())
    products = [plain.clone() @ weights[0].T, turned @ quantize.turn(weights[1], codec.group).T]
    for product in products:
        product.square().sum().backward()
    assert torch.allclose(products[0], products[1], atol=1e-4)
    first, second = (weight.grad for weight in weights)
    assert first is not None and second is not None
    assert (first - second).abs().max() < 1e-4 * first.abs().max()


@pytest.mark.parametrize("name", CODECS)
def test_shards_do_not_depend_on_how_many_tokens_are_coded_at_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.from_numpy(states(48))
    values[1, 3, 0] = torch.nan
    found = []
    for block, batch in ((1 << 20, values.shape[1]), (7, 11), (1, 11)):
        monkeypatch.setattr(shard_buffer, "BLOCK", block)
        spec = StreamSpec(tuple(range(len(values))), len(values), values.shape[-1])
        buffer = shard_buffer.ShardBuffer(CODECS[name], spec, values.shape[1], torch.device("cpu"))
        for part in values.split(batch, dim=1):
            buffer.add(part)
        layout, ids = assign(np.full(values.shape[1], 1), values.shape[1], 0), [b"x"] * 99
        with pytest.raises(NonFiniteError, match="at tap 1 of 1 examples"):
            buffer.check("split", 0, layout, ids)
        found.append(buffer.arrays())
    clean = np.arange(values.shape[1]) != 3
    whole, *others = found
    for other in others:
        for first, second in zip(whole, other, strict=True):
            assert (first is None) == (second is None)
            if first is not None and second is not None:
                np.testing.assert_array_equal(first[:, clean], second[:, clean])
