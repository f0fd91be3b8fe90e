"""DTL's route on encoder-decoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.families import blocks_of, norm_of
from sherl_pipe.stages.features import Packed
from sherl_pipe.stages.methods.add_backs import adding_back
from sherl_pipe.stages.methods.dtl import CompactSide
from sherl_pipe.stages.methods.late import decode_late, on_paths
from sherl_pipe.stages.methods.live import two_memories
from sherl_pipe.stages.methods.route import RouteSpec, WordRoute
from sherl_pipe.stages.norm import by_hand
from sherl_pipe.stages.surgery import TapRecorder, late_decoder, share
from sherl_pipe.stages.words import PrefixTree
from torch import Tensor, nn


class DtlSeq2Seq(WordRoute):
    """DTL on T5 and BART, which the paper does not have.

    Each stack has a side network. The encoder's is added behind the last block alone, in front of
    the frozen final norm, so that no encoder block runs; that memory is the late decoder blocks'.
    The decoder's is added behind each late block. Final norm and head are frozen.

    Args:
        backbone: the frozen model.
        spec: `spec.taps["encoder"]` are what enters the blocks that report, and the top tap;
            `spec.taps["decoder"]` what enters the cached blocks that report, the last of them being
            what enters the first late block.
    """

    late: nn.Module

    def __init__(self, backbone: Backbone, spec: RouteSpec) -> None:
        super().__init__(backbone, spec)
        model: Any = backbone.model
        width = backbone.width
        rank = width // spec.reduction
        *reports, top = spec.taps["encoder"]
        self.encoder = CompactSide(width, rank, reports, [top - 1])
        depth = len(backbone.blocks("decoder"))
        late = range(depth - spec.late, depth)
        self.decoder = CompactSide(width, rank, {*spec.taps["decoder"], *late}, late)
        self.late = late_decoder(backbone, spec.late)
        self.blocks = backbone.family.streams["decoder"].rpartition(".")[2]

        def norm(stream: str) -> Any:
            return share(by_hand(norm_of(model, backbone.family, stream)))

        self.encoder_norm: nn.Module = norm("encoder")
        self.decoder_norm: nn.Module = norm("decoder")

    def fuse(
        self, streams: Mapping[str, Packed], tree: PrefixTree | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The memory `[n, d]`, what enters the late blocks, and what the blocks up to the first of
        them reported, both `[m, d]`."""
        encoder, decoder = streams["encoder"], streams["decoder"]
        memory = self._memory(encoder.states[:-1], encoder.tap(-1), encoder.group)
        gathered = self.decoder.gather(decoder.states, self.spec.taps["decoder"], decoder.group)
        return memory, decoder.tap(-1), gathered

    def _memory(self, taps: Tensor, top: Tensor, group: int = 0) -> Tensor:
        """`[n, d]` of what entered the blocks, `[K, n, d]`, and of what left the last one."""
        *reports, last = self.spec.taps["encoder"]
        gathered = self.encoder.gather(taps, reports, group)
        memory: Tensor = self.encoder_norm(self.encoder.add(last - 1, top, gathered))
        return memory

    @staticmethod
    def hidden(
        routes: Sequence[DtlSeq2Seq],
        fused: Sequence[tuple[Tensor, ...]],
        batches: Sequence[Mapping[str, Packed]],
        tree: PrefixTree | None = None,
    ) -> list[Tensor]:
        """States `[B, P, d]` of each route's batch, P being the nodes of a tree if there is one."""
        first = routes[0]
        packed = [streams["decoder"] for streams in batches]
        size = max(each.longest for each in packed)
        inputs, gathered = (
            [each.pad(parts[place], size) for each, parts in zip(packed, fused, strict=True)]
            for place in (1, 2)
        )
        blocks: Any = getattr(first.late, first.blocks)
        number = first.spec.taps["decoder"][-1]
        sides = [route.decoder for route in routes]
        with adding_back(blocks, number, sides, [on_paths(each, tree) for each in gathered]):
            memories = [memory for memory, _, _ in fused]
            found = decode_late(first.late, inputs, memories, batches, tree)
        return [
            route.decoder_norm(states) * route.scale
            for route, states in zip(routes, found, strict=True)
        ]

    def attach(self, backbone: Backbone) -> nn.Module:
        """The live model with both side networks in it; its weights are shared."""
        model: Any = share(backbone.model)
        taps, family = self.spec.taps["encoder"], backbone.family
        states = TapRecorder(blocks_of(model, family, "encoder"), taps)

        def memory(_: Tensor | None) -> Tensor:
            stacked = states.stacked(taps).flatten(1, 2)
            side = self._memory(stacked[:-1], stacked[-1])
            return side.view(*states.states[taps[-1]].shape)

        two_memories(model, family, backbone.width, memory, self.spec.taps["decoder"][-1])
        self.decoder.attach(blocks_of(model, family, "decoder"))
        live: nn.Module = model
        return live
