"""How a hidden state becomes bytes, in numpy.

Every codec maps float32 `[..., n, d]` to codes `uint8 [..., n, code_bytes(d)]` and, where it has
scales, `float16 [..., n, scale_groups(d)]`. `stages/quantize.py` does the same on the device,
bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sherl_pipe.cache.errors import InputError, NonFiniteError, explain, shown

Codes = npt.NDArray[np.uint8]
Scales = npt.NDArray[np.float16]
Floats = npt.NDArray[np.float32]

INT8_LIMIT = 127
# Smallest positive float16: a group that is not all zero never gets the scale 0.
SMALLEST_SCALE = np.float16(2.0**-24)


@dataclass(frozen=True)
class Codec:
    """One way to store hidden states.

    Attributes:
        name: `float32`, `bfloat16` or `int8`.
        group: values that share a scale (`int8` only).
        fill: the byte of rows that hold nothing; no stored value decodes from a row full of it.
    """

    name: str
    group: int = 0

    @property
    def fill(self) -> int:
        # 0xFFFFFFFF and 0xFFFF are NaN; the int8 code -128 is never produced.
        return 0x80 if self.name == "int8" else 0xFF

    def code_bytes(self, width: int) -> int:
        """Bytes of one token's codes."""
        return width * {"float32": 4, "bfloat16": 2, "int8": 1}[self.name]

    def scale_groups(self, width: int) -> int:
        """Scales of one token; 0 where the codec has none."""
        return -(-width // self.group) if self.group else 0

    def encode(self, values: Floats) -> tuple[Codes, Scales | None]:
        """Codes and scales of finite `values [..., n, d]`. Raises NonFiniteError."""
        if not np.isfinite(values).all():
            raise NonFiniteError("values to encode are not finite")
        if self.name == "int8":
            return self._encode_int8(values)
        if self.name == "bfloat16":
            words = _round_to_bfloat16(values)
            return _split_planes(words.view(np.uint8), 2), None
        return _split_planes(np.ascontiguousarray(values, np.float32).view(np.uint8), 4), None

    def decode(self, codes: Codes, scales: Scales | None, width: int) -> Floats:
        """float32 `[..., n, width]` of codes and scales."""
        if self.name == "int8":
            if scales is None:
                raise InputError("int8 codes need their scales")
            spread = np.repeat(scales.astype(np.float32), self.group, axis=-1)[..., :width]
            return codes.view(np.int8).astype(np.float32) * spread
        planes = 2 if self.name == "bfloat16" else 4
        joined = _join_planes(codes, planes)
        if self.name == "bfloat16":
            return (joined.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return joined.view(np.float32)

    def _encode_int8(self, values: Floats) -> tuple[Codes, Scales]:
        width = values.shape[-1]
        groups = self.scale_groups(width)
        padded = np.zeros((*values.shape[:-1], groups * self.group), np.float32)
        padded[..., :width] = values
        grouped = padded.reshape(*values.shape[:-1], groups, self.group)
        peak = np.abs(grouped).max(axis=-1)
        with np.errstate(over="ignore"):  # an overflow is looked for and reported just below
            scales = (peak / np.float32(INT8_LIMIT)).astype(np.float16)
        scales = np.where((peak > 0) & (scales == 0), SMALLEST_SCALE, scales)
        if not np.isfinite(scales).all():
            raise NonFiniteError(f"a value of {peak.max():g} is too large for int8's scales")
        step = np.where(scales == 0, np.float32(1), scales.astype(np.float32))
        codes = np.clip(np.rint(grouped / step[..., None]), -INT8_LIMIT, INT8_LIMIT)
        flat = codes.astype(np.int8).reshape(padded.shape)[..., :width]
        return np.ascontiguousarray(flat).view(np.uint8), scales

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "group": self.group} if self.group else {"name": self.name}


CODECS = {
    "float32": Codec("float32"),
    "bfloat16": Codec("bfloat16"),
    "int8": Codec("int8", group=64),
}


def codec_from_json(data: Any) -> Codec:
    """The codec that a cache names. Raises InputError for one that this version lacks."""
    for codec in CODECS.values():
        if data == codec.to_json():
            return codec
    known = ", ".join(f"{codec.name!r} (group {codec.group})" for codec in CODECS.values())
    name, group = (data.get("name"), data.get("group", 0)) if isinstance(data, dict) else (data, 0)
    found = f"{shown(name)} (group {shown(group)})"
    raise InputError(explain("codec", expected=f"one of {known}", found=found))


def _round_to_bfloat16(values: Floats) -> npt.NDArray[np.uint16]:
    """Round to nearest, ties to even, as every framework does."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded: npt.NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    if ((rounded & 0x7F80) == 0x7F80).any():
        raise NonFiniteError("a value is too large for bfloat16")
    return rounded


def _split_planes(data: Codes, size: int) -> Codes:
    """`[..., d * size]` bytes, value after value, to `size` planes of `d` bytes, high byte first.

    zstd finds the repeating exponents when they stand side by side.
    """
    values = data.reshape(*data.shape[:-1], -1, size)[..., ::-1]
    return np.ascontiguousarray(np.moveaxis(values, -1, -2)).reshape(data.shape)


def _join_planes(codes: Codes, size: int) -> Codes:
    planes = codes.reshape(*codes.shape[:-1], size, -1)[..., ::-1, :]
    return np.ascontiguousarray(np.moveaxis(planes, -2, -1)).reshape(codes.shape)
