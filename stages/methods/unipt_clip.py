"""UniPT for CLIP4Clip (Diao et al., CVPR 2024): a tower's embedding looks through its taps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from sherl_pipe.cache import InputError
from sherl_pipe.stages.methods.consolidation_clip import token_of
from sherl_pipe.stages.methods.parts import StackedLinear
from sherl_pipe.stages.methods.published import Names, Published, count, pair, part, probe
from torch import Tensor, nn
from torch.nn import functional as F

# Here the least that a sum of weights is divided by, where the other forms add it.
LEAST = 1e-6


class ClipUniPT(Published):
    """Adds to an embedding what it finds in K taps (SPEC 6.4).

    Args:
        width: d, of the tower.
        hidden: h, of the reduced vectors.
        embed: E, of the final embedding.
        taps: K, at least 1; all are targets, the embedding being the anchor.
    """

    def __init__(self, width: int, hidden: int, embed: int, taps: int) -> None:
        super().__init__()
        if taps < 1 or hidden < 1:
            raise InputError(f"UniPT needs one tap and one hidden unit, found {taps} and {hidden}")
        self.down = StackedLinear(taps, width, hidden, None)
        self.down_anchor = nn.Linear(embed, hidden)
        self.score = nn.Linear(hidden, 1)
        self.tail = nn.Linear(hidden, embed)

    def forward(
        self,
        taps: Tensor | Sequence[Tensor],
        anchor: Tensor,
        *,
        mask: Tensor | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        """The result for a padded batch.

        Args:
            taps: `[K, B, S, d]`, or K tensors `[B, S, d]`.
            anchor: `[B, E]` or `[B, 1, E]`, the tower's final embedding.
            mask: `[B, S]`, 1 or True where there is a token; all of them by default.
            position: `[B]`, the token that each example's vectors start from (of a text the end of
                its words); the first by default.

        Returns `[B, E]`.
        """
        stacked = taps if isinstance(taps, Tensor) else torch.stack(list(taps))
        reduced = self.reduced(stacked.flatten(1, 2)).view(*stacked.shape[:3], -1)
        return self.fused(reduced, anchor.flatten(1), mask, position)

    def reduced(self, states: Tensor) -> Tensor:
        """Taps `[K, n, d] -> [K, n, h]`, each token for itself."""
        out: Tensor = self.down(F.relu(states))
        return out

    def fused(
        self, targets: Tensor, embedding: Tensor, mask: Tensor | None, position: Tensor | None
    ) -> Tensor:
        """`forward` of what is reduced already, `[K, B, S, h]`, and the embedding `[B, E]`."""
        query = self.down_anchor(F.relu(embedding))
        scores = (targets @ query.unsqueeze(-1)).squeeze(-1)  # [K, B, S]
        if mask is None:
            mean = targets.mean(2)
        else:
            marks = mask.to(scores.dtype)
            scores = scores * marks
            tokens = marks.sum(1).clamp(min=1).unsqueeze(-1)
            mean = (marks.unsqueeze(1) @ targets).squeeze(2) / tokens
        weights = F.relu(scores)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=LEAST)
        found = (weights.unsqueeze(2) @ targets).squeeze(2) + token_of(targets, position)
        shares = self.score(query * mean).softmax(0)  # [K, B, 1]
        out: Tensor = embedding + self.tail(F.relu((shares * found).sum(0)))
        return out

    @classmethod
    def from_reference(cls, params: Mapping[str, Tensor]) -> ClipUniPT:
        """One with the published parameters (SPEC 6.4).

        Raises InputError for names that are missing or left over and for shapes that do not fit.
        """
        hidden, width = probe(params, "downsample_layers.0.1.weight", 2).shape
        embed = probe(params, "upsample_layer.1.weight", 2).shape[0]
        module = cls(width, hidden, embed, count(params, "downsample_layers.", ".1.weight"))
        module.load_published(params)
        return module

    def published(self) -> Names:
        """By published name, where a tensor is kept."""
        named = pair("downsample_layer.1", self.down_anchor) | pair("gate_layer", self.score)
        named |= pair("upsample_layer.1", self.tail)
        for tap in range(self.down.weight.shape[0]):
            named |= pair(f"downsample_layers.{tap}.1", self.down, part(tap))
        return named
