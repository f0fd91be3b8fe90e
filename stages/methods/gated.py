"""The gated reduction of all taps (SPEC 2.1), with its gradient by hand.

Both layers behind the first read the same rows, so they are one product forward and one each way
back; what a chain of operations would keep and copy of `[K, n, h]` is half as much here.
"""

from __future__ import annotations

from typing import Any

import torch
from sherl_pipe.stages.methods.parts import StackedLinear
from sherl_pipe.stages.quantize import turn
from torch import Tensor
from torch.autograd.function import once_differentiable


class GatedReduction(torch.autograd.Function):
    """`[K, n, h]` of `[K, n, d]`: r = relu(W1 x + b1), then (W2 r + b2 + r) sigmoid(W3 r + b3).

    Weights are `[K, out, in]`, biases `[K, out]`; `group` is that of turned taps, else 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        taps: Tensor,
        first: Tensor,
        first_bias: Tensor,
        second: Tensor,
        second_bias: Tensor,
        third: Tensor,
        third_bias: Tensor,
        group: int,
    ) -> Tensor:
        turned = turn(first, group)
        reduced = torch.baddbmm(first_bias.unsqueeze(1), taps, turned.transpose(1, 2)).relu_()
        both = torch.cat([second, third], 1)
        bias = torch.cat([second_bias, third_bias], 1).unsqueeze(1)
        kept, gate = torch.baddbmm(bias, reduced, both.transpose(1, 2)).chunk(2, -1)
        kept.add_(reduced)
        gate.sigmoid_()
        ctx.group = group
        ctx.save_for_backward(taps, turned, reduced, both, kept, gate)
        return kept * gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        taps, turned, reduced, both, kept, gate = ctx.saved_tensors
        gradient = gradients[0]
        width = reduced.shape[-1]
        to_both = gradient.new_empty(*reduced.shape[:-1], 2 * width)
        to_kept, to_gate = to_both.split(width, -1)
        torch.mul(gradient, gate, out=to_kept)
        torch.mul(gradient, kept, out=to_gate)
        torch.ops.aten.sigmoid_backward.grad_input(to_gate, gate, grad_input=to_gate)
        to_weights = to_both.transpose(1, 2) @ reduced
        to_biases = to_both.sum(1)
        to_reduced = torch.baddbmm(to_kept, to_both, both)
        torch.ops.aten.threshold_backward.grad_input(to_reduced, reduced, 0, grad_input=to_reduced)
        return (
            to_reduced @ turned if ctx.needs_input_grad[0] else None,
            turn(to_reduced.transpose(1, 2) @ taps, ctx.group),
            to_reduced.sum(1),
            to_weights[:, :width].contiguous(),
            to_biases[:, :width].contiguous(),
            to_weights[:, width:].contiguous(),
            to_biases[:, width:].contiguous(),
            None,
        )


def gated_reduction(
    taps: Tensor, layers: tuple[StackedLinear, StackedLinear, StackedLinear], group: int
) -> Tensor:
    """`GatedReduction` of `[K, n, d]` by three stacked layers; `group` is that of turned taps."""
    if torch.is_autocast_enabled(taps.device.type):
        # Each product in the type that autocast wants.
        first, second, third = layers
        reduced = torch.relu(first(taps, group))
        gated: Tensor = (second(reduced) + reduced) * torch.sigmoid(third(reduced))
        return gated
    weights = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    out: Tensor = GatedReduction.apply(taps, *weights, group)  # type: ignore[no-untyped-call]
    return out
