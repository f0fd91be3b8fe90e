"""The codecs of `cache/codecs.py` on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from sherl_pipe.cache import Codec
from sherl_pipe.cache.codecs import CARRIED, STEPS, hadamard
from torch import Tensor

# The longest state that a chained codec holds: its square, and that of a difference, are far from
# where float32 ends, at 3.4e38.
LONGEST = 1e18
# The least bfloat16 above zero.
_LEAST = 2.0**-133


def lengths(values: Tensor) -> Tensor:
    """float32 `[K, n, 1]`: the Euclidean length of each state of `values [K, n, d]`."""
    found: Tensor = torch.linalg.vector_norm(values, dim=-1, keepdim=True, dtype=torch.float32)
    return found


def encode(
    codec: Codec,
    values: Tensor,
    out: tuple[Tensor, Tensor] | None = None,
    *,
    sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Codes `uint8 [K, n, code bytes]` and scales of finite `values [K, n, d]` of all taps.

    What a codec cannot hold gives codes without a meaning; `overflowed` finds it.

    Args:
        out: codes and scales, where there is room for them already.
        sizes: `lengths` of the values, where they are known; only chained codecs ask for them.
    """
    values, width = values.float(), values.shape[-1]
    if not codec.chained:
        planes = 2 if codec.name == "bfloat16" else 4
        coded = _split_planes(values.to(torch.bfloat16) if planes == 2 else values, planes)
        return coded if out is None else out[0].copy_(coded), None
    if out is None:
        kinds = (codec.code_bytes(width), codec.scale_bytes(width))
        codes, scales = (values.new_empty(*values.shape[:2], n, dtype=torch.uint8) for n in kinds)
    else:
        codes, scales = out
    _encode_chain(codec, values, lengths(values) if sizes is None else sizes, codes, scales)
    return codes, scales


def overflowed(codec: Codec, values: Tensor, *, sizes: Tensor | None = None) -> Tensor:
    """Boolean `[K, n]`: tokens with a value that is not finite or that the codec cannot hold.

    `sizes` are `lengths` of the values, where they are known. NaN compares false, so it counts too.
    """
    if codec.chained:
        return ~((lengths(values) if sizes is None else sizes).squeeze(-1) <= LONGEST)
    largest = torch.finfo(torch.bfloat16 if codec.name == "bfloat16" else torch.float32).max
    values = values.float()
    return ~(torch.maximum(values.amax(-1), -values.amin(-1)) <= largest)


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


def _encode_chain(
    codec: Codec, values: Tensor, sizes: Tensor, codes: Tensor, scales: Tensor
) -> None:
    """Code all taps `[K, n, d]`, one after another."""
    count, width = values.shape[1:]
    means = sizes * width**-0.5
    # Three blocks take turns as the tap, the one before and what lies between: memory that is asked
    # for anew is not in the processor's cache.
    tap, before, room = values.new_empty(3, count, codec.groups(width), codec.group).unbind()
    # Autocast would round products that should be exact.
    with torch.autocast(values.device.type, enabled=False):
        for place, own in enumerate(values):
            tap, before = before, tap
            _coefficients(codec, own, tap)
            out = (codes[place], scales[place])
            _encode_tap(codec, tap, before if place else None, means[place], out, room)


def _encode_tap(
    codec: Codec,
    tap: Tensor,
    before: Tensor | None,
    mean: Tensor,
    out: tuple[Tensor, Tensor],
    room: Tensor,
) -> None:
    """Codes and scales `out` of one tap's coefficients `[n, G, group]`, which become what is
    decoded of them.

    Turning keeps lengths and differences, so a group is compared with the one before, and coded,
    without being turned back.

    Args:
        before: decoded coefficients of the tap in front of it; overwritten.
        mean: root mean square of each token's values, `[n, 1]`.
        room: for what lies between.
    """
    codes, scales = out
    marks: Tensor | int = 0
    if before is not None:
        # |v - b| < |v|, in one sum: b . (v - b / 2) > 0.
        carried = torch.sub(tap, before, alpha=0.5, out=room).mul_(before).sum(-1) > 0
        marks = carried.view(torch.uint8) * CARRIED
        tap.sub_(before.mul_(carried.float().unsqueeze(-1)))
    peaks = torch.abs(tap, out=room).amax(-1)
    if codec.name == "int8":
        groups = peaks.shape[-1]
        steps = _bfloat16_above(torch.maximum(peaks.div_(127), codec.step * mean))
        # A peak is 127 steps at most, so that nothing has to be cut off.
        numbers = tap.div_(_nonzero(steps).unsqueeze(-1)).round_()
        codes.view(torch.int8).copy_(numbers.flatten(-2)[..., : codes.shape[-1]])
        low, high = _bfloat16_bytes(steps)
        torch.bitwise_or(high, marks, out=scales[..., :groups])
        scales[..., groups:] = low
    else:
        wanted = peaks.div_(7.5)
        token = _bfloat16_above(wanted.amax(-1, keepdim=True))
        ratio = (_nonzero(token) / wanted.clamp_(min=torch.finfo(torch.float32).tiny)).log2_()
        # Between rounding and the larger step: what is cut off at the ends costs more than a wide
        # step.
        places = ratio.mul_(8).add_(0.62).floor_().nan_to_num_(0).clamp_(0, 127).byte()
        steps = token * _steps(tap.device)[places.long()]
        numbers = tap.div_(_nonzero(steps).unsqueeze(-1)).add_(8).floor_().clamp_(0, 15)
        pairs = numbers.byte().view(len(tap), -1, 2)
        torch.bitwise_or(pairs[..., 0], pairs[..., 1] << 4, out=codes)
        low, high = _bfloat16_bytes(token)
        scales[..., :1], scales[..., 1:2] = high, low
        torch.bitwise_or(places, marks, out=scales[..., 2:])
        numbers -= 7.5
    numbers.mul_(steps.unsqueeze(-1))
    if before is not None:
        numbers += before


def _coefficients(codec: Codec, tap: Tensor, out: Tensor) -> None:
    """Turned groups `[n, G, group]` of values `[n, d]`, as long as the values are."""
    width, group = tap.shape[-1], codec.group
    if width % group:
        tap = torch.nn.functional.pad(tap, (0, -width % group))
    _turn(tap.reshape(out.shape), width, group, out, scale=group**-0.5)


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


def _turn(values: Tensor, width: int, group: int, out: Tensor, scale: float = 1.0) -> None:
    """Whole groups of `[n, G, group]` times the Hadamard matrix and `scale`."""
    if width % group:
        whole = width // group
        out[:, whole:] = values[:, whole:]
        matrix = _hadamard(group, group, out.device, scale)
        torch.matmul(values[:, :whole], matrix, out=out[:, :whole])
        return
    # Some groups at once, where that makes a matrix worth a product.
    side = math.gcd(width, max(group, 32))
    matrix = _hadamard(group, side, out.device, scale)
    torch.mm(values.view(-1, side), matrix, out=out.view(-1, side))


@lru_cache
def _hadamard(group: int, side: int, device: torch.device, scale: float = 1.0) -> Tensor:
    """The matrix of `side // group` groups side by side, times `scale`."""
    # Kept for training too, whoever asks first.
    with torch.inference_mode(False):
        matrix: Tensor = torch.block_diag(*[torch.from_numpy(hadamard(group))] * (side // group))
        return matrix.mul_(scale).to(device)


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
    """What coefficients are divided by: where a step is zero, they are too."""
    return steps.clamp(min=_LEAST)


def _bfloat16_above(values: Tensor) -> Tensor:
    """The least bfloat16 that is not below `values >= 0`, as float32; overwrites them."""
    bits = values.view(torch.int32)
    bits.add_(0xFFFF).bitwise_and_(-0x10000)
    return values


def _bfloat16_bytes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high bytes of float32 values that bfloat16 holds."""
    parts = values.view(torch.uint8).view(*values.shape, 4)
    return parts[..., 2], parts[..., 3]


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
