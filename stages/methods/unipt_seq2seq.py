"""UniPT's route on encoder-decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.families import blocks_of, stack_of
from sherl_pipe.stages.features import Packed
from sherl_pipe.stages.methods.interaction import causal_interaction
from sherl_pipe.stages.methods.live import inside, two_memories
from sherl_pipe.stages.methods.parts import trained_norm
from sherl_pipe.stages.methods.route import RouteSpec, WordRoute
from sherl_pipe.stages.methods.unipt import VARIANTS, UniPT, reduce_packed
from sherl_pipe.stages.surgery import TapRecorder, share
from sherl_pipe.stages.words import PrefixTree
from torch import Tensor, nn


class UniptSeq2Seq(WordRoute):
    """UniPT on T5 and BART, which the paper does not have.

    One UniPT over the encoder's taps gives a memory of the reduced width, behind a norm as every
    reduced tap is. Another over the decoder's taps looks through these, causally, and through that
    memory as one more target (see `causal_interaction`): no frozen block runs that could attend to
    it. What it gives goes through a trained copy of the final norm, or a new norm
    where there is none (BART), to the frozen head.

    Args:
        backbone: the frozen model.
        spec: `spec.taps["encoder"]` and `["decoder"]` are what is reduced; the last of each is its
            anchor.
    """

    def __init__(self, backbone: Backbone, spec: RouteSpec) -> None:
        super().__init__(backbone, spec)
        self.late = None
        width = backbone.width
        hidden, variant = width // spec.reduction, spec.variant or ""
        self.encoder = UniPT(width, hidden, len(spec.taps["encoder"]), hidden, variant)
        self.encoder_norm = nn.LayerNorm(hidden)
        self.decoder = UniPT(width, hidden, len(spec.taps["decoder"]), width, variant)
        self.decoder_norm = trained_norm(backbone)

    def fuse(self, streams: Mapping[str, Packed], tree: PrefixTree | None = None) -> tuple[Tensor]:
        """States `[B, P, d]` for the head, P being the nodes of a tree if there is one.

        Nodes look at their own path alone, so one that several words share is computed once.
        """
        encoder, decoder = streams["encoder"], streams["decoder"]
        mask = encoder.mask()
        memory = self._memory(reduce_packed(self.encoder, encoder), mask)
        reduced = reduce_packed(self.decoder, decoder)
        seen = _past(reduced.shape[2], reduced.shape[2]) if tree is None else tree.ancestry
        return (self._states(reduced, seen.unsqueeze(0), memory, mask) * self.scale,)

    def _memory(self, reduced: Tensor, mask: Tensor) -> Tensor:
        """`[B, S, h]` of `[K, B, S, h]`."""
        found = self.encoder.interact(reduced, mask)
        memory: Tensor = self.encoder_norm(self.encoder.expand(reduced[-1], found))
        return memory

    def _states(self, reduced: Tensor, seen: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """`[B, P, d]` behind the norm, of `[K, B, Q, h]` (see `causal_interaction`)."""
        score = self.decoder.score
        found = causal_interaction(
            reduced,
            seen.to(reduced),
            memory,
            mask.to(reduced),
            score.weight[0],
            score.bias[0],
            VARIANTS[self.decoder.variant].epsilon,
        )
        anchor = reduced[-1, :, -seen.shape[1] :]
        states: Tensor = self.decoder_norm(self.decoder.expand(anchor, found))
        return states

    def attach(self, backbone: Backbone) -> nn.Module:
        """The live model with both UniPTs beside it; its weights are shared.

        The reduced taps of earlier positions are in the model's own KV cache, behind its blocks'
        keys and values.
        """
        model: Any = share(backbone.model)
        width, taps, family = backbone.width, self.spec.taps, backbone.family
        blocks = blocks_of(model, family, "decoder")
        depth = len(blocks)
        encoder_states = TapRecorder(blocks_of(model, family, "encoder"), taps["encoder"])
        decoder_states = TapRecorder(blocks, taps["decoder"])

        def reduced(side: UniPT, stacked: Tensor) -> Tensor:
            return side.reduce(stacked.flatten(1, 2)).view(*stacked.shape[:3], -1)

        def memory(mask: Tensor | None) -> Tensor:
            stacked = encoder_states.stacked(taps["encoder"])
            return self._memory(reduced(self.encoder, stacked), inside(mask, stacked))

        def look(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            side = kwargs["encoder_hidden_states"][..., width:]
            mask = inside(kwargs.get("encoder_attention_mask"), side.unsqueeze(0))
            rows = reduced(self.decoder, decoder_states.stacked(taps["decoder"]))
            new = rows.shape[2]
            if output.past_key_values is not None:
                rows = _remember(output.past_key_values, depth, rows)
            seen = _seen(kwargs.get("attention_mask"), new, rows.shape[2]).to(rows.device)
            output.last_hidden_state = self._states(rows, seen, side, mask)
            return output

        two_memories(model, family, width, memory, depth)
        stack_of(model, family, "decoder").register_forward_hook(look, with_kwargs=True)
        live: nn.Module = model
        return live


def _past(new: int, every: int) -> Tensor:
    """Boolean `[P, Q]`: the last P of Q positions see themselves and what is before them."""
    return torch.ones(new, every, dtype=torch.bool).tril(every - new)


def _seen(mask: Tensor | None, new: int, every: int) -> Tensor:
    """Boolean `[B, P, Q]` or `[1, P, Q]` of a decoder's mask: none, `[B, Q]` of zeros and ones, or
    `[B, 1, P, Q]`, additive or boolean."""
    past = _past(new, every).unsqueeze(0)
    if mask is None:
        return past
    if mask.dim() == 2:
        # A position sees itself, or it would have nothing to take a mean of.
        own = torch.eye(every, dtype=torch.bool)[-new:]
        return past & (mask.bool().unsqueeze(1).to(past.device) | own)
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > -1


def _remember(cache: Any, depth: int, rows: Tensor) -> Tensor:
    """`[K, B, Q, h]`: reduced taps of all positions so far, those of the last ones being `rows`.

    They are kept as keys of one more layer, behind the first `depth`, with the taps as heads; so
    what happens to the cache between two steps (another order of beams) happens to them.
    """
    from transformers.cache_utils import DynamicLayer

    layers = cache.self_attention_cache.layers
    layers.extend(DynamicLayer() for _ in range(depth + 1 - len(layers)))
    new = rows.transpose(0, 1)
    kept: Tensor = layers[depth].update(new, new[..., :0])[0]
    return kept.transpose(0, 1)
