"""SHERL's route on a causal model that speaks: its own head over the vocabulary is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.features import Packed
from sherl_pipe.stages.methods.late import encode_late
from sherl_pipe.stages.methods.sherl import SherlEncoder
from sherl_pipe.stages.quantize import turn
from sherl_pipe.stages.surgery import share
from sherl_pipe.stages.words import PrefixTree, word_logits
from torch import Tensor, nn


class SherlCausal(SherlEncoder):
    """SHERL on a causal model (SPEC 2.3), in front of its frozen language-model head.

    A free-text target follows its prompt in one sequence; features are those of the prompt, and
    under the role `target` those of the target's tokens. Where label words are scored the prompt
    stands alone.
    """

    def make_head(self, backbone: Backbone) -> nn.Module:
        """The backbone's own, frozen."""
        language: Any = backbone.language
        head: nn.Module = share(language.get_output_embeddings())
        return head

    def fuse(self, streams: Mapping[str, Packed], tree: PrefixTree | None = None) -> tuple[Tensor]:
        """Consolidated states `[n, d]` of whole sequences."""
        if "target" not in streams:
            return super().fuse(streams)
        packed = continued(streams["hidden"], streams["target"])
        return super().fuse({"hidden": packed})

    @staticmethod
    def hidden(
        routes: Sequence[Any],
        fused: Sequence[tuple[Tensor, ...]],
        batches: Sequence[Mapping[str, Packed]],
        tree: PrefixTree | None = None,
    ) -> list[Tensor]:
        """States `[B, P, d]` that predict: those of the prompt's last token, and of the target's
        behind it. There is no tree."""
        whole = []
        for streams in batches:
            prompt, target = streams["hidden"], streams.get("target")
            lengths = prompt.lengths if target is None else prompt.lengths + target.lengths
            whole.append({"hidden": Packed(prompt.states, lengths)})
        found = encode_late(routes[0].late, [states for (states,) in fused], whole)
        return [
            _predicting(states, streams)
            for (states, _), streams in zip(found, batches, strict=True)
        ]

    def logits(self, hidden: Tensor, tokens: Sequence[int] | None = None) -> Tensor:
        """`[..., V]` of `[..., d]`; V is the vocabulary, or `tokens` of it."""
        return word_logits(self.head, hidden, tokens)


def continued(prompt: Packed, target: Packed) -> Packed:
    """Every example's prompt with its target behind it, as one sequence."""
    group = prompt.group
    one, other = prompt.states, target.states
    if prompt.group != target.group:  # a batch of few rows is not left turned
        one, other, group = turn(one, prompt.group), turn(other, target.group), 0
    device = prompt.lengths.device
    owners = torch.arange(len(prompt.lengths), device=device)
    lengths = torch.stack([prompt.lengths, target.lengths]).flatten()
    order = owners.repeat(2).repeat_interleave(lengths).argsort(stable=True)
    return Packed(torch.cat([one, other], 1)[:, order], prompt.lengths + target.lengths, group)


def _predicting(states: Tensor, streams: Mapping[str, Packed]) -> Tensor:
    """`[B, P, d]` of `[B, S, d]`: from the prompt's last token on, zeros behind an end."""
    prompt, target = streams["hidden"].lengths, streams.get("target")
    count = torch.ones_like(prompt) if target is None else target.lengths + 1
    steps = torch.arange(int(count.max()), device=prompt.device)
    places = (prompt - 1).unsqueeze(1) + steps
    inside = steps < count.unsqueeze(1)
    rows = places.clamp(max=states.shape[1] - 1).unsqueeze(-1).expand(-1, -1, states.shape[-1])
    return states.gather(1, rows) * inside.unsqueeze(-1)
