"""The buffer that the states of a shard are coded into."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from sherl_pipe.cache import Codec, NonFiniteError, StreamSpec
from sherl_pipe.cache.layout import Layout
from sherl_pipe.stages import quantize
from torch import Tensor

# Tokens that are encoded at once on a processor: a tap of them stays in its cache.
BLOCK = 512


class ShardBuffer:
    """The coded rows of one shard, copied from the device as they come."""

    def __init__(self, codec: Codec, spec: StreamSpec, rows: int, device: torch.device) -> None:
        self._codec, self._spec, self._device = codec, spec, device
        pin = device.type == "cuda"
        taps = len(spec.taps)

        def room(width: int) -> Tensor:
            return torch.empty(taps, rows, width, dtype=torch.uint8, pin_memory=pin)

        self._codes = room(codec.code_bytes(spec.width))
        self._scales = room(codec.scale_bytes(spec.width))
        self._bad = torch.zeros(taps, rows, dtype=torch.bool, device=device)
        self._filled = 0

    def add(self, states: Tensor) -> None:
        """Encode `[K, n, d]` on its device and copy it here without waiting."""
        size = BLOCK if self._device.type == "cpu" else states.shape[1]
        for block in states.split(size, dim=1):
            rows = slice(self._filled, self._filled + block.shape[1])
            self._filled = rows.stop
            sizes = quantize.lengths(block) if self._codec.chained else None
            self._bad[:, rows] = quantize.overflowed(self._codec, block, sizes=sizes)
            room = (self._codes[:, rows], self._scales[:, rows])
            if self._device.type == "cpu":
                quantize.encode(self._codec, block, room, sizes=sizes)
                continue
            codes, scales = quantize.encode(self._codec, block, sizes=sizes)
            room[0].copy_(codes, non_blocking=True)
            if scales is not None:
                room[1].copy_(scales, non_blocking=True)

    @property
    def full(self) -> bool:
        """Whether all rows are there."""
        return self._filled == self._codes.shape[1]

    def check(self, what: str, shard: int, layout: Layout, ids: Sequence[bytes]) -> None:
        """Raise NonFiniteError naming tap and examples; wait for the copies."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if not self.full:
            raise RuntimeError(f"{what}: {self._filled} rows of {self._codes.shape[1]}")
        bad = self._bad.cpu().numpy()
        if not bad.any():
            return
        taps = [self._spec.taps[place] for place in np.flatnonzero(bad.any(axis=1))]
        rows = np.flatnonzero(bad.any(axis=0))
        members = layout.members(shard)
        starts = layout.index[members, 1]
        wrong = sorted({int(members[np.searchsorted(starts, row, "right") - 1]) for row in rows})
        names = ", ".join(ids[example].hex() for example in wrong[:8])
        raise NonFiniteError(
            f"{what}, shard {shard}: values that are not finite (or that {self._codec.name} cannot "
            f"hold) at tap {', '.join(map(str, taps))} of {len(wrong)} examples: {names}. The "
            "shard was not committed. Use --dtype float32 or bfloat16, or remove these examples."
        )

    def arrays(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8] | None]:
        """Codes and scales as numpy arrays."""
        scales = self._scales.numpy() if self._scales.shape[-1] else None
        return self._codes.numpy(), scales


def token_bytes(codec: Codec, spec: StreamSpec) -> int:
    """Bytes of all taps of one token before compression."""
    return codec.row_bytes(spec.width) * len(spec.taps)
