"""Layers over all taps at once, which the side networks share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.families import norm_of
from sherl_pipe.stages.norm import by_hand
from sherl_pipe.stages.quantize import turn
from torch import Tensor, nn
from torch.nn import functional as F


class StackedLinear(nn.Module):
    """K linear layers at once: `[K, n, d] -> [K, n, h]`; weight `[K, h, d]`, bias `[K, h]`."""

    def __init__(self, count: int, inputs: int, outputs: int, std: float | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(count, outputs))
        if std is None:
            # What nn.Linear starts from: uniform in +-1/sqrt(inputs), weight and bias.
            bound = inputs**-0.5
            nn.init.uniform_(self.weight, -bound, bound)
            nn.init.uniform_(self.bias, -bound, bound)
        else:
            nn.init.normal_(self.weight, std=std)

    def forward(self, values: Tensor, group: int = 0) -> Tensor:
        """`group`: of turned values (see `quantize.decode`)."""
        weight = turn(self.weight, group)
        return torch.baddbmm(self.bias.unsqueeze(1), values, weight.transpose(1, 2))


def start_linear(layer: nn.Linear, std: float | None) -> nn.Linear:
    """Give a layer weights from N(0, std) and zero biases; of None, leave PyTorch's default."""
    if std is not None:
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    return layer


def stacked_norm(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """K layer norms at once: `[K, n, h]` with a gain and a shift `[K, h]` each; epsilon 1e-5."""
    normed = F.layer_norm(values, values.shape[-1:], eps=1e-5)
    return normed * weight.unsqueeze(1) + bias.unsqueeze(1)


class Affine(nn.Module):
    """A gain and a shift for every feature, which change nothing at the start: `[..., d]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, states: Tensor) -> Tensor:
        return states * self.weight + self.bias


def trained_norm(backbone: Backbone) -> nn.Module:
    """The norm in front of an encoder-decoder's head, to be tuned: a copy of its final norm, or a
    new one where blocks end with their own."""
    if backbone.family.norm is None:
        return nn.LayerNorm(backbone.width)
    copied: nn.Module = trained_copy(by_hand(norm_of(backbone.model, backbone.family, "decoder")))
    return copied


def trained_copy(frozen: nn.Module) -> Any:
    """A module that starts as a frozen one and is tuned."""
    return copy.deepcopy(frozen).requires_grad_(True)
