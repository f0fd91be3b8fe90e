"""How hidden states become bytes, and their way back in numpy.

Codes are `uint8 [K, n, code_bytes(d)]` of K taps and n tokens, scales `uint8 [K, n,
scale_bytes(d)]` where a codec has them. `stages/quantize.py` encodes, and decodes on the device
bit for bit as this module does.

`float32` and `bfloat16` keep their bytes in planes. `int8` and `int4` cut a token into groups. A
group is coded as it is or as its difference to the decoded tap before it, whichever has less
energy; a whole group is turned by a Hadamard matrix, which spreads outliers; what comes out is
rounded to multiples of a step.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sherl_pipe.cache.errors import InputError, explain, shown

Codes = npt.NDArray[np.uint8]
Scales = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# Steps of an int4 group are the token's, times these: 2 ** (-q / 8), q below 128. Written as
# powers of two times eight numbers, because libraries differ in the last bit of a power.
_EIGHTHS = (
    1.0, 0.917004043, 0.840896415, 0.771105413, 0.707106781, 0.648419777, 0.594603558, 0.545253866,
)  # fmt: skip
STEPS: Floats = np.array([_EIGHTHS[q % 8] * 2.0 ** -(q // 8) for q in range(128)], np.float32)
# Sign bits of scales: the group is a difference.
CARRIED = 0x80


@dataclass(frozen=True)
class Codec:
    """One way to store hidden states.

    Attributes:
        name: `float32`, `bfloat16`, `int8` or `int4`.
        group: values that are turned together and share a scale; a power of two.
        step: least step of an `int8` code, in units of the token's root mean square.
    """

    name: str
    group: int = 0
    step: float = 0.0

    @property
    def fill(self) -> int:
        """The byte of rows that hold nothing.

        0xFFFFFFFF and 0xFFFF are NaN, as a value and as a scale; the int8 code -128 is never
        produced.
        """
        return 0x80 if self.name == "int8" else 0xFF

    @property
    def chained(self) -> bool:
        """Whether a tap is decoded from the taps before it."""
        return self.group > 0

    def groups(self, width: int) -> int:
        """Groups of a token; the last one may be cut short."""
        return -(-width // self.group) if self.group else 0

    def code_bytes(self, width: int) -> int:
        """Bytes of one token's codes at one tap."""
        if self.name == "int4":
            return self.groups(width) * self.group // 2
        return width * {"float32": 4, "bfloat16": 2, "int8": 1}[self.name]

    def scale_bytes(self, width: int) -> int:
        """Bytes of one token's scales at one tap; 0 where the codec has none.

        `int8`: a bfloat16 for every group, the high bytes first. `int4`: a bfloat16 for the
        token, then a byte for every group.
        """
        return {"int8": 2 * self.groups(width), "int4": 2 + self.groups(width)}.get(self.name, 0)

    def row_bytes(self, width: int) -> int:
        """Bytes of one token at one tap before compression."""
        return self.code_bytes(width) + self.scale_bytes(width)

    def decode(self, codes: Codes, scales: Scales | None, width: int) -> Floats:
        """float32 `[K, n, width]`; a chained codec needs every tap from the cache's first on."""
        if not self.chained:
            planes = 2 if self.name == "bfloat16" else 4
            joined = _join_planes(codes, planes)
            if self.name == "bfloat16":
                return (joined.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            return joined.view(np.float32)
        if scales is None:
            raise InputError(f"{self.name} codes need their scales")
        numbers, steps, carried = self._parts(codes, scales, width)
        out = np.empty((*codes.shape[:-1], self.groups(width), self.group), np.float32)
        for tap in range(len(out)):
            # Whole numbers, so that the sums are exact in whatever order they are taken.
            turned = self._turn(numbers[tap], width)
            out[tap] = turned * steps[tap][..., None]
            if tap:
                out[tap] += out[tap - 1] * carried[tap][..., None].astype(np.float32)
        return np.ascontiguousarray(out.reshape(*codes.shape[:-1], -1)[..., :width])

    def _parts(
        self, codes: Codes, scales: Scales, width: int
    ) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
        """Numbers `[K, n, G, group]`, steps `[K, n, G]`, and which groups are differences."""
        groups = self.groups(width)
        shape = (*codes.shape[:-1], groups, self.group)
        shrink = np.full(groups, self.group**-0.5, np.float32)
        shrink[width // self.group :] = 1
        if self.name == "int8":
            numbers = np.zeros((*codes.shape[:-1], groups * self.group), np.float32)
            numbers[..., :width] = codes.view(np.int8)
            high, low = scales[..., :groups], scales[..., groups:]
            steps = _bfloat16(high & np.uint8(0x7F), low)
            return numbers.reshape(shape), steps * shrink, high >= CARRIED
        pairs = np.stack([codes & 15, codes >> 4], axis=-1).reshape(shape)
        numbers = pairs.astype(np.float32) - np.float32(7.5)
        token, places = _bfloat16(scales[..., :1], scales[..., 1:2]), scales[..., 2:]
        return numbers, token * STEPS[places & 0x7F] * shrink, places >= CARRIED

    def _turn(self, numbers: Floats, width: int) -> Floats:
        """Whole groups times the Hadamard matrix; `[..., G, group]`."""
        whole = width // self.group
        turned = numbers.copy()
        turned[..., :whole, :] = numbers[..., :whole, :] @ hadamard(self.group)
        return turned

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value}


CODECS = {
    "float32": Codec("float32"),
    "bfloat16": Codec("bfloat16"),
    "int8": Codec("int8", group=32, step=0.029),
    "int4": Codec("int4", group=8),
}


def codec_from_json(data: Any) -> Codec:
    """The codec that a cache names. Raises InputError for one that this version lacks."""
    for codec in CODECS.values():
        if data == codec.to_json():
            return codec
    known = ", ".join(str(codec.to_json()) for codec in CODECS.values())
    raise InputError(explain("codec", expected=f"one of {known}", found=_short(data)))


def _short(data: Any) -> str:
    """A stored codec for a message, whatever somebody has put there."""
    if not isinstance(data, dict):
        return shown(data)
    return ", ".join(f"{shown(key)}: {shown(value)}" for key, value in list(data.items())[:4])


def hadamard(size: int) -> Floats:
    """The Hadamard matrix of ones and minus ones (Sylvester's), symmetric."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]).astype(np.float32)
    return matrix


def _bfloat16(high: Codes, low: Codes) -> Floats:
    bits = (high.astype(np.uint32) << 24) | (low.astype(np.uint32) << 16)
    return bits.view(np.float32)


def _join_planes(codes: Codes, size: int) -> Codes:
    """`size` planes of d bytes, high byte first, as `[..., d * size]` bytes value after value."""
    planes = codes.reshape(*codes.shape[:-1], size, -1)[..., ::-1, :]
    return np.ascontiguousarray(np.moveaxis(planes, -2, -1)).reshape(codes.shape)
