"""SHERL's route on encoder-decoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.families import blocks_of, norm_of, stack_of
from sherl_pipe.stages.features import Packed
from sherl_pipe.stages.methods.consolidation import Consolidation
from sherl_pipe.stages.methods.late import decode_late
from sherl_pipe.stages.methods.live import enter_with, two_memories
from sherl_pipe.stages.methods.parts import trained_copy
from sherl_pipe.stages.methods.route import RouteSpec, WordRoute
from sherl_pipe.stages.norm import by_hand
from sherl_pipe.stages.surgery import TapRecorder, late_decoder, replace_module, share
from sherl_pipe.stages.words import PrefixTree
from torch import Tensor, nn


class SherlSeq2Seq(WordRoute):
    """SHERL on T5 (SPEC 3), and on BART in the same way: both stacks consolidated, the last
    decoder blocks as late route.

    Args:
        backbone: the frozen model. Where blocks end with a norm of their own there is no side norm.
        spec: `spec.taps["encoder"]` and `["decoder"]` are the consolidated taps;
            `spec.last["decoder"]` is the tap that enters the first late block, listed or not.
    """

    late: nn.Module

    def __init__(self, backbone: Backbone, spec: RouteSpec) -> None:
        super().__init__(backbone, spec)
        width = backbone.width
        model: Any = backbone.model

        def consolidation(stream: str) -> Consolidation:
            count = len(spec.taps[stream])
            return Consolidation(
                width, width // spec.reduction, count, spec.variant or "", spec.init
            )

        def side_norm(stream: str) -> Any:
            norm: Any = norm_of(model, backbone.family, stream)
            if isinstance(norm, nn.Identity):
                return norm
            side = trained_copy(by_hand(norm)).float()
            if spec.init == "paper":
                nn.init.ones_(side.weight)
            return side

        self.encoder = consolidation("encoder")
        self.decoder = consolidation("decoder")
        self.encoder_norm = side_norm("encoder")
        self.decoder_norm = side_norm("decoder")
        self.late = late_decoder(backbone, spec.late)

    def reads(self) -> dict[str, tuple[int, ...]]:
        """Taps needed from a cache, per stream; the last feature at the end."""
        taps = {}
        for stream in ("encoder", "decoder"):
            listed, last = self.spec.taps[stream], self.spec.last[stream]
            taps[stream] = listed if listed[-1] == last else (*listed, last)
        return taps

    def fuse(
        self, streams: Mapping[str, Packed], tree: PrefixTree | None = None
    ) -> tuple[Tensor, Tensor]:
        """Memory `[n, d]` and consolidated decoder states `[m, d]`."""
        memory = self.encoder_norm(self._consolidate("encoder", streams["encoder"]))
        return memory, self._consolidate("decoder", streams["decoder"])

    @staticmethod
    def hidden(
        routes: Sequence[SherlSeq2Seq],
        fused: Sequence[tuple[Tensor, ...]],
        batches: Sequence[Mapping[str, Packed]],
        tree: PrefixTree | None = None,
    ) -> list[Tensor]:
        """States `[B, P, d]` of each route's batch, P being the nodes of a tree if there is one."""
        decoders = [streams["decoder"] for streams in batches]
        positions = max(each.longest for each in decoders)
        inputs = [
            each.pad(states, positions) for each, (_, states) in zip(decoders, fused, strict=True)
        ]
        memories = [memory for memory, _ in fused]
        parts = decode_late(routes[0].late, inputs, memories, batches, tree)
        return [
            route.decoder_norm(part) * route.scale
            for route, part in zip(routes, parts, strict=True)
        ]

    def _consolidate(self, stream: str, packed: Packed) -> Tensor:
        count = len(self.spec.taps[stream])
        module: Consolidation = getattr(self, stream)
        state: Tensor = module(packed.states[:count], packed.tap(-1), packed.group)
        return state

    def attach(self, backbone: Backbone) -> nn.Module:
        """The live model with both consolidations hooked in; its weights are shared."""
        model: Any = share(backbone.model)
        encoder_taps, decoder_taps = self.reads()["encoder"], self.reads()["decoder"]
        family = backbone.family
        blocks = blocks_of(model, family, "decoder")
        encoder_states = TapRecorder(blocks_of(model, family, "encoder"), encoder_taps)
        decoder_states = TapRecorder(blocks, decoder_taps)
        first_late = len(blocks) - self.spec.late

        def consolidate(stream: str, recorder: TapRecorder) -> Tensor:
            taps = self.spec.taps[stream]
            last = recorder.states[self.spec.last[stream]]
            module: Consolidation = getattr(self, stream)
            state: Tensor = module(recorder.stacked(taps), last)
            return state

        def memory(_: Tensor | None) -> Tensor:
            side: Tensor = self.encoder_norm(consolidate("encoder", encoder_states))
            return side

        two_memories(model, family, backbone.width, memory, first_late)
        enter_with(blocks[first_late], lambda: consolidate("decoder", decoder_states))
        if family.norm is not None:
            replace_module(stack_of(model, family, "decoder"), family.norm, self.decoder_norm)
        live: nn.Module = model
        return live

    @classmethod
    def from_reference(
        cls,
        backbone: Backbone,
        params: Mapping[str, Tensor],
        layers: Mapping[str, Sequence[int] | None],
        reduction: int,
    ) -> SherlSeq2Seq:
        """A route with the published parameters (SPEC 3.6); arguments and errors as for
        `Method.from_reference`."""
        depth = {stream: len(backbone.blocks(stream)) for stream in ("encoder", "decoder")}

        def outputs(stream: str, end: int) -> tuple[int, ...]:
            listed = layers[stream]
            chosen = range(depth[stream]) if listed is None else listed
            return (0, *(layer + 1 for layer in chosen if layer < end))

        encoder = outputs("encoder", depth["encoder"])
        decoder = outputs("decoder", depth["decoder"] - 1)
        spec = RouteSpec(
            method="sherl",
            taps={"encoder": encoder, "decoder": decoder},
            last={"encoder": encoder[-1], "decoder": depth["decoder"] - 1},
            late=1,
            reduction=reduction,
            variant="t5",
            init="paper",
            outputs=0,
            pool="mean",
        )
        route = cls(backbone, spec)
        route._load_published(params)
        return route

    def _load_published(self, params: Mapping[str, Tensor]) -> None:
        used: set[str] = set()

        def below(prefix: str) -> dict[str, Tensor]:
            found = {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}
            used.update(prefix + name for name in found)
            return found

        self.encoder = Consolidation.from_reference(below("encoder.side_mtsa_block."), "t5")
        self.decoder = Consolidation.from_reference(below("decoder.side_mtsa_block."), "t5")
        norms: Any = {"encoder": self.encoder_norm, "decoder": self.decoder_norm}
        for stream, norm in norms.items():
            norm.load_state_dict(below(f"{stream}.final_side_layer_norm."))
        if used != set(params):
            left = sorted(set(params) - used)
            raise InputError(explain("parameters", expected="the published names", found=left))
