"""Baselines that read cached states as they are, on encoder-decoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.families import blocks_of, norm_of, stack_of
from sherl_pipe.stages.features import Packed
from sherl_pipe.stages.methods.late import decode_late
from sherl_pipe.stages.methods.parts import Affine, trained_copy
from sherl_pipe.stages.methods.readout import TapWeights
from sherl_pipe.stages.methods.route import RouteSpec, WordRoute
from sherl_pipe.stages.norm import by_hand
from sherl_pipe.stages.quantize import turn
from sherl_pipe.stages.surgery import TapRecorder, late_decoder, replace_module, share
from sherl_pipe.stages.words import PrefixTree
from torch import Tensor, nn


class ReadoutSeq2Seq(WordRoute):
    """A trained copy of T5's final norm on decoder states, in front of the frozen head.

    A head of the words' rows behind a trained gain g tells two words apart by
    (w_1 - w_2) * g . x / |x|: a linear model of the decoder's state x, of which T5's own answer is
    the start. It is still a language model, so it generates. Where blocks end with a norm of their
    own (BART), a gain and a shift of every feature stand in front of the head instead.

    The state that leaves the last block is seldom cached. Where it is not, the frozen late blocks
    make it from the state that enters them; nothing in front of them is trained, so no gradient
    goes through them.

    Args:
        backbone: the frozen model.
        spec: `spec.taps["decoder"]` are summed, together with what leaves the `spec.late` last
            blocks. `spec.last["decoder"]` is the tap that enters them, and `spec.taps["encoder"]`
            the encoder's top tap; neither is there for `late` 0.
    """

    def __init__(self, backbone: Backbone, spec: RouteSpec) -> None:
        super().__init__(backbone, spec)
        model: Any = backbone.model
        self.late = late_decoder(backbone, spec.late) if spec.late else None
        self.memory_norm: nn.Module = share(by_hand(norm_of(model, backbone.family, "encoder")))
        self.mix = TapWeights(len(self._summed(backbone)))
        norm = norm_of(model, backbone.family, "decoder")
        plain = isinstance(norm, nn.Identity)
        self.norm = Affine(backbone.width) if plain else trained_copy(by_hand(norm))

    def _summed(self, backbone: Backbone) -> tuple[int, ...]:
        """Taps of the live decoder that are summed."""
        top = (len(backbone.blocks("decoder")),) if self.spec.late else ()
        return (*self.spec.taps["decoder"], *top)

    def reads(self) -> dict[str, tuple[int, ...]]:
        """Taps needed from a cache, per stream; of the decoder the late blocks' input last."""
        taps = self.spec.taps["decoder"]
        if not self.spec.late:
            return {"decoder": taps}
        last = self.spec.last["decoder"]
        return {
            "encoder": self.spec.taps["encoder"],
            "decoder": taps if last in taps else (*taps, last),
        }

    def fuse(
        self, streams: Mapping[str, Packed], tree: PrefixTree | None = None
    ) -> tuple[Tensor, ...]:
        """The cached taps' part of the sum, `[m, d]`, and for the late blocks the frozen memory
        `[n, d]`."""
        decoder, count = streams["decoder"], len(self.spec.taps["decoder"])
        shares = self.mix.shares(decoder.states)[:count]
        if count and self.mix.scores is not None:
            cached = torch.tensordot(shares.to(decoder.states.dtype), decoder.states[:count], 1)
            cached = turn(cached, decoder.group)
        else:
            cached = decoder.tap(0) if count else torch.zeros_like(decoder.states[0])
        if not self.spec.late:
            return (cached,)
        return cached, self.memory_norm(streams["encoder"].tap(0))

    @staticmethod
    def hidden(
        routes: Sequence[ReadoutSeq2Seq],
        fused: Sequence[tuple[Tensor, ...]],
        batches: Sequence[Mapping[str, Packed]],
        tree: PrefixTree | None = None,
    ) -> list[Tensor]:
        """States `[B, P, d]` of each route's batch, P being the nodes of a tree if there is one."""
        decoders = [streams["decoder"] for streams in batches]
        positions = max(each.longest for each in decoders)
        sums = [each.pad(part[0], positions) for each, part in zip(decoders, fused, strict=True)]
        if routes[0].late is not None:
            inputs = [each.pad(each.tap(-1), positions) for each in decoders]
            memories = [memory for _, memory in fused]
            tops = decode_late(routes[0].late, inputs, memories, batches, tree)
            sums = [
                part + route.mix.shares(top)[-1] * top
                for route, part, top in zip(routes, sums, tops, strict=True)
            ]
        return [
            route.norm(states) * route.scale for route, states in zip(routes, sums, strict=True)
        ]

    def attach(self, backbone: Backbone) -> nn.Module:
        """The live model with the sum in front of the trained norm; its weights are shared."""
        model: Any = share(backbone.model)
        taps, family = self._summed(backbone), backbone.family
        blocks = blocks_of(model, family, "decoder")
        states = TapRecorder(blocks, taps)

        def mix(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            mixed = self.mix(states.stacked(taps))
            if family.norm is None:
                mixed = self.norm(mixed)
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        blocks[-1].register_forward_hook(mix)
        if family.norm is not None:
            replace_module(stack_of(model, family, "decoder"), family.norm, self.norm)
        live: nn.Module = model
        return live
