"""UniPT on a convolutional backbone's feature maps (Diao et al., CVPR 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.methods.consolidation_maps import Pointwise, rate_of, rows_of
from sherl_pipe.stages.methods.interaction import parallel_interaction
from sherl_pipe.stages.methods.published import Names, Published, count, pair, pointwise, probe
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-8


class MapUniPT(Published):
    """Lets the locations of the last level look through those of all levels (SPEC 6.3).

    Args:
        channels: C of each of K levels, at least two; the last level is the anchor.
        hidden: h, of the reduced vectors.
        outputs: width of the result.
    """

    def __init__(self, channels: Sequence[int], hidden: int, outputs: int) -> None:
        super().__init__()
        if len(channels) < 2 or hidden < 1:
            raise InputError(
                f"UniPT needs two levels and one hidden unit, found {len(channels)} and {hidden}"
            )
        self.down = nn.ModuleList(Pointwise(each, hidden) for each in channels)
        self.guide = nn.ModuleList(nn.Linear(channels[-1], each) for each in channels[:-1])
        self.score = nn.Linear(hidden, 1)
        self.project = Pointwise(hidden, hidden)
        self.tail = nn.Linear(hidden, outputs)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The result for the maps of all levels.

        Args:
            maps: of level k `[B, C_k, r_k H, r_k W]`, with whole r_k; of the last one r is 1.

        Returns `[B, H * W, outputs]`, locations row by row. Raises InputError for another number of
        levels, or a level that is no whole multiple of the last one in size.
        """
        if len(maps) != len(self.down):
            raise InputError(explain("levels", expected=len(self.down), found=len(maps)))
        last = maps[-1]
        batch, _, height, width = last.shape
        rows = rows_of(last)
        pooled = [
            self._pool(level, F.relu(guide(rows)), rate_of(level, last))
            for level, guide in zip(maps[:-1], self.guide, strict=True)
        ]
        reduced = torch.stack(
            [down(each) for down, each in zip(self.down, [*pooled, rows], strict=True)]
        ).view(len(maps), batch, height * width, -1)
        found = parallel_interaction(
            reduced[:-1], reduced[-1], self.score.weight[0], self.score.bias[0], EPSILON
        )
        states = F.relu(reduced[-1] + self.project(found.flatten(0, 1)).view_as(found))
        out: Tensor = self.tail(states)
        return out

    @staticmethod
    def _pool(maps: Tensor, guide: Tensor, rate: int) -> Tensor:
        """`[B, C, r H, r W] -> [B * H * W, C]`: each cell of r x r locations summed, with weights
        from their products with the guide `[B * H * W, C]`, on top of equal ones."""
        batch, channels, height, width = maps.shape
        cells = maps.view(batch, channels, height // rate, rate, width // rate, rate)
        cells = cells.permute(0, 2, 4, 3, 5, 1).reshape(-1, rate * rate, channels)
        scores = F.relu((cells @ guide.unsqueeze(-1)).squeeze(-1))
        weights = scores / (scores.sum(-1, keepdim=True) + EPSILON) + rate**-2
        return (weights.unsqueeze(1) @ cells).squeeze(1)

    @classmethod
    def from_reference(cls, params: Mapping[str, Tensor]) -> MapUniPT:
        """One with the published parameters (SPEC 6.3).

        Raises InputError for names that are missing or left over and for shapes that do not fit.
        """
        levels = count(params, "downsample_layers.", ".0.weight")
        names = [f"downsample_layers.{level}.0.weight" for level in range(max(1, levels))]
        channels = [probe(params, name, 4).shape[1] for name in names]
        hidden = probe(params, names[0], 4).shape[0]
        outputs = probe(params, "upsample_layer.1.weight", 4).shape[0]
        module = cls(channels, hidden, outputs)
        module.load_published(params)
        return module

    def published(self) -> Names:
        """By published name, where a tensor is kept."""
        named = pair("gate_layer", self.score) | pointwise("upsample_layer.1", self.tail)
        named |= self.project.published("projection_layer.0", "projection_layer.1")
        for level, down in enumerate(self.down):
            assert isinstance(down, Pointwise)
            name = f"downsample_layers.{level}"
            named |= down.published(f"{name}.0", f"{name}.1")
        for level, guide in enumerate(self.guide):
            assert isinstance(guide, nn.Linear)
            named |= pointwise(f"identity_layers.{level}.0", guide)
        return named
