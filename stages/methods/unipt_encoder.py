"""The method `unipt`: a parallel network that reads every cached tap and runs no frozen block
(Diao et al., CVPR 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sherl_pipe.cache import StreamSpec
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.families import Family
from sherl_pipe.stages.features import Packed
from sherl_pipe.stages.methods.base import Method, cached_taps, require_late
from sherl_pipe.stages.methods.dual import DualRoute, dual_taps
from sherl_pipe.stages.methods.live import live_encoder
from sherl_pipe.stages.methods.route import PooledRoute, RouteSpec, pooled
from sherl_pipe.stages.methods.unipt import UniPT, reduce_packed
from sherl_pipe.stages.methods.unipt_clip import ClipUniPT
from sherl_pipe.stages.methods.unipt_seq2seq import UniptSeq2Seq
from sherl_pipe.stages.words import PrefixTree
from torch import Tensor, nn


class UniptEncoder(PooledRoute):
    """UniPT over all taps of an encoder, and a pooled head (SPEC 6.5).

    Args:
        backbone: the frozen model.
        spec: `spec.taps["hidden"]` are what is reduced; the last one is the anchor.
    """

    def __init__(self, backbone: Backbone, spec: RouteSpec) -> None:
        super().__init__()
        self.spec, self.late = spec, None
        width = backbone.width
        taps = len(spec.taps["hidden"])
        self.side = UniPT(width, width // spec.reduction, taps, width, spec.variant or "")
        self.head = nn.Linear(width, spec.outputs)

    def fuse(self, streams: Mapping[str, Packed], tree: PrefixTree | None = None) -> tuple[Tensor]:
        """Pooled states `[B, d]`; there is no tree."""
        packed = streams["hidden"]
        mask = packed.mask()
        reduced = reduce_packed(self.side, packed)
        states = self.side.expand(reduced[-1], self.side.interact(reduced, mask))
        return (pooled(states, mask, self.spec.pool, self.spec.front),)

    def attach(self, backbone: Backbone) -> nn.Module:
        """The live backbone up to the last tap, giving UniPT's states; its weights are shared."""
        return live_encoder(backbone, self.spec.taps["hidden"], self.side)


class Unipt(Method):
    """The method `unipt`."""

    usual: ClassVar[Mapping[str, Any]] = {"reduction": 4, "late": 0, "init": "paper"}
    inits = ("paper",)
    dual = True

    @classmethod
    def usual_for(cls, streams: Mapping[str, StreamSpec]) -> Mapping[str, Any]:
        """Of a dual encoder's embeddings nothing is reduced, as published."""
        return {**cls.usual, "reduction": 1} if "image" in streams else cls.usual

    @staticmethod
    def late_blocks(late: int) -> dict[str, int]:
        """None."""
        return {}

    @staticmethod
    def variant(family: Family) -> str:
        """The published form for CLIP4Clip on dual encoders, for CLIP-ViL on all others.

        The latter is the one whose result replaces an encoder's output at the encoder's own width,
        in front of an answer head. That for a BERT beside an image encoder ends in an embedding of
        another width, which is compared with those of images.
        """
        return "clip4clip" if family.towers else "clipvil"

    @staticmethod
    def choose_taps(
        backbone: Backbone, late: int, cached: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
        """All cached taps; the papers read all there are.

        Raises InputError for fewer than two of a stream, and for late blocks.
        """
        if backbone.family.towers:
            return dual_taps(backbone, late, cached, "unipt")
        require_late(late, 0, 0, "unipt")
        every = {stream: range(len(backbone.blocks(stream)) + 1) for stream in cached}
        return {
            stream: cached_taps(stream, held, every[stream], 2) for stream, held in cached.items()
        }, {}

    @staticmethod
    def build(backbone: Backbone, spec: RouteSpec) -> UniptEncoder | UniptSeq2Seq | DualRoute:
        """A fresh route; only its own parameters require gradients."""
        if backbone.family.towers:
            return DualRoute(backbone, spec, ClipUniPT).to(backbone.device)
        kind = UniptSeq2Seq if backbone.family.seq2seq else UniptEncoder
        return kind(backbone, spec).to(backbone.device)
