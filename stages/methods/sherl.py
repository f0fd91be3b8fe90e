"""SHERL: consolidated taps into the last frozen blocks (Diao et al., ECCV 2024).

A route has two faces over the same parameters: `hidden` takes packed features from a cache,
`attach` hooks the same computation into the live backbone. Several routes on one backbone go
through the frozen late blocks together: these are the same for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from sherl_pipe.cache import InputError, StreamSpec
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.families import Family, blocks_of
from sherl_pipe.stages.features import Packed
from sherl_pipe.stages.methods.base import Method
from sherl_pipe.stages.methods.consolidation import INITIALISATIONS, Consolidation
from sherl_pipe.stages.methods.consolidation_clip import ClipConsolidation
from sherl_pipe.stages.methods.dual import DualRoute, dual_taps
from sherl_pipe.stages.methods.late import encode_late
from sherl_pipe.stages.methods.live import enter_with
from sherl_pipe.stages.methods.route import PooledRoute, RouteSpec, pooled
from sherl_pipe.stages.methods.sherl_seq2seq import SherlSeq2Seq
from sherl_pipe.stages.surgery import TapRecorder, late_encoder, share
from sherl_pipe.stages.taps import LackingTapsError, paper_taps
from sherl_pipe.stages.words import PrefixTree
from torch import Tensor, nn


class SherlEncoder(PooledRoute):
    """SHERL on an encoder: consolidation, the last frozen blocks, a pooled head (SPEC 2.3).

    Args:
        backbone: the frozen model.
        spec: `spec.taps["hidden"]` ends with the tap that enters the first late block.
    """

    late: nn.Module

    def __init__(self, backbone: Backbone, spec: RouteSpec) -> None:
        super().__init__()
        self.spec = spec
        width, taps = backbone.width, spec.taps["hidden"]
        self.consolidation = Consolidation(
            width, width // spec.reduction, len(taps), spec.variant or "", spec.init
        )
        self.late = late_encoder(backbone, spec.late)
        self.head = self.make_head(backbone)

    def make_head(self, backbone: Backbone) -> Any:
        """The head, a linear layer to be tuned."""
        return nn.Linear(backbone.width, self.spec.outputs)

    def fuse(self, streams: Mapping[str, Packed], tree: PrefixTree | None = None) -> tuple[Tensor]:
        """Consolidated states `[n, d]`."""
        packed = streams["hidden"]
        return (self.consolidation(packed.states, packed.tap(-1), packed.group),)

    @staticmethod
    def hidden(
        routes: Sequence[SherlEncoder],
        fused: Sequence[tuple[Tensor, ...]],
        batches: Sequence[Mapping[str, Packed]],
        tree: PrefixTree | None = None,
    ) -> list[Tensor]:
        """Pooled states `[B, d]` of each route's batch; there is no tree."""
        found = encode_late(routes[0].late, [states for (states,) in fused], batches)
        return [
            pooled(states, mask, route.spec.pool, route.spec.front)
            for route, (states, mask) in zip(routes, found, strict=True)
        ]

    def attach(self, backbone: Backbone) -> nn.Module:
        """The live backbone with the consolidation hooked in; its weights are shared."""
        model: nn.Module = share(backbone.model)
        blocks = blocks_of(model, backbone.family, "hidden")
        taps = self.spec.taps["hidden"]
        recorder = TapRecorder(blocks, taps)

        def consolidated() -> Tensor:
            stacked = recorder.stacked(taps)
            state: Tensor = self.consolidation(stacked, stacked[-1])
            return state

        enter_with(blocks[taps[-1]], consolidated)
        return model


def _clip_side(init: str, width: int, hidden: int, embed: int, taps: int) -> ClipConsolidation:
    """As published, or with a tail that is zero, so that the tower's own embedding comes out."""
    side = ClipConsolidation(width, hidden, embed, taps, gated=True)
    if init == "residual":
        nn.init.zeros_(side.tail.weight)
        nn.init.zeros_(side.tail.bias)
    return side


class Sherl(Method):
    """The method `sherl`."""

    usual: ClassVar[Mapping[str, Any]] = {"reduction": 4, "late": 1, "init": "residual"}
    inits = INITIALISATIONS
    dual = True
    speaks = True

    @classmethod
    def usual_for(cls, streams: Mapping[str, StreamSpec]) -> Mapping[str, Any]:
        """As published on T5 and on dual encoders. On encoders two late blocks and a head that
        starts from a probe: one frozen block leaves little of what only the middle taps know."""
        if "image" in streams:
            return {**cls.usual, "reduction": 1, "late": 0}
        if "hidden" not in streams:
            return cls.usual
        # A small backbone keeps a block in front of the late ones.
        late = max(1, min(2, streams["hidden"].blocks - 1))
        return {**cls.usual, "late": late, "head": "probe"}

    @classmethod
    def published_for(cls, streams: Mapping[str, StreamSpec]) -> Mapping[str, Any]:
        """One late block, a closed gate; a fresh head, or on T5 the whole vocabulary (SPEC 3). On
        dual encoders random tails (SPEC 2.5)."""
        if "image" in streams:
            return {"init": "paper"}
        last = {"loss": "vocabulary"} if "decoder" in streams else {"head": "random"}
        return {"late": 1, "init": "paper", **last}

    @staticmethod
    def late_blocks(late: int) -> dict[str, int]:
        """As many of the stream that ends in the head."""
        return {"hidden": late, "decoder": late}

    @staticmethod
    def variant(family: Family) -> str:
        """The papers' own for text-to-text, for dual encoders, and for a joint encoder with an
        answer head."""
        if family.towers:
            return "clip4clip"
        return "t5" if family.seq2seq else "clipvil"

    @staticmethod
    def choose_taps(
        backbone: Backbone, late: int, cached: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
        """Consolidated taps and last feature per stream, of those that a cache holds.

        The published selection where the cache has it, else every cached tap below the late
        route. Raises InputError where the late route's own input is not cached.
        """
        if backbone.family.towers:
            return dual_taps(backbone, late, cached, "sherl")
        taps: dict[str, tuple[int, ...]] = {}
        last: dict[str, int] = {}
        for stream, held in cached.items():
            blocks = len(backbone.blocks(stream))
            if not 1 <= late < blocks:
                raise InputError(
                    explain("late", expected=f"1 to {blocks - 1} ({blocks} blocks)", found=late)
                )
            wanted = paper_taps(backbone.family, stream, blocks, late)
            top = blocks if stream == "encoder" else blocks - late
            if not set(wanted) <= set(held):
                wanted = [tap for tap in held if tap <= top]
            last[stream] = wanted[-1] if stream == "encoder" else top
            needed = {*wanted, last[stream]}
            if not needed <= set(held) or len(wanted) < 2:
                every = paper_taps(backbone.family, stream, blocks, late)
                raise LackingTapsError(
                    stream, f"{sorted(needed)} for --late {late}", held, {*every, last[stream]}
                )
            taps[stream] = tuple(wanted)
        return taps, last

    @staticmethod
    def build(backbone: Backbone, spec: RouteSpec) -> SherlEncoder | SherlSeq2Seq | DualRoute:
        """A fresh route; only its own parameters require gradients."""
        if backbone.family.towers:
            return DualRoute(backbone, spec, partial(_clip_side, spec.init)).to(backbone.device)
        # It is made of what stands here.
        from sherl_pipe.stages.methods.sherl_causal import SherlCausal

        kind: type[SherlEncoder] | type[SherlSeq2Seq] = SherlSeq2Seq
        if not backbone.family.seq2seq:
            kind = SherlEncoder if spec.outputs else SherlCausal
        return kind(backbone, spec).to(backbone.device)

    @staticmethod
    def from_reference(
        backbone: Backbone,
        params: Mapping[str, Tensor],
        layers: Mapping[str, Sequence[int] | None],
        reduction: int,
    ) -> SherlSeq2Seq:
        """A route with the papers' parameters (SPEC 3.6). The last decoder block is dropped from
        the side layers, being the late one."""
        return SherlSeq2Seq.from_reference(backbone, params, layers, reduction)
