"""Baselines that read cached states as they are: the last one, or a learned mean of all.

`linear` is a linear model on a frozen state, `weighted` one on the softmax-weighted sum of all
taps, as SUPERB has it for speech (Yang et al., Interspeech 2021).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.features import Packed
from sherl_pipe.stages.methods.live import live_encoder
from sherl_pipe.stages.methods.route import POOLS, PooledRoute, RouteSpec
from sherl_pipe.stages.quantize import turn
from sherl_pipe.stages.words import PrefixTree
from torch import Tensor, nn


class TapWeights(nn.Module):
    """A softmax-weighted sum over K states, all weighing the same at the start; one state is taken
    as it is and has no weight.

    Args:
        count: K.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.scores: nn.Parameter | None = None
        if count > 1:
            self.scores = nn.Parameter(torch.zeros(count))

    def shares(self, like: Tensor) -> Tensor:
        """What each state weighs, `[K]`, on the device of `like`."""
        return like.new_ones(1) if self.scores is None else self.scores.softmax(0)

    def forward(self, states: Tensor) -> Tensor:
        """`[K, ...] -> [...]`."""
        if self.scores is None:
            return states[0]
        mixed: Tensor = torch.tensordot(self.shares(states).to(states.dtype), states, 1)
        return mixed


class ReadoutEncoder(PooledRoute):
    """A pooled head on the taps of an encoder.

    Args:
        backbone: the frozen model.
        spec: `spec.taps["hidden"]` are what is summed.
    """

    def __init__(self, backbone: Backbone, spec: RouteSpec) -> None:
        super().__init__()
        self.spec, self.late = spec, None
        self.mix = TapWeights(len(spec.taps["hidden"]))
        self.head = nn.Linear(backbone.width, spec.outputs)

    def fuse(self, streams: Mapping[str, Packed], tree: PrefixTree | None = None) -> tuple[Tensor]:
        """Pooled states `[B, d]`; there is no tree."""
        packed = streams["hidden"]
        # Pooling, summing and turning are linear: the frozen states are pooled first, and of what
        # is learned one row per example is left.
        pooled = pool_matrix(packed, self.spec.pool, self.spec.front) @ packed.states
        return (turn(self.mix(pooled), packed.group),)

    def attach(self, backbone: Backbone) -> nn.Module:
        """The live backbone up to the last tap, giving the sum of its taps; weights are shared."""
        return live_encoder(backbone, self.spec.taps["hidden"], lambda taps, _: self.mix(taps))


def pool_matrix(packed: Packed, pool: str, front: int = 0) -> Tensor:
    """`[B, n]` that pools packed rows: `pool_matrix(...) @ rows [n, d]` is `[B, d]`.

    `front` is as for `pooled`.

    Raises InputError for an unknown pool.
    """
    if pool not in POOLS:
        raise InputError(explain("pool", expected=f"one of {POOLS}", found=pool))
    lengths = packed.lengths
    places = torch.arange(packed.states.shape[1], device=lengths.device)
    ends = lengths.cumsum(0)[:, None]
    starts = ends - lengths[:, None]
    if pool == "first":
        return (places == starts).to(packed.states.dtype)
    if pool == "last":
        return (places == ends - 1).to(packed.states.dtype)
    mine = (places >= starts + front) & (places < ends)
    return mine.to(packed.states.dtype) / (lengths[:, None] - front)
