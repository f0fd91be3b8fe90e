"""The codecs of `cache/codecs.py` on the device: the same bytes and values, bit for bit."""

from __future__ import annotations

import torch
from sherl_pipe.cache import Codec
from sherl_pipe.cache.codecs import INT8_LIMIT
from torch import Tensor


def encode(codec: Codec, values: Tensor) -> tuple[Tensor, Tensor | None]:
    """Codes `uint8 [..., n, code bytes]` and float16 scales of finite `values [..., n, d]`.

    A value that the codec cannot hold shows as a non-finite scale, or as a bfloat16 infinity;
    `overflowed` looks for both.
    """
    values = values.float()
    if codec.name == "int8":
        return _encode_int8(values, codec.group)
    if codec.name == "bfloat16":
        return _split_planes(values.to(torch.bfloat16), 2), None
    return _split_planes(values, 4), None


def overflowed(codec: Codec, values: Tensor) -> Tensor:
    """Boolean `[K, n]`: tokens with a value that is not finite or that the codec cannot hold."""
    values = values.float()
    limit = {
        # The scale of a group, peak / 127, is a float16.
        "int8": INT8_LIMIT * 65519.0,
        "bfloat16": torch.finfo(torch.bfloat16).max,
        "float32": torch.finfo(torch.float32).max,
    }[codec.name]
    # NaN compares false, so it counts as overflowed too.
    return ~(values.abs().amax(-1) <= limit)


def decode(codec: Codec, codes: Tensor, scales: Tensor | None, width: int) -> Tensor:
    """float32 `[..., n, width]` of codes and scales."""
    if codec.name == "int8":
        if scales is None:
            raise TypeError("int8 codes need their scales")
        numbers = codes.view(torch.int8).float()
        if width % codec.group == 0:
            grouped = numbers.view(*numbers.shape[:-1], -1, codec.group)
            return (grouped * scales.float().unsqueeze(-1)).view(numbers.shape)
        spread = scales.float().repeat_interleave(codec.group, dim=-1)[..., :width]
        return numbers * spread
    if codec.name == "bfloat16":
        return _join_planes(codes, 2).view(torch.bfloat16).float()
    return _join_planes(codes, 4).view(torch.float32)


def _encode_int8(values: Tensor, group: int) -> tuple[Tensor, Tensor]:
    width = values.shape[-1]
    padded = torch.nn.functional.pad(values, (0, -width % group))
    grouped = padded.view(*values.shape[:-1], -1, group)
    peak = grouped.abs().amax(-1)
    scales = (peak / INT8_LIMIT).half()
    # A group that is not all zero never gets the scale 0.
    scales = torch.where((peak > 0) & (scales == 0), scales.new_tensor(2.0**-24), scales)
    step = torch.where(scales == 0, 1.0, scales.float())
    codes = (grouped / step.unsqueeze(-1)).round_().clamp_(-INT8_LIMIT, INT8_LIMIT)
    flat = codes.to(torch.int8).view(padded.shape)[..., :width]
    return flat.contiguous().view(torch.uint8), scales


def _split_planes(values: Tensor, size: int) -> Tensor:
    """Bytes of `values [..., d]` as `size` planes of d bytes, the high byte first."""
    data = values.contiguous().view(torch.uint8)
    data = data.view(*values.shape, size).flip(-1).transpose(-1, -2)
    return data.reshape(*values.shape[:-1], values.shape[-1] * size)


def _join_planes(codes: Tensor, size: int) -> Tensor:
    planes = codes.view(*codes.shape[:-1], size, codes.shape[-1] // size)
    return planes.flip(-2).transpose(-1, -2).reshape(codes.shape)
