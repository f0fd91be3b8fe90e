"""What every method's route is made from, and small parts that routes share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from torch import Tensor, nn

POOLS = ("mean", "first")


@dataclass(frozen=True)
class RouteSpec:
    """Everything that, with the backbone, determines a route's structure.

    Attributes:
        method: a key of `METHODS`.
        taps: per stream, the taps that are consolidated.
        last: per stream, the tap that is the last feature.
        late: frozen blocks that run behind the consolidation.
        reduction: the backbone's width over the reduced width.
        variant: of the consolidation.
        init: `paper` or `residual`.
        outputs: of the head; 0 for a text-to-text backbone.
        pool: `mean` over the tokens or the `first` token; encoders only.
    """

    method: str
    taps: Mapping[str, tuple[int, ...]]
    last: Mapping[str, int]
    late: int
    reduction: int
    variant: str
    init: str
    outputs: int
    pool: str

    def to_json(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "taps": {stream: list(taps) for stream, taps in self.taps.items()},
            "last": dict(self.last),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RouteSpec:
        taps = {stream: tuple(taps) for stream, taps in data["taps"].items()}
        return cls(**{**data, "taps": taps})


def pooled(states: Tensor, mask: Tensor, pool: str) -> Tensor:
    """`[B, S, d] -> [B, d]` over the tokens that `mask [B, S]` marks."""
    if pool == "first":
        return states[:, 0]
    if pool != "mean":
        raise InputError(explain("pool", expected=f"one of {POOLS}", found=pool))
    weights = mask.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are tuned, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
