"""SHERL's consolidation for CLIP4Clip (Diao et al., ECCV 2024): the taps of one tower, first over
its tokens and then over its layers, guided by the tower's final embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from sherl_pipe.cache import InputError
from sherl_pipe.stages.methods.guided import GATE_SCALE, guided_consolidation
from sherl_pipe.stages.methods.parts import StackedLinear
from sherl_pipe.stages.methods.published import Names, Published, count, pair, part, probe, whole
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-6


def token_of(states: Tensor, position: Tensor | None) -> Tensor:
    """`[K, B, S, h] -> [K, B, h]`: the token at `position [B]` of each example, else the first."""
    if position is None:
        return states[:, :, 0]
    return states[:, torch.arange(states.shape[1], device=states.device), position]


class ClipConsolidation(Published):
    """Fuses K taps of a tower and its embedding into one embedding (SPEC 2.5).

    Args:
        width: d, of the tower.
        hidden: h, of the reduced vectors.
        embed: E, of the final embedding.
        taps: K, at least 1; the embedding is the guide, so every tap is a shallow one.
        gated: whether the token that each tap starts from has a gate (published for MSR-VTT; not
            for MSVD).
    """

    def __init__(self, width: int, hidden: int, embed: int, taps: int, *, gated: bool) -> None:
        super().__init__()
        if taps < 1 or hidden < 1:
            raise InputError(
                f"consolidation needs one tap and one hidden unit, found {taps} and {hidden}"
            )
        self.reduce = StackedLinear(taps, width, hidden, None)
        self.reduce_last = nn.Linear(embed, hidden)
        self.token_score = StackedLinear(taps, hidden, 1, None)
        self.score = nn.Linear(hidden, 1)
        self.tail = nn.Linear(hidden, embed)
        # sigmoid(1 / 0.1) = 0.99995: open.
        self.token_gate = nn.Parameter(torch.ones(taps)) if gated else None

    def forward(
        self,
        taps: Tensor | Sequence[Tensor],
        last: Tensor,
        *,
        mask: Tensor | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        """Consolidate.

        Args:
            taps: `[K, B, S, d]`, or K tensors `[B, S, d]`.
            last: `[B, E]` or `[B, 1, E]`, the tower's final embedding.
            mask: `[B, S]`, 1 or True where there is a token; all of them by default.
            position: `[B]`, the token that each example's vectors start from (of a text the end of
                its words); the first by default.

        Returns `[B, E]`.
        """
        stacked = taps if isinstance(taps, Tensor) else torch.stack(list(taps))
        reduced = self.reduced(stacked.flatten(1, 2)).view(*stacked.shape[:3], -1)
        return self.fused(reduced, last.flatten(1), mask, position)

    def reduced(self, states: Tensor) -> Tensor:
        """Taps `[K, n, d] -> [K, n, h]`, each token for itself."""
        out: Tensor = self.reduce(F.relu(states))
        return out

    def fused(
        self, reduced: Tensor, embedding: Tensor, mask: Tensor | None, position: Tensor | None
    ) -> Tensor:
        """`forward` of what is reduced already, `[K, B, S, h]`, and the embedding `[B, E]`."""
        guide = self.reduce_last(F.relu(embedding))
        fused = guided_consolidation(
            self._gather(reduced, guide, mask, position),
            guide,
            self.score.weight[0],
            self.score.bias[0],
            EPSILON,
        )
        out: Tensor = self.tail(F.relu(fused)) + embedding
        return out

    def _gather(
        self, reduced: Tensor, guide: Tensor, mask: Tensor | None, position: Tensor | None
    ) -> Tensor:
        """One vector of each tap: `[K, B, S, h] -> [K, B, h]`, with the guide `[B, h]`."""
        aim = guide * self.token_score.weight  # [K, B, h]
        scores = (reduced @ aim.unsqueeze(-1)).squeeze(-1) + self.token_score.bias.unsqueeze(1)
        if mask is not None:
            scores = scores * mask.to(scores.dtype)
        weights = F.relu(scores)
        shares = weights / (weights.sum(-1, keepdim=True) + EPSILON)
        base = token_of(reduced, position)
        if self.token_gate is not None:
            base = base * torch.sigmoid(self.token_gate / GATE_SCALE)[:, None, None]
        return (shares.unsqueeze(2) @ reduced).squeeze(2) + base

    @classmethod
    def from_reference(cls, params: Mapping[str, Tensor]) -> ClipConsolidation:
        """One with the published parameters (SPEC 2.5); gated if there are gates among them.

        Raises InputError for names that are missing or left over and for shapes that do not fit.
        """
        hidden, width = probe(params, "hor_block.0.fc.weight", 2).shape
        embed = probe(params, "fc_out.weight", 2).shape[0]
        taps = count(params, "hor_block.", ".fc.weight")
        gated = "guide_block.gate_parameters" in params
        module = cls(width, hidden, embed, taps, gated=gated)
        module.load_published(params)
        return module

    def published(self) -> Names:
        """By published name, where a tensor is kept."""
        named = pair("hor_block_last.fc", self.reduce_last) | pair("fc_out", self.tail)
        named |= pair("guide_block.layer_attn", self.score)
        for tap in range(self.reduce.weight.shape[0]):
            named |= pair(f"hor_block.{tap}.fc", self.reduce, part(tap))
            named |= pair(f"guide_block.spatial_attn.{tap}", self.token_score, part(tap))
        if self.token_gate is not None:
            named["guide_block.gate_parameters"] = (self.token_gate, whole)
        return named
