"""The device's codecs are numpy's, bit for bit, and keep their stated error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sherl_pipe.cache import CODECS, NonFiniteError
from sherl_pipe.stages import quantize

ERROR = {"float32": 0.0, "bfloat16": 2.0**-8, "int8": 0.02}


def states(width: int) -> np.ndarray:
    """Values of every size, with outliers, zeros, and tiny groups."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 50, width)) * 10.0 ** rng.integers(-6, 4, (3, 50, 1))
    values[:, 3] = 0
    values[:, 4] = 1e-9
    values[0, :, 5] *= 40
    return values.astype(np.float32)


@pytest.mark.parametrize("width", [64, 70, 384])
@pytest.mark.parametrize("name", CODECS)
def test_bit_identical(name: str, width: int) -> None:
    codec, values = CODECS[name], states(width)
    codes, scales = codec.encode(values)
    device_codes, device_scales = quantize.encode(codec, torch.from_numpy(values))
    np.testing.assert_array_equal(codes, device_codes.numpy())
    if scales is not None:
        assert device_scales is not None
        np.testing.assert_array_equal(scales, device_scales.numpy())
    decoded = codec.decode(codes, scales, width)
    found = quantize.decode(codec, device_codes, device_scales, width)
    np.testing.assert_array_equal(decoded, found.numpy())
    assert codes.shape[-1] == codec.code_bytes(width)
    assert not (codes == codec.fill).all(-1).any()


@pytest.mark.parametrize("name", CODECS)
def test_error_per_token(name: str) -> None:
    codec = CODECS[name]
    values = np.random.default_rng(1).standard_normal((2, 400, 384)).astype(np.float32)
    decoded = codec.decode(*codec.encode(values), 384)
    error = np.linalg.norm(decoded - values, axis=-1) / np.linalg.norm(values, axis=-1)
    assert np.quantile(error, 0.99) <= ERROR[name]


@pytest.mark.parametrize(
    ("name", "bad"),
    [("int8", np.nan), ("int8", np.inf), ("int8", 9e6), ("bfloat16", 3.4e38), ("float32", np.inf)],
)
def test_what_cannot_be_held_is_refused(name: str, bad: float) -> None:
    codec, values = CODECS[name], states(70)
    values[1, 7, 2] = bad
    with pytest.raises(NonFiniteError):
        codec.encode(values)
    flags = quantize.overflowed(codec, torch.from_numpy(values)).numpy()
    assert flags[1, 7] and flags.sum() == 1
