"""What is read of a cache for the rows of a label table, and the batches that it comes in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from sherl_pipe.stages import quantize
from sherl_pipe.stages.shelf import Ints
from torch import Tensor


@dataclass(frozen=True)
class Reading:
    """Which rows of which stream a role reads.

    Attributes:
        stream, taps: what is read.
        paths: lists of rows of an example, of which one is taken; all rows where None.
        choices: for every row of the label table, the number of its list.
    """

    stream: str
    taps: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...] | None = None
    choices: tuple[int, ...] = ()


@dataclass(frozen=True)
class Packed:
    """Rows of one stream for the examples of a batch, without padding.

    Attributes:
        states: `[K, n, d]` float32, n the sum of `lengths`.
        lengths: `[B]` rows per example.
        group: where `states` are `turned` ones (see `quantize.decode`), of so many; else 0.
    """

    states: Tensor
    lengths: Tensor
    group: int = 0

    def tap(self, place: int) -> Tensor:
        """The values of one tap, `[n, d]`."""
        return quantize.turn(self.states[place], self.group)

    @property
    def longest(self) -> int:
        """Rows of the longest example."""
        return int(self.lengths.max())

    def mask(self, size: int | None = None) -> Tensor:
        """`[B, S]`, True where a batch padded to `size` rows (by default the longest) has one."""
        places = torch.arange(size or self.longest, device=self.lengths.device)
        return places < self.lengths[:, None]

    def pad(self, rows: Tensor, size: int | None = None) -> Tensor:
        """`[n, d] -> [B, S, d]`, zeros behind the end of each example."""
        mask = self.mask(size)
        out = rows.new_zeros(mask.numel(), rows.shape[-1])
        places = mask.view(-1).nonzero().squeeze(-1)
        return out.index_copy(0, places, rows).view(*mask.shape, rows.shape[-1])


@dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        rows: positions in the label table.
        streams: by role (`hidden`, or `encoder` and `decoder`).
    """

    rows: Ints
    streams: Mapping[str, Packed]
