"""T5's norm, with its gradient by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_KINDS = ("T5LayerNorm", "MT5LayerNorm")


class RootMeanSquare(torch.autograd.Function):
    """`w x / sqrt(mean(x^2) + e)` of `x [..., d]`, `w [d]` (Zhang and Sennrich, 2019)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        length = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        scale = length.square_().div_(states.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(states, weight, scale)
        out: Tensor = states * scale
        return out.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, scale = ctx.saved_tensors
        (gradient,) = gradients
        normed = states * scale
        to_weight = to_states = None
        if ctx.needs_input_grad[1]:
            to_weight = (gradient * normed).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            to_states = gradient * weight
            along = torch.linalg.vecdot(to_states, normed).div_(states.shape[-1])
            to_states.addcmul_(normed, along.unsqueeze(-1), value=-1).mul_(scale)
        return to_states, to_weight, None


class Norm(nn.Module):
    """Stands where T5's norm was and gives what that gives, up to rounding.

    Args:
        norm: the model's own; its weight is shared.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = norm.weight
        self.variance_epsilon: float = norm.variance_epsilon
        self._own = type(norm).forward

    def forward(self, states: Tensor) -> Tensor:
        """`[..., d]` of states `[..., d]`."""
        if states.dtype != self.weight.dtype or states.dtype in (torch.float16, torch.bfloat16):
            other: Tensor = self._own(self, states)  # accumulates in float32
            return other
        out: Tensor = RootMeanSquare.apply(states, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
        return out


def by_hand(norm: nn.Module) -> Any:
    """A `Norm` for T5's; any other norm as it is."""
    return Norm(norm) if type(norm).__name__ in _KINDS else norm
