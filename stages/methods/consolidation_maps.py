"""SHERL's consolidation of a convolutional backbone's feature maps (Diao et al., ECCV 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.methods.guided import GATE_SCALE, guided_consolidation
from sherl_pipe.stages.methods.published import (
    Names,
    Published,
    batch_norm,
    count,
    pair,
    pointwise,
    probe,
    whole,
)
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-8


class Pointwise(nn.Module):
    """A 1 x 1 convolution and its batch norm, on rows: `[n, C] -> [n, h]`.

    Locations are rows, over which a batch norm takes the very statistics that it takes over the
    locations of maps.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        # As a convolution starts: both are uniform in +-1/sqrt(channels).
        self.linear = nn.Linear(channels, outputs)
        self.norm = nn.BatchNorm1d(outputs)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.norm(self.linear(rows))
        return out

    def published(self, linear: str, norm: str) -> Names:
        """By published name, where a tensor is kept."""
        return pointwise(linear, self.linear) | batch_norm(norm, self.norm)


def rows_of(maps: Tensor) -> Tensor:
    """`[B, C, H, W] -> [B * H * W, C]`, locations row by row."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def rate_of(maps: Tensor, last: Tensor) -> int:
    """How many times finer than `last [B, C, H, W]` a level's maps are, the same in both axes.

    Raises InputError where that is no whole number.
    """
    height, width = last.shape[-2:]
    rate = maps.shape[-1] // width
    if rate < 1 or maps.shape[-2:] != (height * rate, width * rate):
        raise InputError(
            explain(
                "size of a level's maps",
                expected=f"a whole multiple of {height} x {width}",
                found=f"{maps.shape[-2]} x {maps.shape[-1]}",
            )
        )
    return int(rate)


class MapConsolidation(Published):
    """Fuses feature maps of K levels and the last one into one (SPEC 2.4).

    Args:
        channels: C of each level, at least two; the last level is the deep guide, and of as many
            channels is the result.
        hidden: h, of the reduced vectors.
    """

    def __init__(self, channels: Sequence[int], hidden: int) -> None:
        super().__init__()
        if len(channels) < 2 or hidden < 1:
            raise InputError(
                "consolidation needs two levels and one hidden unit, "
                f"found {len(channels)} and {hidden}"
            )
        self.reduce = nn.ModuleList(Pointwise(each, hidden) for each in channels)
        self.score = nn.Linear(hidden, 1)
        self.tail = Pointwise(hidden, channels[-1])
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, maps: Sequence[Tensor], last: Tensor) -> Tensor:
        """Consolidate.

        Args:
            maps: of level k `[B, C_k, r_k H, r_k W]`, with whole r_k.
            last: `[B, C, H, W]`, the backbone's last feature.

        Returns `[B, C, H, W]`. Raises InputError for another number of levels, or a level that is
        no whole multiple of the last one in size.
        """
        if len(maps) != len(self.reduce):
            raise InputError(explain("levels", expected=len(self.reduce), found=len(maps)))
        reduced = torch.stack(
            [
                reduce(rows_of(self._pool(level, rate_of(level, last))))
                for reduce, level in zip(self.reduce, maps, strict=True)
            ]
        )
        fused = guided_consolidation(
            reduced, None, self.score.weight[0], self.score.bias[0], EPSILON
        )
        batch, _, height, width = last.shape
        tail = F.relu(self.tail(fused)).view(batch, height, width, -1).permute(0, 3, 1, 2)
        out: Tensor = tail + torch.tanh(self.gate / GATE_SCALE) * last
        return out

    @staticmethod
    def _pool(maps: Tensor, rate: int) -> Tensor:
        return F.max_pool2d(maps, rate) + F.avg_pool2d(maps, rate)

    @classmethod
    def from_reference(cls, params: Mapping[str, Tensor]) -> MapConsolidation:
        """One with the published parameters (SPEC 2.4).

        Raises InputError for names that are missing or left over and for shapes that do not fit.
        """
        names = [
            f"hor_block.{level}.conv.0.weight"
            for level in range(count(params, "hor_block.", ".conv.0.weight"))
        ]
        hidden = probe(params, "hor_block.0.conv.0.weight", 4).shape[0]
        module = cls([probe(params, name, 4).shape[1] for name in names], hidden)
        module.load_published(params)
        return module

    def published(self) -> Names:
        """By published name, where a tensor is kept."""
        named: Names = {"gate_params": (self.gate, whole)}
        named |= pair("guide_block.fc_attn", self.score)
        named |= self.tail.published("conv_out.0", "conv_out.1")
        for level, reduce in enumerate(self.reduce):
            assert isinstance(reduce, Pointwise)
            block = f"hor_block.{level}.conv"
            named |= reduce.published(f"{block}.0", f"{block}.1")
        return named
