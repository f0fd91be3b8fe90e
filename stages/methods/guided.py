"""SHERL's guided consolidation (SPEC 1.1), with its gradient by hand.

Everything between the two passes over the reduced taps happens in matrices of K x K per token, so
forward and backward read the taps a few times where a chain of operations would write a dozen
copies of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# A gate g of the last feature opens by tanh(g / 0.1); by sigmoid(g / 0.1) where it is one of a tap.
GATE_SCALE = 0.1


class GuidedConsolidation(torch.autograd.Function):
    """`[n, h]` of reduced taps `[M, n, h]` and a guide `[n, h]`; without one, the last of the taps
    is the guide, and M is one less.

    With unit vectors u = s / (|s| + e), the redundancy of a tap is r_m = sum_k relu(u_m . u_k),
    its own term included; its score is z_m = w . (s_m * g) + b; its share is
    p_m = a_m / (sum a + e) with a_m = relu(z_m) / r_m; the result is sum_m p_m s_m + g, or without
    `added` the sum alone. A tap that was reduced to nothing resembles nothing, itself included, and
    has no share, where the papers' quotient would be 0 / 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        reduced: Tensor,
        guide: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        epsilon: float,
        added: bool,
    ) -> Tensor:
        alone = guide is None
        shallow, guide = (reduced[:-1], reduced[-1]) if guide is None else (reduced, guide)
        with torch.autocast(shallow.device.type, enabled=False):
            kind = torch.promote_types(shallow.dtype, torch.float32)
            taps = shallow.to(kind).transpose(0, 1)  # [n, M, h]
            guided, scale = guide.to(kind), weight.to(kind)
            aim = guided * scale
            norms = torch.linalg.vector_norm(taps, dim=-1) + epsilon  # [n, M]
            likeness = taps @ taps.transpose(1, 2)
            likeness = likeness.div_(norms.unsqueeze(2) * norms.unsqueeze(1))  # u_m . u_k
            redundancy = likeness.clamp(min=0).sum(-1)
            there = redundancy > 0
            redundancy = redundancy.where(there, 1.0)
            scores = (taps @ aim.unsqueeze(-1)).squeeze(-1) + bias.to(kind)
            weights = torch.where(there, scores.clamp(min=0) / redundancy, 0.0)
            total = weights.sum(-1, keepdim=True) + epsilon
            shares = weights / total
            fused = (shares.unsqueeze(1) @ taps).squeeze(1)
            fused = fused.add_(guided) if added else fused
        ctx.epsilon, ctx.added, ctx.alone = epsilon, added, alone
        ctx.types = [each.dtype for each in (shallow, guide, weight, bias)]
        ctx.save_for_backward(
            taps, guided, scale, norms, likeness, redundancy, there, scores, total, shares
        )
        return fused.to(guide.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        taps, guide, scale, norms, likeness, redundancy, there, scores, total, shares = (
            ctx.saved_tensors
        )
        gradient = gradients[0].to(taps.dtype)
        to_share = (taps @ gradient.unsqueeze(-1)).squeeze(-1)  # [n, M]
        # In the order of the published program: of one tap alone little but rounding is left.
        to_weight = to_share / total - (to_share * (shares / total)).sum(-1, keepdim=True)
        to_weight = to_weight.where(there, 0.0)
        to_score = (to_weight / redundancy).where(scores > 0, 0.0)
        # r has one row of likenesses each; a likeness has two unit vectors, so rows and columns.
        to_redundancy = -to_weight * scores.clamp(min=0) / redundancy.square()
        mixed = (to_redundancy.unsqueeze(2) + to_redundancy.unsqueeze(1)).where(likeness > 0, 0.0)
        # Of u = s / (|s| + e): along the other taps, and against the growth of the own length.
        own = (mixed * likeness).sum(-1) / (norms * (norms - ctx.epsilon)).where(there, 1.0)
        mixed = mixed / (norms.unsqueeze(2) * norms.unsqueeze(1))
        mixed.diagonal(dim1=1, dim2=2).sub_(own)
        outer = torch.stack([shares, to_score], -1) @ torch.stack([gradient, guide * scale], 1)
        to_taps = outer.baddbmm_(mixed, taps).transpose(0, 1)
        pulled = (to_score.unsqueeze(1) @ taps).squeeze(1)  # sum_m dz_m s_m
        to_guide = pulled * scale
        to_guide = to_guide.add_(gradient) if ctx.added else to_guide
        shallow, guide_type, *types = ctx.types
        found = (pulled * guide).sum(0).to(types[0]), to_score.sum().to(types[1])
        if not ctx.alone:
            return to_taps.to(shallow), to_guide.to(guide_type), *found, None, None
        whole = to_guide.new_empty(len(to_taps) + 1, *to_guide.shape, dtype=shallow)
        whole[:-1], whole[-1] = to_taps, to_guide
        return whole, None, *found, None, None


def guided_consolidation(
    reduced: Tensor,
    guide: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    *,
    added: bool = True,
) -> Tensor:
    """`GuidedConsolidation` of `reduced [M, n, h]`, `guide [n, h]` (None: the last of `reduced`),
    `weight [h]` and `bias []`; with `added` the guide is a term of the result."""
    out: Tensor = GuidedConsolidation.apply(reduced, guide, weight, bias, epsilon, added)  # type: ignore[no-untyped-call]
    return out


class GatedTail(torch.autograd.Function):
    """`[n, d]`: W relu(x) + b + tanh(g / GATE_SCALE) y, of `x [n, h]` and the last feature
    `y [n, d]` (SPEC 1.1), with its gradient by hand: one sum where a chain of operations would
    write three."""

    @staticmethod
    def forward(
        ctx: Any, fused: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, last: Tensor
    ) -> Tensor:
        positive, share = fused.relu(), torch.tanh(gate / GATE_SCALE)
        ctx.save_for_backward(positive, weight, share, last)
        return torch.addmm(bias, positive, weight.T).addcmul_(last, share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        positive, weight, share, last = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        opened = torch.dot(gradient.flatten(), last.flatten())
        return (
            torch.ops.aten.threshold_backward(gradient @ weight, positive, 0),
            gradient.T @ positive,
            gradient.sum(0),
            opened * (1 - share.square()) / GATE_SCALE,
            gradient * share if ctx.needs_input_grad[4] else None,
        )


def gated_tail(fused: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, last: Tensor) -> Tensor:
    """`GatedTail` of `fused [n, h]`, `weight [d, h]`, `bias [d]`, `gate [1]` and `last [n, d]`."""
    if torch.is_autocast_enabled(fused.device.type) or last.dtype != fused.dtype:
        # Each operation in the type that autocast, or PyTorch's promotion, wants.
        tail = torch.nn.functional.linear(fused.relu(), weight, bias)
        return tail + torch.tanh(gate / GATE_SCALE) * last
    out: Tensor = GatedTail.apply(fused, weight, bias, gate, last)  # type: ignore[no-untyped-call]
    return out
