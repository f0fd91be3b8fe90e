"""What every method's route is made from, and small parts that routes share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.features import Packed
from sherl_pipe.stages.words import PrefixTree
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


class Route(nn.Module):
    """What is trained of one tuning, and the frozen blocks behind it.

    Attributes:
        spec: its structure.
        late: the frozen blocks. Their dropout stays off: features are those of eval mode too.
    """

    spec: RouteSpec
    late: nn.Module

    @abstractmethod
    def reads(self) -> dict[str, tuple[int, ...]]:
        """Taps needed from a cache, per stream."""

    @abstractmethod
    def fuse(self, streams: Mapping[str, Packed]) -> tuple[Tensor, ...]:
        """What is trained in front of the late blocks, on cached features by stream."""

    @staticmethod
    @abstractmethod
    def hidden(
        routes: Sequence[Any],
        fused: Sequence[tuple[Tensor, ...]],
        batches: Sequence[Mapping[str, Packed]],
        tree: PrefixTree | None = None,
    ) -> list[Tensor]:
        """What each route's head reads, all routes going through the late blocks at once.

        Args:
            routes: of this class, on one backbone.
            fused: what `fuse` made of each route's batch.
            batches: cached features by stream. Decoder rows are those along one path per
                example, or, with `tree`, those of all its nodes.
            tree: label words; text-to-text backbones only.
        """

    @abstractmethod
    def logits(self, hidden: Tensor, tokens: Sequence[int] | None = None) -> Tensor:
        """Outputs of the head: `[..., outputs]`, or of a text-to-text backbone `[..., V]`, V being
        the vocabulary, or `tokens` of it."""

    @abstractmethod
    def attach(self, backbone: Any) -> nn.Module:
        """The live backbone with the route in it; its weights are shared."""

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.late.eval()
        return self


def pooled(states: Tensor, mask: Tensor, pool: str) -> Tensor:
    """`[B, S, d] -> [B, d]` over the tokens that `mask [B, S]` marks."""
    if pool == "first":
        return states[:, 0]
    if pool != "mean":
        raise InputError(explain("pool", expected=f"one of {POOLS}", found=pool))
    weights = mask.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Batches behind one another; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are tuned, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
