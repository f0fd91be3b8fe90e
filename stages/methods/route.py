"""What every method's route is made from, and small parts that routes share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.features import Packed
from sherl_pipe.stages.surgery import share
from sherl_pipe.stages.words import PrefixTree, word_logits
from torch import Tensor, nn

POOLS = ("mean", "first", "last")


@dataclass(frozen=True)
class RouteSpec:
    """Everything that, with the backbone, determines a route's structure.

    Attributes:
        method: a key of `METHODS`.
        taps: per stream, the taps that are read.
        last: per stream, the tap that is the last feature; empty for a method that has none.
        late: frozen blocks that run behind what is trained; 0 for a method without a late route.
        reduction: the backbone's width over the reduced width.
        variant: of the method; None where there is only one.
        init: what the trained weights started from, one of the method's `inits`.
        outputs: of the head; 0 for a text-to-text backbone.
        pool: `mean` over the tokens, the `first` or the `last` one; not of text-to-text backbones.
        front: tokens in front of an image's patches; the mean is over those behind them.
        tokens: of every image, those in front included; 0 where inputs are texts.
    """

    method: str
    taps: Mapping[str, tuple[int, ...]]
    last: Mapping[str, int]
    late: int
    reduction: int
    variant: str | None
    init: str
    outputs: int
    pool: str
    front: int = 0
    tokens: int = 0

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
        late: the frozen blocks, None for none. Their dropout is off, as it was for features.
    """

    spec: RouteSpec
    late: nn.Module | None

    @abstractmethod
    def reads(self) -> dict[str, tuple[int, ...]]:
        """Taps needed from a cache, per stream."""

    @abstractmethod
    def fuse(
        self, streams: Mapping[str, Packed], tree: PrefixTree | None = None
    ) -> tuple[Tensor, ...]:
        """What is trained in front of the late blocks, on cached features by stream.

        All that a route draws at random in training is drawn here. `tree` is as for `hidden`.
        """

    @staticmethod
    def hidden(
        routes: Sequence[Any],
        fused: Sequence[tuple[Tensor, ...]],
        batches: Sequence[Mapping[str, Packed]],
        tree: PrefixTree | None = None,
    ) -> list[Tensor]:
        """What each route's head reads, all routes going through the late blocks at once; of routes
        without any it is the one thing that `fuse` gives.

        Args:
            routes: of this class, on one backbone.
            fused: what `fuse` made of each route's batch.
            batches: cached features by stream. Decoder rows are those along one path per
                example, or, with `tree`, those of all its nodes.
            tree: label words; text-to-text backbones only.
        """
        return [states for (states,) in fused]

    @abstractmethod
    def logits(self, hidden: Tensor, tokens: Sequence[int] | None = None) -> Tensor:
        """Outputs of the head: `[..., outputs]`, or of a text-to-text backbone `[..., V]`, V being
        the vocabulary, or `tokens` of it."""

    @abstractmethod
    def attach(self, backbone: Any) -> nn.Module:
        """The live backbone with the route in it; its weights are shared."""

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.late is not None:
            self.late.eval()
        return self


class PooledRoute(Route):
    """A route on the only stack of a backbone, which ends in a pooled head.

    Attributes:
        head: trained, from the backbone's width to `spec.outputs`.
    """

    head: nn.Linear

    def reads(self) -> dict[str, tuple[int, ...]]:
        """Taps needed from a cache, per stream."""
        return {"hidden": self.spec.taps["hidden"]}

    def logits(self, hidden: Tensor, tokens: Sequence[int] | None = None) -> Tensor:
        """`[B, outputs]` of `[B, d]`; there are no tokens."""
        out: Tensor = self.head(hidden)
        return out


class WordRoute(Route):
    """A route on an encoder-decoder, which ends in the backbone's own head over the vocabulary.

    Args:
        backbone: the frozen model.
        spec: the route's structure.

    Attributes:
        lm_head: the frozen head.
        scale: of the states in front of it.
    """

    def __init__(self, backbone: Backbone, spec: RouteSpec) -> None:
        super().__init__()
        model: Any = backbone.model
        self.spec = spec
        self.lm_head: nn.Module = share(backbone.words or model.lm_head)
        scaled = getattr(model.config, "scale_decoder_outputs", False)
        self.scale = backbone.width**-0.5 if scaled else 1.0
        # BART's, beside a head without a bias.
        bias = getattr(model, "final_logits_bias", None)
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias is None else bias[0], persistent=False)

    def reads(self) -> dict[str, tuple[int, ...]]:
        """Taps needed from a cache, per stream."""
        return dict(self.spec.taps)

    def logits(self, hidden: Tensor, tokens: Sequence[int] | None = None) -> Tensor:
        """`[B, P, V]` of `[B, P, d]`; V is the vocabulary, or `tokens` of it."""
        found = word_logits(self.lm_head, hidden, tokens)
        if self.bias is None:
            return found
        return found + (self.bias if tokens is None else self.bias[list(tokens)])


def pooled(states: Tensor, mask: Tensor, pool: str, front: int = 0) -> Tensor:
    """`[B, S, d] -> [B, d]` of tokens that `mask [B, S]` marks; a mean leaves out the `front`."""
    if pool not in POOLS:
        raise InputError(explain("pool", expected=f"one of {POOLS}", found=pool))
    if pool != "mean":
        # Not the first or last place: padding may stand on either side.
        places = torch.arange(mask.shape[1], device=mask.device)
        away = places if pool == "first" else -places
        one = away.masked_fill(~mask.bool(), len(places)).argmin(1)
        return states[torch.arange(len(states), device=mask.device), one]
    states, mask = states[:, front:], mask[:, front:]
    weights = mask.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Batches behind one another; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are tuned, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
