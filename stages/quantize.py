"""The codecs of `cache/codecs.py` on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from sherl_pipe.cache import Codec
from sherl_pipe.cache.codecs import CARRIED, STEPS, hadamard
from torch import Tensor

# The largest magnitude that is sure to be held: differences double it, turning a group can
# multiply it by the group's root, and bfloat16 ends at 3.4e38.
_LARGEST = 1e36


def encode(codec: Codec, values: Tensor) -> tuple[Tensor, Tensor | None]:
    """Codes `uint8 [K, n, code bytes]` and scales of finite `values [K, n, d]` of all taps.

    What a codec cannot hold gives codes without a meaning; `overflowed` finds it.
    """
    values = values.float()
    if codec.name == "bfloat16":
        return _split_planes(values.to(torch.bfloat16), 2), None
    if codec.name == "float32":
        return _split_planes(values, 4), None
    coded: list[tuple[Tensor, Tensor]] = []
    before: Tensor | None = None
    # Autocast would round products that should be exact.
    with torch.autocast(values.device.type, enabled=False):
        for tap in values:
            codes, scales, before = _encode_tap(codec, tap, before)
            coded.append((codes, scales))
    return torch.stack([codes for codes, _ in coded]), torch.stack([s for _, s in coded])


def overflowed(codec: Codec, values: Tensor) -> Tensor:
    """Boolean `[K, n]`: tokens with a value that is not finite or that the codec cannot hold."""
    limit = {
        "bfloat16": torch.finfo(torch.bfloat16).max,
        "float32": torch.finfo(torch.float32).max,
    }.get(codec.name, _LARGEST)
    # NaN compares false, so it counts as overflowed too.
    values = values.float()
    return ~(torch.maximum(values.amax(-1), -values.amin(-1)) <= limit)


def decode(
    codec: Codec,
    codes: Tensor,
    scales: Tensor | None,
    width: int,
    picks: Sequence[int] | None = None,
    *,
    rows: Tensor | None = None,
    turned: bool = False,
) -> Tensor:
    """float32 `[K, n, width]`.

    A chained codec needs the codes of every tap from the cache's first on; `picks` are those that
    are wanted, all by default. `rows` `[n]` are those of the codes that are wanted, all by default;
    they are gathered one tap at a time. With `turned`, groups are left as they were coded; `turn`
    makes values of them.
    """
    if codec.scale_bytes(width) and scales is None:
        raise TypeError(f"{codec.name} codes need their scales")
    if rows is not None and scales is not None:
        scales = scales.index_select(1, rows)
    groups, group = (codec.groups(width), codec.group) if codec.chained else (1, width)
    count = codes.shape[1] if rows is None else len(rows)
    out = torch.empty(len(codes), count, groups, group, dtype=torch.float32, device=codes.device)
    parts = None if scales is None else _factors(codec, scales, width)
    # Autocast would round the products that have to be exact.
    with torch.autocast(codes.device.type, enabled=False):
        for place, whole in enumerate(codes):
            tap = whole if rows is None else whole.index_select(0, rows)
            if parts is None:
                kind = torch.bfloat16 if codec.name == "bfloat16" else torch.float32
                out[place, :, 0] = _join_planes(tap, kind.itemsize).view(kind)
                continue
            before = out[place - 1] if place else None
            own = (parts[0][place], parts[1][place])
            _decode_tap(codec, tap, own, width, before, out[place], turned=turned)
    taps = out if picks is None or list(picks) == list(range(len(out))) else out[list(picks)]
    return taps.flatten(-2)[..., :width]


def turn(values: Tensor, group: int) -> Tensor:
    """Values `[..., d]` of what was decoded `turned`: whole groups times the Hadamard matrix.

    It is symmetric, so the product of turned values with turned weights `[..., d]` is that of the
    values with the weights.
    """
    if not group:
        return values
    width = values.shape[-1]
    whole = width // group * group
    head = values[..., :whole].reshape(-1, group) @ _hadamard(group, group, values.device)
    head = head.view(*values.shape[:-1], whole)
    return torch.cat([head, values[..., whole:]], -1) if width > whole else head


def _encode_tap(codec: Codec, tap: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales of one tap `[n, d]`, and its decoded coefficients `[n, G, group]`.

    `before` are those of the tap in front of it. Turning keeps lengths and differences, so a group
    is compared with the one before, and coded, without being turned back.
    """
    width = tap.shape[-1]
    values = _coefficients(codec, tap)
    sizes = torch.linalg.vector_norm(values, dim=-1)
    mean = sizes.square().sum(-1, keepdim=True) / width
    carried = torch.zeros_like(sizes)
    if before is not None:
        carried = (torch.linalg.vector_norm(values - before, dim=-1) < sizes).float()
        values.addcmul_(before, carried.unsqueeze(-1), value=-1)
    marks = (carried * CARRIED).byte()
    peaks = values.abs().amax(-1)
    if codec.name == "int8":
        high, low, steps = _bfloat16_above(torch.maximum(peaks / 127, codec.step * mean.sqrt()))
        steps = steps.unsqueeze(-1)
        numbers = values.div_(_nonzero(steps)).round_().clamp_(-127, 127)
        codes = numbers.to(torch.int8).flatten(-2)[..., :width].contiguous().view(torch.uint8)
        scales = torch.cat([high | marks, low], -1)
    else:
        wanted = peaks / 7.5
        high, low, token = _bfloat16_above(wanted.amax(-1, keepdim=True))
        ratio = (_nonzero(token) / wanted.clamp(min=torch.finfo(torch.float32).tiny)).log2()
        # Between rounding and the larger step: what is cut off at the ends costs more than a wide
        # step.
        places = (8 * ratio + 0.62).floor_().nan_to_num_(0).clamp_(0, 127).long()
        steps = (token * _steps(tap.device)[places]).unsqueeze(-1)
        numbers = values.div_(_nonzero(steps)).add_(8).floor_().clamp_(0, 15)
        pairs = numbers.byte().view(len(tap), -1, 2)
        codes = pairs[..., 0] | (pairs[..., 1] << 4)
        scales = torch.cat([high, low, places.byte() | marks], -1)
        numbers -= 7.5
    decoded = numbers.mul_(steps)
    if before is not None:
        decoded.addcmul_(before, carried.unsqueeze(-1))
    return codes, scales, decoded


def _coefficients(codec: Codec, tap: Tensor) -> Tensor:
    """Turned groups `[n, G, group]` of values `[n, d]`, as long as the values are; fresh memory."""
    width, group = tap.shape[-1], codec.group
    if width % group:
        tap = torch.nn.functional.pad(tap, (0, -width % group))
    values = tap.reshape(len(tap), -1, group)
    turned = torch.empty_like(values)
    _turn(values, width, group, turned)
    return turned.mul_(_shrink(width, group, tap.device)[:, None])


def _factors(codec: Codec, scales: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """What the numbers of each group are multiplied by, and 1 where a group adds to the one of the
    tap before; both `[..., G]` of scales `[..., bytes]`."""
    groups = codec.groups(width)
    if codec.name == "int8":
        high, low = scales[..., :groups], scales[..., groups:]
        steps, carried = _bfloat16(high & 0x7F, low), high >= CARRIED
    else:
        token, places = _bfloat16(scales[..., :1], scales[..., 1:2]), scales[..., 2:]
        steps, carried = token * _steps(scales.device)[(places & 0x7F).long()], places >= CARRIED
    return steps * _shrink(width, codec.group, scales.device), carried.float()


def _decode_tap(
    codec: Codec,
    codes: Tensor,
    parts: tuple[Tensor, Tensor],
    width: int,
    before: Tensor | None,
    out: Tensor,
    *,
    turned: bool = False,
) -> None:
    """Decode one tap into `out [n, G, group]`; every operation as in `Codec.decode`."""
    numbers = out if turned else torch.empty_like(out)
    if width % codec.group:
        numbers.zero_()
    flat = numbers.view(len(out), -1)
    if codec.name == "int8":
        flat[:, :width] = codes.view(torch.int8)
    else:
        flat[:, 0::2] = codes & 15
        flat[:, 1::2] = codes >> 4
        flat -= 7.5
    if not turned:
        _turn(numbers, width, codec.group, out)
    factors, carried = parts
    out *= factors.unsqueeze(-1)
    if before is not None:
        out.addcmul_(before, carried.unsqueeze(-1))


def _turn(values: Tensor, width: int, group: int, out: Tensor) -> None:
    """Whole groups of `[n, G, group]` times the Hadamard matrix."""
    if width % group:
        whole = width // group
        out[:, whole:] = values[:, whole:]
        torch.matmul(values[:, :whole], _hadamard(group, group, out.device), out=out[:, :whole])
        return
    # Some groups at once, where that makes a matrix worth a product.
    side = math.gcd(width, max(group, 32))
    torch.mm(values.view(-1, side), _hadamard(group, side, out.device), out=out.view(-1, side))


@lru_cache
def _hadamard(group: int, side: int, device: torch.device) -> Tensor:
    """The matrix of `side // group` groups side by side."""
    # Kept for training too, whoever asks first.
    with torch.inference_mode(False):
        matrix: Tensor = torch.block_diag(*[torch.from_numpy(hadamard(group))] * (side // group))
        return matrix.to(device)


@lru_cache
def _steps(device: torch.device) -> Tensor:
    return torch.from_numpy(STEPS).to(device)


@lru_cache
def _shrink(width: int, group: int, device: torch.device) -> Tensor:
    """What makes turning keep lengths, per group."""
    factors = torch.full((-(-width // group),), group**-0.5, dtype=torch.float32)
    factors[width // group :] = 1
    return factors.to(device)


def _nonzero(steps: Tensor) -> Tensor:
    return torch.where(steps == 0, 1.0, steps)


def _bfloat16_above(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """High bytes, low bytes and values of the least bfloat16 that is not below `values >= 0`."""
    bits = (values.contiguous().view(torch.int32) + 0xFFFF) >> 16
    return (bits >> 8).byte(), (bits & 0xFF).byte(), (bits << 16).view(torch.float32)


def _bfloat16(high: Tensor, low: Tensor) -> Tensor:
    return torch.stack([low, high], -1).view(torch.bfloat16).squeeze(-1).float()


def _split_planes(values: Tensor, size: int) -> Tensor:
    """Bytes of `values [..., d]` as `size` planes of d bytes, the high byte first."""
    data = values.contiguous().view(torch.uint8)
    data = data.view(*values.shape, size).flip(-1).transpose(-1, -2)
    return data.reshape(*values.shape[:-1], values.shape[-1] * size)


def _join_planes(codes: Tensor, size: int) -> Tensor:
    planes = codes.view(*codes.shape[:-1], size, codes.shape[-1] // size)
    return planes.flip(-2).transpose(-1, -2).reshape(codes.shape)
